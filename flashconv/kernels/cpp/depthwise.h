// depthwise.h: layers with one channel in and out of each group, which have little to compute and
// much to move: results go straight to where they belong.
#pragma once
#include <algorithm>

#include "multiply.h"
#include "problem.h"

namespace flashconv {

constexpr int64_t DEPTHWISE_TILE = 32 << 10;  // floats of a packed tile
constexpr int64_t MOST_CHANNELS_A_TASK = 16;

inline bool is_depthwise(const Problem& p) {
  return p.inputs == 1 && p.outputs == 1 && p.shared < 0;
}

// What both layouts share: tiles, taps and weights as [group][tap of all phases].
struct DepthwisePlan {
  Three size, tiles;
  Taps taps;
};

inline DepthwisePlan depthwise_plan(const Problem& p, int64_t channels) {
  DepthwisePlan plan;
  plan.size = {p.axes[0].places, p.axes[1].places, p.axes[2].places};
  while (TileShape(p.axes, plan.size).floats * channels > DEPTHWISE_TILE && halve(plan.size))
    continue;
  plan.tiles = count_tiles({p.axes[0].places, p.axes[1].places, p.axes[2].places}, plan.size);
  plan.taps = make_taps(p.axes, TileShape(p.axes, plan.size), p.kernel);
  return plan;
}

inline double depthwise_products(const Problem& p) {
  const double outputs = double(p.batch) * p.groups * product(p.written);
  return outputs * product(p.kernel) / p.phases() + outputs;
}

// ---- channels first: vectors of places -------------------------------------------------------------

constexpr int MOST_ROW_VECTORS = 12;
constexpr int most_rows(int vectors) { return vectors < 2 ? 8 : MOST_ROW_VECTORS / vectors; }

// Rows of a tile, `pitch` apart, and of what they become.
struct RowsOfPlaces {
  const float* tile;
  int64_t pitch;
  float* to;
  int64_t to_pitch;
  int64_t width;
};

// ROWS rows of VECTORS vectors; a row's last vector overlaps the one before it.
template <int ROWS, int VECTORS>
void depthwise_rows(const RowsOfPlaces& rows, const Tap* taps, int64_t count, const float* weights,
                    float start) {
  Vector sums[ROWS][VECTORS];
  const int64_t last = VECTORS > 1 ? rows.width - WIDTH : 0;
  FLASHCONV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    FLASHCONV_UNROLL
    for (int v = 0; v < VECTORS; v++) sums[r][v] = Vector{} + start;
  }
  for (int64_t t = 0; t < count; t++) {
    const float* from = rows.tile + taps[t].offset;
    FLASHCONV_UNROLL
    for (int r = 0; r < ROWS; r++) {
      FLASHCONV_UNROLL
      for (int v = 0; v < VECTORS; v++) {
        const int64_t place = v < VECTORS - 1 ? v * WIDTH : last;
        sums[r][v] += load(from + r * rows.pitch + place) * weights[t];
      }
    }
  }
  FLASHCONV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    FLASHCONV_UNROLL
    for (int v = 0; v < VECTORS; v++) {
      float* to = rows.to + r * rows.to_pitch + (v < VECTORS - 1 ? v * WIDTH : last);
      if (VECTORS == 1 && rows.width < WIDTH) {
        store_part(to, sums[r][v], rows.width);
      } else {
        store(to, sums[r][v]);
      }
    }
  }
}

using DepthwiseRows = void (*)(const RowsOfPlaces&, const Tap*, int64_t, const float*, float);

template <int VECTORS, int... rows>
DepthwiseRows find_depthwise(int64_t count, std::integer_sequence<int, rows...>) {
  static constexpr DepthwiseRows kernels[] = {depthwise_rows<rows + 1, VECTORS>...};
  return kernels[count - 1];
}

template <int VECTORS = 1>
DepthwiseRows find_depthwise(int64_t rows, int64_t vectors) {
  if constexpr (VECTORS <= MOST_ROW_VECTORS) {
    using Counts = std::make_integer_sequence<int, most_rows(VECTORS)>;
    return vectors == VECTORS ? find_depthwise<VECTORS>(rows, Counts()) :
                                find_depthwise<VECTORS + 1>(rows, vectors);
  } else {
    return nullptr;  // no block has more vectors
  }
}

