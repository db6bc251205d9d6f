// problem.h: forward and input gradient are one problem with its sides exchanged.
#pragma once
#include "pack.h"
#include "taps.h"

namespace flashconv {

constexpr int64_t SHARED = 4;         // places that share what they load, see shared.h
constexpr int64_t LONGEST_SUM = 256;  // products added one by one, before sums of them are added

// Reading x for y, or y for x: what is read, what is written, and how w lies between the two.
struct Problem {
  int64_t batch, groups;
  int64_t inputs, outputs;  // channels of a group, read and written
  Three read, written, kernel;
  int64_t weight_input, weight_output;  // steps in w from one channel to the next
  bool channels_last;
  std::array<Axis, 3> axes;
  int shared = -1;           // the axis that shared.h cuts into SHARED phases, or none
  int64_t kernel_step = 0;   // along it
  bool is_reversed = false;  // a gradient runs through the kernel backwards

  Layout source() const { return layout(read, groups * inputs, channels_last); }
  Layout target() const { return layout(written, groups * outputs, channels_last); }
  int64_t phases() const { return axes[0].phases * axes[1].phases * axes[2].phases; }
  int64_t weights() const { return groups * inputs * outputs * product(kernel); }
};

inline AxisLengths axis_lengths(const Convolution& c, int axis, const int64_t* read,
                                const int64_t* written) {
  return {read[axis],     written[axis],     c.kernel[axis],
          c.stride[axis], c.dilation[axis], c.padding[axis]};
}



inline Problem forward_problem(const Convolution& c) {
  Problem p;
  p.batch = c.batch;
  p.groups = c.groups;
  p.inputs = c.in_channels;
  p.outputs = c.out_channels;
  p.read = three(c.input);
  p.written = three(c.output);
  p.kernel = three(c.kernel);
  p.weight_input = product(p.kernel);
  p.weight_output = product(p.kernel) * c.in_channels;
  p.channels_last = c.channels_last;
  for (int i = 0; i < 3; i++)
    p.axes[i] = forward_axis(axis_lengths(c, i, c.input, c.output), false);
  return p;
}

inline Problem gradient_problem(const Convolution& c) {
  Problem p;
  p.batch = c.batch;
  p.groups = c.groups;
  p.inputs = c.out_channels;
  p.outputs = c.in_channels;
  p.read = three(c.output);
  p.written = three(c.input);
  p.kernel = three(c.kernel);
  p.weight_input = product(p.kernel) * c.in_channels;
  p.weight_output = product(p.kernel);
  p.channels_last = c.channels_last;
  for (int i = 0; i < 3; i++)
    p.axes[i] = gradient_axis(axis_lengths(c, i, c.output, c.input));
  return p;
}

// The first weight of a group: w is (groups * out_channels, in_channels, *kernel).
inline int64_t group_weights(const Problem& p) { return p.weights() / p.groups; }

// Halves the outermost axis that can be; rows keep some vectors. False when nothing is left to halve.
inline bool halve(Three& size) {
  constexpr int64_t shortest[] = {1, 1, 8 * WIDTH};
  for (int i = 0; i < 3; i++) {
    if (size[i] <= shortest[i]) continue;
    size[i] = divide_up(size[i], 2);
    if (i == 2) size[i] = divide_up(size[i], WIDTH) * WIDTH;
    return true;
  }
  return false;
}

inline Three count_tiles(const Three& lengths, const Three& size) {
  Three count;
  for (int i = 0; i < 3; i++) count[i] = divide_up(lengths[i], size[i]);
  return count;
}

inline Tile find_tile(int64_t index, const Three& tiles, const Three& size) {
  Tile tile;
  tile.size = size;
  for (int i = 2; i >= 0; i--) {
    tile.start[i] = index % tiles[i] * size[i];
    index /= tiles[i];
  }
  return tile;
}

// An array as the bias is used: a float for each channel, zeros where there is none.
template <class T>
std::vector<float> widen_bias(const void* bias, int64_t channels) {
  std::vector<float> result(channels);
  if (!bias) return result;
  for (int64_t c = 0; c < channels; c++) result[c] = widen(static_cast<const T*>(bias)[c]);
  return result;
}

}  // namespace flashconv
