// gradient_kernels.h: the innermost loops of weight gradients, sums over places.
#pragma once
#include "depthwise.h"
#include "multiply.h"

namespace flashconv {

// Rows of places that one call sums over: where each starts in the packed tile of x, and how long
// all of them are. Rows of y lie one behind the other.
struct Places {
  const int64_t* rows;
  int64_t count, length;
};

// ---- many outputs: a vector holds neighbouring outputs of one place --------------------------------

constexpr int MOST_OUTPUT_VECTORS = 3;

constexpr int max_weight_rows(int vectors) {
  const int rows = SUMS_IN_REGISTERS / vectors;
  return rows < 8 ? rows : 8;
}

// ROWS weights of one output each, VECTORS * WIDTH outputs: x's number is the same for all outputs,
// y's vector for all rows. y is packed [place][output], places `y_size` apart.
template <int ROWS, int VECTORS>
void sum_outer(const Places& places, const float* x, const int64_t* offsets, const float* y,
               int64_t y_size, float* result, int64_t row_size) {
  Vector sums[ROWS][VECTORS];
  FLASHCONV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    FLASHCONV_UNROLL
    for (int v = 0; v < VECTORS; v++) sums[r][v] = Vector{};
  }
  for (int64_t row = 0; row < places.count; row++) {
    const float* from[ROWS];
    FLASHCONV_UNROLL
    for (int r = 0; r < ROWS; r++) from[r] = x + offsets[r] + places.rows[row];
    for (int64_t i = 0; i < places.length; i++, y += y_size) {
      Vector outputs[VECTORS];
      FLASHCONV_UNROLL
      for (int v = 0; v < VECTORS; v++) outputs[v] = load(y + v * WIDTH);
      FLASHCONV_UNROLL
      for (int r = 0; r < ROWS; r++) {
        FLASHCONV_UNROLL
        for (int v = 0; v < VECTORS; v++) sums[r][v] += outputs[v] * from[r][i];
      }
    }
  }
  FLASHCONV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    FLASHCONV_UNROLL
    for (int v = 0; v < VECTORS; v++) {
      float* to = result + r * row_size + v * WIDTH;
      store(to, load(to) + sums[r][v]);
    }
  }
}

using SumOuter = void (*)(const Places&, const float*, const int64_t*, const float*, int64_t,
                          float*, int64_t);

template <int VECTORS, int... rows>
SumOuter find_outer(int64_t count, std::integer_sequence<int, rows...>) {
  static constexpr SumOuter kernels[] = {sum_outer<rows + 1, VECTORS>...};
  return kernels[count - 1];
}

template <int VECTORS>
SumOuter find_outer(int64_t rows) {
  return find_outer<VECTORS>(rows, std::make_integer_sequence<int, max_weight_rows(VECTORS)>());
}

inline SumOuter find_outer(int64_t rows, int64_t vectors) {
  if (vectors == 1) return find_outer<1>(rows);
  return vectors == 2 ? find_outer<2>(rows) : find_outer<3>(rows);
}

// ---- few outputs: a vector holds neighbouring places -----------------------------------------------

constexpr int FEW_OUTPUTS = 5;

constexpr int max_columns(int rows) {
  const int columns = SUMS_IN_REGISTERS / rows;
  return columns < 8 ? columns : 8;
}

// Products of ROWS outputs with COLUMNS weights' inputs at one vector of places.
template <int ROWS, int COLUMNS>
inline __attribute__((always_inline)) void dot_step(Vector (&sums)[ROWS][COLUMNS],
                                                    const Vector (&x)[COLUMNS], const float* y,
                                                    int64_t y_size) {
  FLASHCONV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    const Vector output = load(y + r * y_size);
    FLASHCONV_UNROLL
    for (int c = 0; c < COLUMNS; c++) sums[r][c] += output * x[c];
  }
}