// All rows of one depth of a tile.
inline void depthwise_plane(RowsOfPlaces rows, int64_t count, const Tap* taps, int64_t tap_count,
                            const float* weights, float start) {
  const Parts columns(divide_up(rows.width, WIDTH), MOST_ROW_VECTORS);
  const RowsOfPlaces all = rows;
  for (int64_t c = 0; c < columns.count; c++) {
    const int64_t first = columns.begin(c) * WIDTH;
    rows.width = std::min(columns.size(c) * WIDTH, all.width - first);
    const bool is_short = rows.width < WIDTH && all.width >= WIDTH;
    const int64_t place = is_short ? all.width - WIDTH : first;
    if (is_short) rows.width = WIDTH;
    const Parts blocks(count, most_rows(columns.size(c)));
    for (int64_t b = 0; b < blocks.count; b++) {
      rows.tile = all.tile + blocks.begin(b) * all.pitch + place;
      rows.to = all.to + blocks.begin(b) * all.to_pitch + place;
      find_depthwise(blocks.size(b), columns.size(c))(rows, taps, tap_count, weights, start);
    }
  }
}

// Rows that are not there, or not float32, or written in turns, are summed elsewhere first.
template <class T>
void depthwise_channel(const Problem& p, const DepthwisePlan& plan, const Tile& tile,
                       const float* packed, const float* weights, float start, T* to) {
  const Layout layout = p.target();
  const TileShape shape(p.axes, plan.size);
  const int64_t phases = p.axes[2].phases;
  const int64_t places = std::min(plan.size[2], p.axes[2].places - tile.start[2]);
  const int64_t width = std::min(places * phases, p.written[2] - tile.start[2] * phases);
  const int64_t line_size = divide_up(plan.size[2], WIDTH) * WIDTH;
  const bool is_direct = phases == 1 && std::is_same_v<T, float>;
  float* lines = scratch<float>(SUMS, phases * plan.size[1] * line_size);
  float* line = scratch<float>(LINE, phases * (line_size + WIDTH));
  for (int64_t f = 0; f < p.axes[0].phases * p.axes[1].phases; f++)
    for (int64_t d = 0; d < plan.size[0]; d++) {
      const int64_t z = (tile.start[0] + d) * p.axes[0].phases + f / p.axes[1].phases;
      const int64_t y = tile.start[1] * p.axes[1].phases + f % p.axes[1].phases;
      if (z >= p.written[0] || y >= p.written[1]) continue;
      const int64_t all = divide_up(p.written[1] - y, p.axes[1].phases);
      const int64_t count = std::min(plan.size[1], all);
      T* row = to + z * layout.step[0] + y * layout.step[1] + tile.start[2] * phases;
      const int64_t row_step = layout.step[1] * p.axes[1].phases;
      for (int64_t w = 0; w < phases; w++) {
        const int64_t phase = f * phases + w;
        RowsOfPlaces rows{packed + shape.position(d, 0), shape.pitch,
                          lines + w * plan.size[1] * line_size, line_size, places};
        if constexpr (std::is_same_v<T, float>)
          if (is_direct) rows.to = row, rows.to_pitch = row_step;
        depthwise_plane(rows, count, plan.taps.begin(phase), plan.taps.count(phase),
                        weights + plan.taps.first[phase], start);
      }
      for (int64_t h = 0; h < count && !is_direct; h++) {
        const float* sums = lines + h * line_size;
        if (phases > 1) interleave_phases(line, sums, plan.size[1] * line_size, phases, places);
        store_row(row + h * row_step, phases > 1 ? line : sums, width);
      }
    }
}

