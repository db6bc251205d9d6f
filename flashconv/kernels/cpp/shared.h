// shared.h: long kernels of depthwise layers. Four neighbouring places read nearly the same input,
// so each vector that is loaded serves all four: they are the rows of a block.
#pragma once
#include "multiply.h"
#include "problem.h"

namespace flashconv {

// The axis along which a kernel is long enough, or -1. Strides and dilations there are 1, and other
// axes have one phase, so that the four places are all phases there are.
inline int find_long_axis(const Problem& p, const Convolution& c) {
  constexpr int64_t longest[] = {0, 12, 64};  // elements; below, loads are not what takes the time
  if (p.inputs != 1 || p.outputs != 1) return -1;
  for (int axis = 2; axis > 0; axis--) {
    bool fits = c.stride[axis] == 1 && c.dilation[axis] == 1 && c.kernel[axis] >= longest[axis] &&
                p.written[axis] >= 8 * SHARED;
    for (int i = 0; i < 3; i++) fits = fits && (i == axis || p.axes[i].phases == 1);
    if (fits) return axis;
  }
  return -1;
}

// Place q of phase r is SHARED * q + r, and so is the input's.
inline Axis shared_axis(const AxisLengths& a, bool is_gradient) {
  Axis axis{SHARED, SHARED, a.read, divide_up(a.written, SHARED), 0, 0, {}, {0}, {}};
  for (int64_t phase = 0; phase < SHARED; phase++) {
    for (int64_t k = 0; k < a.kernel; k++) {
      const int64_t reach = phase + (is_gradient ? a.padding - k : k - a.padding);
      const int64_t shift = divide_down(reach, SHARED);
      const int64_t remainder = reach - shift * SHARED;
      if (!sees_input(axis, shift, remainder)) continue;
      axis.taps.push_back({k, shift, plane_of(axis, remainder)});
    }
    axis.first.push_back(axis.taps.size());
  }
  find_span(axis);
  return axis;
}

// A problem as it is, or with its long axis shared.
inline void share_long_axis(Problem& p, const Convolution& c) {
  p.shared = find_long_axis(p, c);
  if (p.shared < 0) return;
  const bool is_gradient = c.kind == INPUT_GRADIENT;
  const AxisLengths lengths = is_gradient ? axis_lengths(c, p.shared, c.output, c.input) :
                                            axis_lengths(c, p.shared, c.input, c.output);
  p.axes[p.shared] = shared_axis(lengths, is_gradient);
  p.kernel_step = p.shared == 1 ? c.kernel[2] : 1;
  p.is_reversed = is_gradient;
}

// Taps that all four places have, and those that only some have: three at either end. The latter
// are no zeros in the former, since zero times infinity is no number.
struct SharedTaps {
  std::vector<Tap> common;
  std::array<std::vector<Tap>, SHARED> rest;
};

inline SharedTaps share_taps(const Problem& p, const Taps& taps) {
  SharedTaps result;
  const int64_t length = p.kernel[p.shared];
  for (int64_t phase = 0; phase < SHARED; phase++)
    for (int64_t t = 0; t < taps.count(phase); t++) {
      Tap tap = taps.begin(phase)[t];
      const int64_t k = tap.kernel / p.kernel_step % length;
      const int64_t reach = (p.is_reversed ? length - 1 - k : k) + phase;
      const bool is_common = reach >= SHARED - 1 && reach < length;
      if (is_common && phase > 0) continue;
      std::vector<Tap>& list = is_common ? result.common : result.rest[phase];
      tap.index = list.size();
      list.push_back(tap);
    }
  return result;
}

// A group's weights: [common tap][phase], and then [phase][other tap].
template <class T>
void pack_shared(const Problem& p, const SharedTaps& taps, const T* w, float* to) {
  const int64_t step = p.is_reversed ? -p.kernel_step : p.kernel_step;
  for (const Tap& tap : taps.common)
    for (int64_t phase = 0; phase < SHARED; phase++) *to++ = widen(w[tap.kernel - phase * step]);
  for (const std::vector<Tap>& rest : taps.rest)
    for (const Tap& tap : rest) *to++ = widen(w[tap.kernel]);
}

// multiply, for a single channel: nothing but taps.
template <int ROWS, int VECTORS>
void multiply_single(const Tap* taps, int64_t count, const float* tile, const Spot* spots,
                     const float* weights, const float* start, float* result, int64_t row_size) {
  Vector sums[ROWS][VECTORS];
  const float* input[VECTORS];
  clear(sums);
  FLASHCONV_UNROLL
  for (int v = 0; v < VECTORS; v++) input[v] = tile + spots[v].place;
  for (int64_t t = 0; t < count; t++)
    multiply_step(sums, input, taps[t].offset, weights + t * ROWS, 1);
  finish(sums, spots, start, result, row_size);
}

using MultiplySingle = void (*)(const Tap*, int64_t, const float*, const Spot*, const float*,
                                const float*, float*, int64_t);

template <int ROWS, int... vectors>
MultiplySingle find_single(int64_t count, std::integer_sequence<int, vectors...>) {
  static constexpr MultiplySingle kernels[] = {multiply_single<ROWS, vectors + 1>...};
  return kernels[count - 1];
}

// Adds taps to ROWS rows of sums, at most LONGEST_SUM at a time.
template <int ROWS>
void multiply_taps(const std::vector<Tap>& taps, const Spot* spots, int64_t count,
                   const float* tile, const float* weights, const float* start, float* sums,
                   int64_t row_size) {
  using Counts = std::make_integer_sequence<int, max_vectors(SHARED)>;
  const MultiplySingle multiply = find_single<ROWS>(count, Counts());
  const int64_t all = taps.size();
  for (int64_t t = 0; (t == 0 && start) || t < all; t += LONGEST_SUM)
    multiply(taps.data() + t, std::min(LONGEST_SUM, all - t), tile, spots, weights + t * ROWS,
             t == 0 ? start : nullptr, sums, row_size);
}

// All places of a group: sums[phase][place], phases `phase_size` apart.
inline void multiply_shared(const SharedTaps& taps, const std::vector<Spot>& spots,
                            const float* tile, const float* weights, float bias, float* sums,
                            int64_t phase_size) {
  float start[SHARED];
  for (float& number : start) number = bias;
  const Parts strips(spots.size(), max_vectors(SHARED));
  for (int64_t s = 0; s < strips.count; s++) {
    const Spot* spot = spots.data() + strips.begin(s);
    multiply_taps<SHARED>(taps.common, spot, strips.size(s), tile, weights, start, sums,
                          phase_size);
    const float* rest = weights + SHARED * taps.common.size();
    for (int64_t phase = 0; phase < SHARED; phase++) {
      multiply_taps<1>(taps.rest[phase], spot, strips.size(s), tile, rest, nullptr,
                       sums + phase * phase_size, phase_size);
      rest += taps.rest[phase].size();
    }
  }
}

}  // namespace flashconv