// Every sum is a vector, a lane for each of WIDTH places. y is packed in rows filled up with zeros;
// what x holds beside them is masked, since an infinity times zero is no number.
template <int ROWS, int COLUMNS>
void sum_dots(const Places& places, const float* x, const int64_t* offsets, const float* y,
              int64_t y_size, float* result, int64_t row_size) {
  Vector sums[ROWS][COLUMNS];
  FLASHCONV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    FLASHCONV_UNROLL
    for (int c = 0; c < COLUMNS; c++) sums[r][c] = Vector{};
  }
  const int64_t whole = places.length / WIDTH * WIDTH;
  Bits mask{};
  for (int i = 0; i < WIDTH; i++) mask[i] = i < places.length - whole ? -1 : 0;
  for (int64_t row = 0; row < places.count; row++) {
    const float* from = x + places.rows[row];
    Vector inputs[COLUMNS];
    for (int64_t i = 0; i < whole; i += WIDTH, y += WIDTH) {
      FLASHCONV_UNROLL
      for (int c = 0; c < COLUMNS; c++) inputs[c] = load(from + offsets[c] + i);
      dot_step(sums, inputs, y, y_size);
    }
    if (whole == places.length) continue;
    FLASHCONV_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
      const Vector all = load(from + offsets[c] + whole);
      inputs[c] = reinterpret<Vector>(reinterpret<Bits>(all) & mask);
    }
    dot_step(sums, inputs, y, y_size);
    y += WIDTH;
  }
  FLASHCONV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    FLASHCONV_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
      float* to = result + (r * row_size + c) * WIDTH;
      store(to, load(to) + sums[r][c]);
    }
  }
}

using SumDots = void (*)(const Places&, const float*, const int64_t*, const float*, int64_t,
                         float*, int64_t);

template <int ROWS, int... columns>
SumDots find_dots(int64_t count, std::integer_sequence<int, columns...>) {
  static constexpr SumDots kernels[] = {sum_dots<ROWS, columns + 1>...};
  return kernels[count - 1];
}

template <int ROWS = 1>
SumDots find_dots(int64_t rows, int64_t columns) {
  if constexpr (ROWS <= FEW_OUTPUTS) {
    using Counts = std::make_integer_sequence<int, max_columns(ROWS)>;
    return rows == ROWS ? find_dots<ROWS>(columns, Counts()) : find_dots<ROWS + 1>(rows, columns);
  } else {
    return nullptr;  // more outputs are summed the other way
  }
}

// ---- depthwise, channels last: a vector holds neighbouring channels of one place --------------------

constexpr int MOST_TAPS = 12;

// COUNT taps of one vector of channels. Places are PLACE apart, in x, in y and in offsets.
template <int COUNT>
void sum_groups(const Places& places, const float* x, const int64_t* offsets, const float* y,
                float* result) {
  Vector sums[COUNT];
  FLASHCONV_UNROLL
  for (int t = 0; t < COUNT; t++) sums[t] = Vector{};
  for (int64_t row = 0; row < places.count; row++) {
    const float* from = x + places.rows[row] * PLACE;
    for (int64_t i = 0; i < places.length; i++, from += PLACE, y += PLACE) {
      const Vector output = load(y);
      FLASHCONV_UNROLL
      for (int t = 0; t < COUNT; t++) sums[t] += load(from + offsets[t]) * output;
    }
  }
  FLASHCONV_UNROLL
  for (int t = 0; t < COUNT; t++)
    store(result + t * PLACE, load(result + t * PLACE) + sums[t]);
}

using SumGroups = void (*)(const Places&, const float*, const int64_t*, const float*, float*);

template <int... counts>
SumGroups find_groups(int64_t count, std::integer_sequence<int, counts...>) {
  static constexpr SumGroups kernels[] = {sum_groups<counts + 1>...};
  return kernels[count - 1];
}

inline SumGroups find_groups(int64_t count) {
  return find_groups(count, std::make_integer_sequence<int, MOST_TAPS>());
}

}  // namespace flashconv