template <class T>
void depthwise_first(const Problem& p, const T* read, const T* w, const void* bias, T* written,
                     const Threads& threads) {
  const DepthwisePlan plan = depthwise_plan(p, 1);
  const Layout from = p.source();
  const Layout to = p.target();
  const TileShape shape(p.axes, plan.size);
  const std::vector<float> start = widen_bias<T>(bias, p.groups);
  const int64_t taps = plan.taps.all.size();
  const int64_t all = p.groups * p.batch * product(plan.tiles);
  const int64_t block = std::clamp<int64_t>(all / (8 * threads.count), 1, MOST_CHANNELS_A_TASK);
  const int64_t blocks = divide_up(p.groups, block);
  auto run = [&](int64_t index) {
    const int64_t image = index / blocks / product(plan.tiles);
    const Tile tile = find_tile(index / blocks % product(plan.tiles), plan.tiles, plan.size);
    const TileRows rows = find_rows(p.axes, from.step, tile, shape);
    float* packed = scratch<float>(TILE, shape.floats + WIDTH);
    float* weights = scratch<float>(SECOND_TILE, taps);
    const int64_t first = index % blocks * block;
    for (int64_t c = first; c < std::min(first + block, p.groups); c++) {
      const Source<T> source{read + image * from.image + c * from.channel,
                             read + p.batch * from.image, from.channel, from.step};
      pack_channels(packed, shape.floats + WIDTH, source, 1, rows);
      const T* w_c = w + c * product(p.kernel);
      for (int64_t t = 0; t < taps; t++) weights[t] = widen(w_c[plan.taps.all[t].kernel]);
      depthwise_channel(p, plan, tile, packed, weights, start[c],
                        written + image * to.image + c * to.channel);
    }
  };
  run_in_portions(threads, p.batch * product(plan.tiles) * blocks, depthwise_products(p), run);
}

// ---- channels last: vectors of channels --------------------------------------------------------------

constexpr int64_t PLACE = 32;     // floats of a packed place: two lines of the cache
constexpr int MOST_PLACES = 8;    // of one vector each, in registers

// COUNT neighbouring places of one vector of channels. taps' offsets count places.
template <int COUNT, class T>
void depthwise_places(const float* tile, const Tap* taps, int64_t tap_count, const float* weights,
                      const float* start, T* to, int64_t step, int64_t channels) {
  Vector sums[COUNT];
  FLASHCONV_UNROLL
  for (int i = 0; i < COUNT; i++) sums[i] = load(start);
  for (int64_t t = 0; t < tap_count; t++) {
    const float* from = tile + taps[t].offset * PLACE;
    const Vector weight = load(weights + t * PLACE);
    FLASHCONV_UNROLL
    for (int i = 0; i < COUNT; i++) sums[i] += load(from + i * PLACE) * weight;
  }
  FLASHCONV_UNROLL
  for (int i = 0; i < COUNT; i++) {
    if (channels >= WIDTH) {
      store(to + i * step, sums[i]);
    } else {
      store_part(to + i * step, sums[i], channels);
    }
  }
}

template <class T>
using DepthwisePlaces = void (*)(const float*, const Tap*, int64_t, const float*, const float*, T*,
                                 int64_t, int64_t);

template <class T, int... counts>
DepthwisePlaces<T> find_places(int64_t count, std::integer_sequence<int, counts...>) {
  static constexpr DepthwisePlaces<T> kernels[] = {depthwise_places<counts + 1, T>...};
  return kernels[count - 1];
}

// One row of one phase.
template <class T>
void depthwise_row(const float* tile, const Tap* taps, int64_t tap_count, const float* weights,
                   const float* start, T* to, int64_t step, int64_t places, int64_t channels) {
  using Counts = std::make_integer_sequence<int, MOST_PLACES>;
  const Parts parts(places, MOST_PLACES);
  for (int64_t c = 0; c < channels; c += WIDTH)
    for (int64_t i = 0; i < parts.count; i++)
      find_places<T>(parts.size(i), Counts())(tile + parts.begin(i) * PLACE + c, taps, tap_count,
                                              weights + c, start + c, to + parts.begin(i) * step + c,
                                              step, channels - c);
}

