// multiply.h: the innermost loop, a block of outputs in registers.
#pragma once
#include "taps.h"
#include "vector.h"

namespace flashconv {

// A block holds ROWS outputs at VECTORS * WIDTH places. Each step loads a vector of input for each
// of its vectors and one weight for each of its rows; all products of the two stay in registers.
// Sixteen registers hold twelve sums, thirty-two hold twenty-four.
constexpr int MAX_ROWS = REGISTERS == 32 ? 8 : 4;
constexpr int SUMS_IN_REGISTERS = REGISTERS == 32 ? 24 : 12;

constexpr int max_vectors(int rows) {
  const int vectors = SUMS_IN_REGISTERS / rows;
  return vectors < 12 ? vectors : 12;
}

// What one call sums: taps of channels, each a constant offset away from the block's places.
struct Terms {
  const Tap* taps;
  int64_t tap_count;
  int64_t channels, channel_size;  // of the packed tile
};

// Where the weights of a block are: packed as [tap][channel][row], or as the layer has them.
struct Weights {
  const float* data;
  int64_t channel, row;  // steps, where they are not packed
};

// A vector of places: where it starts in the tile, and where its sums are.
struct Spot {
  int64_t place, sum;
};

template <int ROWS, int VECTORS>
inline __attribute__((always_inline)) void multiply_step(Vector (&sums)[ROWS][VECTORS],
                                                         const float* const (&input)[VECTORS],
                                                         int64_t offset, const float* weights,
                                                         int64_t row) {
  if constexpr (ROWS < VECTORS) {  // fewer weights than vectors: these stay in registers
    FLASHCONV_UNROLL
    for (int v = 0; v < VECTORS; v++) {
      const Vector x = load(input[v] + offset);
      FLASHCONV_UNROLL
      for (int r = 0; r < ROWS; r++) sums[r][v] += x * weights[r * row];
    }
  } else {
    Vector x[VECTORS];
    FLASHCONV_UNROLL
    for (int v = 0; v < VECTORS; v++) x[v] = load(input[v] + offset);
    FLASHCONV_UNROLL
    for (int r = 0; r < ROWS; r++) {
      FLASHCONV_UNROLL
      for (int v = 0; v < VECTORS; v++) sums[r][v] += x[v] * weights[r * row];
    }
  }
}

template <int ROWS, int VECTORS>
inline __attribute__((always_inline)) void clear(Vector (&sums)[ROWS][VECTORS]) {
  FLASHCONV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    FLASHCONV_UNROLL
    for (int v = 0; v < VECTORS; v++) sums[r][v] = Vector{};
  }
}

// A block's sum starts at zero and is added to `result` as a whole: a long sum is a sum of short
// ones, and its error grows with their number only. With `start` (a number for each row) result is
// what is begun here, else what is added to.
template <int ROWS, int VECTORS>
inline __attribute__((always_inline)) void finish(const Vector (&sums)[ROWS][VECTORS],
                                                  const Spot* spots, const float* start,
                                                  float* result, int64_t row_size) {
  FLASHCONV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    FLASHCONV_UNROLL
    for (int v = 0; v < VECTORS; v++) {
      float* to = result + r * row_size + spots[v].sum;
      store(to, start ? sums[r][v] + start[r] : load(to) + sums[r][v]);
    }
  }
}

template <int ROWS, int VECTORS, bool IS_PACKED>
void multiply(const Terms& terms, const float* tile, const Spot* spots, const Weights& weights,
              const float* start, float* result, int64_t row_size) {
  Vector sums[ROWS][VECTORS];
  const float* input[VECTORS];
  clear(sums);
  FLASHCONV_UNROLL
  for (int v = 0; v < VECTORS; v++) input[v] = tile + spots[v].place;
  const int64_t row = IS_PACKED ? 1 : weights.row;
  const int64_t channel = IS_PACKED ? ROWS : weights.channel;
  for (const Tap* tap = terms.taps; tap < terms.taps + terms.tap_count; tap++) {
    int64_t offset = tap->offset;
    const int64_t skipped = IS_PACKED ? tap->index * terms.channels * ROWS : tap->kernel;
    const float* weight = weights.data + skipped;
    for (int64_t c = 0; c < terms.channels; c++) {
      multiply_step(sums, input, offset, weight, row);
      offset += terms.channel_size;
      weight += channel;
    }
  }
  finish(sums, spots, start, result, row_size);
}

using Multiply = void (*)(const Terms&, const float*, const Spot*, const Weights&, const float*,
                          float*, int64_t);

template <bool IS_PACKED, int ROWS, int... vectors>
Multiply find_multiply(int64_t count, std::integer_sequence<int, vectors...>) {
  static constexpr Multiply kernels[] = {multiply<ROWS, vectors + 1, IS_PACKED>...};
  return kernels[count - 1];
}

template <bool IS_PACKED, int ROWS = 1>
Multiply find_multiply(int64_t rows, int64_t vectors) {
  if constexpr (ROWS <= MAX_ROWS) {
    using Counts = std::make_integer_sequence<int, max_vectors(ROWS)>;
    return rows == ROWS ? find_multiply<IS_PACKED, ROWS>(vectors, Counts()) :
                          find_multiply<IS_PACKED, ROWS + 1>(rows, vectors);
  } else {
    return nullptr;  // no block has more rows
  }
}

// `total` cut into as few parts as a limit admits, which differ by one at most.
struct Parts {
  int64_t count, size_of_most, larger;  // the first `larger` parts have one more

  Parts(int64_t total, int64_t limit)
      : count(divide_up(total, limit)), size_of_most(total / count), larger(total % count) {}
  int64_t begin(int64_t part) const {
    return part * size_of_most + (part < larger ? part : larger);
  }
  int64_t size(int64_t part) const { return size_of_most + (part < larger); }
  int64_t largest() const { return size(0); }
};

}  // namespace flashconv
