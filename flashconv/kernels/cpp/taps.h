// taps.h: where a kernel's taps reach, axis by axis, once strides are taken out of the places.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "conv.h"

namespace flashconv {

using Three = std::array<int64_t, 3>;  // along depth, height and width

inline Three three(const int64_t* lengths) { return {lengths[0], lengths[1], lengths[2]}; }

inline int64_t product(const Three& lengths) { return lengths[0] * lengths[1] * lengths[2]; }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t divide_down(int64_t a, int64_t b) {  // towards minus infinity, where / goes to zero
  const int64_t quotient = a / b;
  return quotient - (a % b < 0);
}

struct AxisTap {
  int64_t kernel;  // which of the kernel's elements
  int64_t shift;   // how many places away its input lies,
  int64_t plane;   // in which of the planes in use
};

// An axis of what is read and what is written. Place q of phase r is written at q * phases + r; it
// reads, for each tap of that phase, (q + shift) * stride + planes[plane]. So from place to place
// every tap moves by one element of its plane: strides are gone.
//   forward:        phases = 1, stride = the layer's; a plane for each remainder that taps fall on
//   input gradient: phases = the layer's stride, stride = 1; a phase's taps are those that fit it
struct Axis {
  int64_t phases, stride;
  int64_t length;                // of what is read
  int64_t places;                // of the longest phase
  int64_t low, span;             // shifts lie in low ... low + span
  std::vector<AxisTap> taps;     // of all phases, one after the other
  std::vector<int64_t> first;    // phase r has taps first[r] ... first[r + 1] - 1
  std::vector<int64_t> planes;   // remainders in use
};

struct AxisLengths {
  int64_t read, written, kernel, stride, dilation, padding;
};

inline int64_t plane_of(Axis& axis, int64_t remainder) {
  const int64_t count = axis.planes.size();
  for (int64_t i = 0; i < count; i++)
    if (axis.planes[i] == remainder) return i;
  axis.planes.push_back(remainder);
  return count;
}

// Whether any place sees the input through this tap, or all of them only padding.
inline bool sees_input(const Axis& axis, int64_t shift, int64_t remainder) {
  const int64_t from = shift * axis.stride + remainder;
  const int64_t to = (axis.places - 1 + shift) * axis.stride + remainder;
  return to >= 0 && from < axis.length;
}

inline void find_span(Axis& axis) {
  if (axis.planes.empty()) axis.planes.push_back(0);
  if (axis.taps.empty()) return;
  int64_t low = axis.taps[0].shift;
  int64_t high = low;
  for (const AxisTap& tap : axis.taps) {
    low = tap.shift < low ? tap.shift : low;
    high = tap.shift > high ? tap.shift : high;
  }
  axis.low = low;
  axis.span = high - low;
}

// Reading x for y. `all` keeps taps that see nothing but padding: a weight gradient wants them.
inline Axis forward_axis(const AxisLengths& a, bool all) {
  Axis axis{1, a.stride, a.read, a.written, 0, 0, {}, {0}, {}};
  axis.taps.reserve(a.kernel);
  for (int64_t k = 0; k < a.kernel; k++) {
    const int64_t reach = k * a.dilation - a.padding;
    const int64_t shift = divide_down(reach, a.stride);
    const int64_t remainder = reach - shift * a.stride;
    if (!all && !sees_input(axis, shift, remainder)) continue;
    axis.taps.push_back({k, shift, plane_of(axis, remainder)});
  }
  axis.first.push_back(axis.taps.size());
  find_span(axis);
  return axis;
}

// Reading y for x: element k of y's place i went to x's place i * stride + k * dilation - padding.
inline Axis gradient_axis(const AxisLengths& a) {
  Axis axis{a.stride, 1, a.read, divide_up(a.written, a.stride), 0, 0, {}, {0}, {}};
  std::vector<std::vector<AxisTap>> phases(a.stride);
  for (int64_t k = 0; k < a.kernel; k++) {
    const int64_t reach = k * a.dilation - a.padding;
    const int64_t shift = -divide_down(reach, a.stride);
    const int64_t phase = reach + shift * a.stride;
    if (sees_input(axis, shift, 0)) phases[phase].push_back({k, shift, plane_of(axis, 0)});
  }
  for (const std::vector<AxisTap>& taps : phases) {
    axis.taps.insert(axis.taps.end(), taps.begin(), taps.end());
    axis.first.push_back(axis.taps.size());
  }
  find_span(axis);
  return axis;
}

// A box of places, and the padded input around it.
struct Tile {
  Three start, size;
};

// The shape of a packed tile: planes of rows, each row `pitch` long. Then a tap is one number: how
// far from a place's own position its input lies.
struct TileShape {
  Three lengths;   // of a plane
  int64_t pitch, plane, floats;

  TileShape(const std::array<Axis, 3>& axes, const Three& size) {
    for (int i = 0; i < 3; i++) lengths[i] = size[i] + axes[i].span;
    pitch = lengths[2];
    plane = product(lengths);
    floats = plane * planes(axes);
  }

  static int64_t planes(const std::array<Axis, 3>& axes) {
    return axes[0].planes.size() * axes[1].planes.size() * axes[2].planes.size();
  }

  int64_t position(int64_t depth, int64_t height) const {
    return (depth * lengths[1] + height) * pitch;
  }
};

struct Tap {
  int64_t kernel;  // offset in the kernel
  int64_t offset;  // in the tile
  int64_t index;   // among the taps of its phase
};

inline Tap make_tap(const std::array<Axis, 3>& axes, const TileShape& shape, const Three& kernel,
                    const AxisTap& d, const AxisTap& h, const AxisTap& w) {
  const int64_t heights = axes[1].planes.size();
  const int64_t widths = axes[2].planes.size();
  const int64_t plane = (d.plane * heights + h.plane) * widths + w.plane;
  const int64_t position = shape.position(d.shift - axes[0].low, h.shift - axes[1].low);
  Tap tap;
  tap.kernel = (d.kernel * kernel[1] + h.kernel) * kernel[2] + w.kernel;
  tap.offset = plane * shape.plane + position + w.shift - axes[2].low;
  tap.index = 0;
  return tap;
}

// All phases of the three axes, the last axis running fastest: taps[f] are those of phase f.
struct Taps {
  std::vector<Tap> all;
  std::vector<int64_t> first;

  int64_t count(int64_t phase) const { return first[phase + 1] - first[phase]; }
  const Tap* begin(int64_t phase) const { return all.data() + first[phase]; }
};

inline Taps make_taps(const std::array<Axis, 3>& axes, const TileShape& shape, const Three& kernel) {
  Taps taps;
  taps.first.push_back(0);
  for (int64_t d = 0; d < axes[0].phases; d++)
    for (int64_t h = 0; h < axes[1].phases; h++)
      for (int64_t w = 0; w < axes[2].phases; w++) {
        for (int64_t i = axes[0].first[d]; i < axes[0].first[d + 1]; i++)
          for (int64_t j = axes[1].first[h]; j < axes[1].first[h + 1]; j++)
            for (int64_t k = axes[2].first[w]; k < axes[2].first[w + 1]; k++)
              taps.all.push_back(make_tap(axes, shape, kernel, axes[0].taps[i], axes[1].taps[j],
                                          axes[2].taps[k]));
        const int64_t count = taps.all.size();
        for (int64_t t = taps.first.back(); t < count; t++)
          taps.all[t].index = t - taps.first.back();
        taps.first.push_back(count);
      }
  return taps;
}

}  // namespace flashconv