// A block of channels of one tile: all phases of all rows.
template <class T>
void depthwise_block(const Problem& p, const DepthwisePlan& plan, const Tile& tile,
                     const float* packed, const float* weights, const float* start, T* to,
                     int64_t channels) {
  const Layout layout = p.target();
  const TileShape shape(p.axes, plan.size);
  const Axis* axes = p.axes.data();
  for (int64_t phase = 0; phase < p.phases(); phase++) {
    const int64_t w = phase % axes[2].phases;
    const int64_t x = tile.start[2] * axes[2].phases + w;
    const int64_t left = x < p.written[2] ? divide_up(p.written[2] - x, axes[2].phases) : 0;
    const int64_t places = std::min(plan.size[2], left);
    for (int64_t d = 0; d < plan.size[0]; d++)
      for (int64_t h = 0; h < plan.size[1]; h++) {
        const int64_t row_phase = phase / axes[2].phases;
        const int64_t z = (tile.start[0] + d) * axes[0].phases + row_phase / axes[1].phases;
        const int64_t y = (tile.start[1] + h) * axes[1].phases + row_phase % axes[1].phases;
        if (z >= p.written[0] || y >= p.written[1] || places == 0) continue;
        T* row = to + z * layout.step[0] + y * layout.step[1] + x * layout.step[2];
        depthwise_row(packed + shape.position(d, h) * PLACE, plan.taps.begin(phase),
                      plan.taps.count(phase), weights + plan.taps.first[phase] * PLACE, start, row,
                      axes[2].phases * layout.step[2], places, channels);
      }
  }
}

// to[block of channels][tap of all phases][channel].
template <class T>
void pack_depthwise_weights(const Problem& p, const Taps& taps, const T* w, float* to) {
  const int64_t blocks = divide_up(p.groups, PLACE);
  const int64_t count = taps.all.size();
  std::fill(to, to + blocks * count * PLACE, 0.0f);
  for (int64_t c = 0; c < p.groups; c++)
    for (int64_t t = 0; t < count; t++)
      to[(c / PLACE * count + t) * PLACE + c % PLACE] =
          widen(w[c * product(p.kernel) + taps.all[t].kernel]);
}

template <class T>
void depthwise_last(const Problem& p, const T* read, const T* w, const void* bias, T* written,
                    const Threads& threads) {
  const DepthwisePlan plan = depthwise_plan(p, PLACE);
  const Layout from = p.source();
  const Layout to = p.target();
  const TileShape shape(p.axes, plan.size);
  const int64_t blocks = divide_up(p.groups, PLACE);
  const int64_t taps = plan.taps.all.size();
  std::vector<float> start = widen_bias<T>(bias, p.groups);
  start.resize(blocks * PLACE);
  float* weights = scratch<float>(WEIGHTS, blocks * taps * PLACE);
  pack_depthwise_weights(p, plan.taps, w, weights);
  auto run = [&](int64_t index) {
    const int64_t block = index % blocks;
    const int64_t channels = std::min(PLACE, p.groups - block * PLACE);
    const Tile tile = find_tile(index / blocks % product(plan.tiles), plan.tiles, plan.size);
    const int64_t image = index / blocks / product(plan.tiles);
    const TileRows rows = find_rows(p.axes, from.step, tile, shape);
    float* packed = scratch<float>(TILE, shape.floats * PLACE);
    const Source<T> source{read + image * from.image + block * PLACE,
                           read + p.batch * from.image, from.channel, from.step};
    pack_places(packed, PLACE, source, channels, rows);
    depthwise_block(p, plan, tile, packed, weights + block * taps * PLACE,
                    start.data() + block * PLACE, written + image * to.image + block * PLACE,
                    channels);
  };
  run_in_portions(threads, p.batch * product(plan.tiles) * blocks, depthwise_products(p), run);
}

template <class T>
void depthwise(const Problem& p, const T* read, const T* w, const void* bias, T* written,
               const Threads& threads) {
  if (p.channels_last) {
    depthwise_last(p, read, w, bias, written, threads);
  } else {
    depthwise_first(p, read, w, bias, written, threads);
  }
}

}  // namespace flashconv
