// weight_gradient.h: x and y become the gradient of w, whose sums run over images and places.
#pragma once
#include <algorithm>

#include "depthwise.h"
#include "gradient_kernels.h"
#include "problem.h"

namespace flashconv {

constexpr int64_t GRADIENT_TILE = 48 << 10;   // floats of packed x, and of packed y
constexpr int64_t GRADIENT_SUMS = 64 << 10;   // floats of a task's sums
constexpr int64_t LONGEST_RUN = 192;          // products that a register adds
constexpr int64_t MOST_ADDED = 64;            // such sums that a float32 adds; a float64 adds those
constexpr int64_t ENOUGH_TASKS = 16;          // fixed: sums are the same on any number of threads
constexpr double WORTH_A_TASK = 1e6;          // products

constexpr int64_t WORTH_PACKING_Y = 256;      // weights of an output that a task has, since it packs y
constexpr int64_t MOST_GROUPS = 16;           // of small images in a task

// What neighbouring lanes of a vector are.
enum Lane { OF_OUTPUTS, OF_PLACES, OF_GROUPS };

// How a gradient is cut into tasks. A task is a block of weights, summed over a part of the tiles.
struct GradientPlan {
  int64_t batch, groups, channels, outputs;  // of a group
  bool channels_last;
  Three read, written, kernel;
  std::array<Axis, 3> axes;
  std::array<Axis, 3> output_axes;  // y as it is
  Lane lane;
  int64_t group_block, channel_block, output_block;
  Three size, tiles;
  int64_t parts;  // of all tiles of all images, each summed on its own

  int64_t taps() const { return product(kernel); }
  int64_t weights() const { return groups * outputs * channels * taps(); }
  int64_t units() const { return batch * product(tiles); }
  int64_t blocks() const {
    return divide_up(groups, group_block) * divide_up(channels, channel_block) *
           divide_up(outputs, output_block);
  }
  double products() const { return double(weights()) * batch * product(written); }
  // Floats of y at one place, and of the sums of one weight's channel and tap.
  int64_t output_size() const { return divide_up(output_block, WIDTH) * WIDTH; }
  int64_t block_sums() const {
    const int64_t rows = channel_block * taps();
    if (lane == OF_GROUPS) return rows * PLACE;
    return group_block * rows * (lane == OF_PLACES ? output_block * WIDTH : output_size());
  }
  int64_t row_size() const { return divide_up(size[2], WIDTH) * WIDTH; }
  int64_t packed_outputs() const {
    const int64_t rows = size[0] * size[1];
    if (lane == OF_GROUPS) return rows * size[2] * PLACE;
    if (lane == OF_PLACES) return group_block * output_block * (rows * row_size() + WIDTH);
    return group_block * rows * size[2] * output_size();
  }
};

inline Lane choose_lane(const GradientPlan& plan) {
  const bool is_depthwise = plan.channels == 1 && plan.outputs == 1;
  const bool has_vectors = plan.channels_last && plan.groups >= WIDTH;
  if (is_depthwise && has_vectors && plan.taps() <= 256) return OF_GROUPS;
  return plan.outputs <= FEW_OUTPUTS ? OF_PLACES : OF_OUTPUTS;
}

// Groups share a task where channels lie side by side, or where there is little to do in one.
inline int64_t choose_groups(const GradientPlan& plan) {
  if (plan.lane == OF_GROUPS) return PLACE;
  int64_t most = 2 * WIDTH / std::max(plan.channels, plan.outputs);
  if (!plan.channels_last) {
    const int64_t weights = plan.channels * plan.outputs * plan.taps();
    most = std::min(2 * LONGEST_RUN * WIDTH / product(plan.written), GRADIENT_SUMS / 64 / weights);
    most = std::min(most, MOST_GROUPS);
  }
  return std::min(plan.groups, std::max<int64_t>(1, most));
}

inline void choose_blocks(GradientPlan& plan) {
  const int64_t least = plan.lane == OF_PLACES ? 1 : WIDTH;
  plan.group_block = choose_groups(plan);
  plan.channel_block = plan.channels;
  plan.output_block = std::min<int64_t>(plan.outputs, 16 * WIDTH);
  if (plan.group_block > 1) return;
  while (plan.block_sums() > GRADIENT_SUMS && plan.channel_block > 1)
    plan.channel_block = divide_up(plan.channel_block, 2);
  while (plan.block_sums() > GRADIENT_SUMS && plan.output_block > least)
    plan.output_block = divide_up(divide_up(plan.output_block, 2), least) * least;
  auto is_short_of_tasks = [&] {
    return plan.blocks() < ENOUGH_TASKS && plan.products() / plan.blocks() > WORTH_A_TASK;
  };
  while (is_short_of_tasks() && plan.channel_block * plan.taps() >= 2 * WORTH_PACKING_Y &&
         plan.channel_block > 1)
    plan.channel_block = divide_up(plan.channel_block, 2);
}

inline void choose_tiles(GradientPlan& plan) {
  plan.size = plan.written;
  auto fits = [&] {
    const int64_t channels = plan.group_block * plan.channel_block;
    const int64_t packed = channels * TileShape(plan.axes, plan.size).floats;
    return packed <= GRADIENT_TILE && plan.packed_outputs() <= GRADIENT_TILE;
  };
  while (!fits() && halve(plan.size)) continue;
  plan.tiles = count_tiles(plan.written, plan.size);
}

// Where there are few weights, tiles are summed in parts. Their number depends on sizes alone.
inline void choose_parts(GradientPlan& plan) {
  const int64_t by_tasks = ENOUGH_TASKS / plan.blocks();
  const int64_t by_memory = 4 * GRADIENT_SUMS / plan.weights();
  const int64_t by_work = int64_t(plan.products() / plan.blocks() / WORTH_A_TASK);
  const int64_t parts = std::min(std::min(by_tasks, by_memory), std::min(by_work, plan.units()));
  plan.parts = std::max<int64_t>(1, parts);
}

inline GradientPlan gradient_plan(const Convolution& c) {
  GradientPlan plan;
  plan.batch = c.batch;
  plan.groups = c.groups;
  plan.channels = c.in_channels;
  plan.outputs = c.out_channels;
  plan.channels_last = c.channels_last;
  plan.read = three(c.input);
  plan.written = three(c.output);
  plan.kernel = three(c.kernel);
  for (int i = 0; i < 3; i++)
    plan.axes[i] = forward_axis(axis_lengths(c, i, c.input, c.output), true);
  for (int i = 0; i < 3; i++)
    plan.output_axes[i] = forward_axis({c.output[i], c.output[i], 1, 1, 1, 0}, true);
  plan.lane = choose_lane(plan);
  choose_blocks(plan);
  choose_tiles(plan);
  choose_parts(plan);
  return plan;
}

// ---- a task --------------------------------------------------------------------------------------

struct GradientTask {
  int64_t group, groups, channel, channels, output, outputs;
  int64_t part;

  int64_t rows(const GradientPlan& plan) const { return channels * plan.taps(); }
  // Floats of y at one place.
  int64_t output_size() const { return divide_up(outputs, WIDTH) * WIDTH; }
};

inline GradientTask find_gradient_task(const GradientPlan& plan, int64_t index) {
  GradientTask task;
  task.part = index % plan.parts;
  index /= plan.parts;
  const int64_t output_blocks = divide_up(plan.outputs, plan.output_block);
  task.output = index % output_blocks * plan.output_block;
  task.outputs = std::min(plan.output_block, plan.outputs - task.output);
  index /= output_blocks;
  const int64_t channel_blocks = divide_up(plan.channels, plan.channel_block);
  task.channel = index % channel_blocks * plan.channel_block;
  task.channels = std::min(plan.channel_block, plan.channels - task.channel);
  index /= channel_blocks;
  task.group = index * plan.group_block;
  task.groups = std::min(plan.group_block, plan.groups - task.group);
  return task;
}

// A tile's places that are there: tiles at the end may be smaller.
inline Three clip(const GradientPlan& plan, const Tile& tile) {
  Three size;
  for (int i = 0; i < 3; i++) size[i] = std::min(tile.size[i], plan.written[i] - tile.start[i]);
  return size;
}

template <class T>
Source<T> task_source(const T* data, const Layout& from, int64_t batch, int64_t image,
                      int64_t channel) {
  return {data + image * from.image + channel * from.channel, data + batch * from.image,
          from.channel, from.step};
}

template <class T>
const float* pack_input(const GradientPlan& plan, const GradientTask& task, const T* x,
                        int64_t image, const Tile& tile, int64_t channel_size) {
  const Layout from = layout(plan.read, plan.groups * plan.channels, plan.channels_last);
  const TileShape shape(plan.axes, plan.size);
  const int64_t channels = task.groups * task.channels;
  const int64_t first = task.group * plan.channels + task.channel;
  const TileRows rows = find_rows(plan.axes, from.step, tile, shape);
  if (plan.lane == OF_GROUPS) {
    float* places = scratch<float>(TILE, PLACE * channel_size);
    pack_places(places, PLACE, task_source(x, from, plan.batch, image, first), channels, rows);
    return places;
  }
  float* packed = scratch<float>(TILE, channels * channel_size);
  pack_channels(packed, channel_size, task_source(x, from, plan.batch, image, first), channels,
                rows);
  return packed;
}

template <class T>
const T* row_of(const T* data, const Three& step, const Tile& tile, int64_t depth, int64_t height) {
  return data + (tile.start[0] + depth) * step[0] + (tile.start[1] + height) * step[1] +
         tile.start[2] * step[2];
}

// to[group][place][output], outputs filled up to whole vectors with anything.
template <class T>
const float* pack_outputs(const GradientPlan& plan, const GradientTask& task, const T* y,
                          int64_t image, const Tile& tile, const Three& size) {
  const Layout from = layout(plan.written, plan.groups * plan.outputs, plan.channels_last);
  const int64_t output_size = task.output_size();
  float* packed = scratch<float>(SECOND_TILE, task.groups * product(size) * output_size);
  float* to = packed;
  for (int64_t g = 0; g < task.groups; g++) {
    const int64_t channel = (task.group + g) * plan.outputs + task.output;
    const Source<T> source = task_source(y, from, plan.batch, image, channel);
    for (int64_t r = 0; r < size[0] * size[1]; r++, to += size[2] * output_size) {
      const T* row = row_of(source.data, from.step, tile, r / size[1], r % size[1]);
      for (int64_t i = 0; i < size[2] && plan.channels_last; i++)
        copy_row(to + i * output_size, row + i * from.step[2], task.outputs, source.end);
      if (!plan.channels_last)
        turn_row(to, output_size, row, from.channel, source.end, task.outputs, size[2]);
    }
  }
  return packed;
}

// to[place][group], places PLACE apart.
template <class T>
const float* pack_output_groups(const GradientPlan& plan, const GradientTask& task, const T* y,
                                int64_t image, const Tile& tile, const Three& size) {
  const Layout from = layout(plan.written, plan.groups, true);
  const Source<T> source = task_source(y, from, plan.batch, image, task.group);
  float* packed = scratch<float>(SECOND_TILE, product(size) * PLACE);
  float* to = packed;
  for (int64_t r = 0; r < size[0] * size[1]; r++) {
    const T* row = row_of(source.data, from.step, tile, r / size[1], r % size[1]);
    for (int64_t i = 0; i < size[2]; i++, to += PLACE)
      copy_row(to, row + i * from.step[2], task.groups, source.end);
  }
  return packed;
}

// to[group][output][row], rows filled up to whole vectors with zeros.
template <class T>
const float* pack_output_rows(const GradientPlan& plan, const GradientTask& task, const T* y,
                              int64_t image, const Tile& tile, const Three& size) {
  const Layout from = layout(plan.written, plan.groups * plan.outputs, plan.channels_last);
  const std::array<Axis, 3>& axes = plan.output_axes;
  const Tile filled{tile.start, {size[0], size[1], plan.row_size()}};
  const TileShape shape(axes, filled.size);
  const int64_t outputs = task.groups * task.outputs;
  const int64_t first = task.group * plan.outputs + task.output;
  const TileRows rows = find_rows(axes, from.step, filled, shape);
  float* packed = scratch<float>(SECOND_TILE, outputs * (shape.floats + WIDTH));
  pack_channels(packed, shape.floats + WIDTH, task_source(y, from, plan.batch, image, first),
                outputs, rows);
  return packed;
}

// ---- sums of sums --------------------------------------------------------------------------------

// Sums in float32 that are emptied into float64 before they hold too many terms.
class Sums {
 public:
  Sums(int64_t count, int64_t lanes) : count(count), lanes(lanes) {
    sums = scratch<float>(SUMS, count * lanes);
    std::fill(sums, sums + count * lanes, 0.0f);
  }

  // Room for `terms` more.
  void expect(int64_t terms) {
    if (added + terms > MOST_ADDED && added > 0) empty();
    added += terms;
  }

  float* data() { return sums; }

  // One float32 for each sum, in the place of its lanes.
  const float* finish() {
    if (totals) {
      empty();
      for (int64_t i = 0; i < count; i++) sums[i] = float(totals[i]);
    } else if (lanes > 1) {
      for (int64_t i = 0; i < count; i++) sums[i] = sum(load(sums + i * lanes));
    }
    return sums;
  }

 private:
  void empty() {
    if (!totals) {
      totals = scratch<double>(TOTALS, count);
      std::fill(totals, totals + count, 0.0);
    }
    for (int64_t i = 0; i < count; i++)
      totals[i] += lanes > 1 ? sum(load(sums + i * lanes)) : sums[i];
    std::fill(sums, sums + count * lanes, 0.0f);
    added = 0;
  }

  int64_t count, lanes;
  int64_t added = 0;
  float* sums;
  double* totals = nullptr;
};

// ---- sums over a tile ----------------------------------------------------------------------------

// Where the inputs of each weight of a group lie in the packed tile: [channel][tap].
inline void find_offsets(const GradientPlan& plan, const Taps& taps, int64_t channels,
                         std::vector<int64_t>& offsets) {
  const int64_t channel_size = TileShape(plan.axes, plan.size).floats + WIDTH;
  const int64_t place_size = plan.lane == OF_GROUPS ? PLACE : 1;
  offsets.reserve(channels * plan.taps());
  for (int64_t c = 0; c < channels; c++)
    for (const Tap& tap : taps.all) offsets.push_back(c * channel_size + tap.offset * place_size);
}

inline void find_place_rows(const TileShape& shape, const Three& size,
                            std::vector<int64_t>& rows) {
  rows.clear();
  for (int64_t d = 0; d < size[0]; d++)
    for (int64_t h = 0; h < size[1]; h++) rows.push_back(shape.position(d, h));
}

// All weights and outputs for one run of places.
inline void add_outer(const Places& places, const float* x, const std::vector<int64_t>& offsets,
                      const float* y, int64_t output_size, float* sums) {
  const Parts vectors(output_size / WIDTH, MOST_OUTPUT_VECTORS);
  for (int64_t v = 0; v < vectors.count; v++) {
    const int64_t output = vectors.begin(v) * WIDTH;
    const Parts blocks(offsets.size(), max_weight_rows(vectors.size(v)));
    for (int64_t b = 0; b < blocks.count; b++) {
      const int64_t row = blocks.begin(b);
      find_outer(blocks.size(b), vectors.size(v))(places, x, offsets.data() + row, y + output,
                                                  output_size, sums + row * output_size + output,
                                                  output_size);
    }
  }
}

// Runs of at most LONGEST_RUN places: some rows, or a piece of one.
struct Runs {
  int64_t rows, rows_a_run, length, most;

  Runs(const Three& size, int64_t longest)
      : rows(size[0] * size[1]),
        rows_a_run(std::max<int64_t>(1, longest / size[2])),
        length(size[2]),
        most(std::min(longest, size[2])) {}
  int64_t count() const { return divide_up(rows, rows_a_run) * divide_up(length, most); }
};

inline void add_tile_outer(const Runs& runs, const std::vector<int64_t>& rows, const float* x,
                           const std::vector<int64_t>& offsets, const float* y,
                           int64_t output_size, float* sums) {
  for (int64_t row = 0; row < runs.rows; row += runs.rows_a_run)
    for (int64_t start = 0; start < runs.length; start += runs.most) {
      const Places places{rows.data() + row, std::min(runs.rows_a_run, runs.rows - row),
                          std::min(runs.most, runs.length - start)};
      const float* from = y + (row * runs.length + start) * output_size;
      add_outer(places, x + start, offsets, from, output_size, sums);
    }
}

inline void add_dots(const Places& places, const float* x, const std::vector<int64_t>& offsets,
                     const float* y, int64_t y_size, int64_t outputs, float* sums) {
  const Parts blocks(offsets.size(), max_columns(outputs));
  for (int64_t b = 0; b < blocks.count; b++)
    find_dots(outputs, blocks.size(b))(places, x, offsets.data() + blocks.begin(b), y, y_size,
                                       sums + blocks.begin(b) * WIDTH, offsets.size());
}

inline void add_tile_dots(const Runs& runs, const std::vector<int64_t>& rows, const float* x,
                          const std::vector<int64_t>& offsets, const float* y, int64_t row_size,
                          int64_t y_size, int64_t outputs, float* sums) {
  for (int64_t row = 0; row < runs.rows; row += runs.rows_a_run)
    for (int64_t start = 0; start < runs.length; start += runs.most) {
      const Places places{rows.data() + row, std::min(runs.rows_a_run, runs.rows - row),
                          std::min(runs.most, runs.length - start)};
      add_dots(places, x + start, offsets, y + row * row_size + start, y_size, outputs, sums);
    }
}

// Vectors of groups, each with all of its taps.
inline void add_tile_groups(const Runs& runs, const std::vector<int64_t>& rows, const float* x,
                            const std::vector<int64_t>& offsets, const float* y, int64_t groups,
                            float* sums) {
  const Parts parts(offsets.size(), MOST_TAPS);
  for (int64_t row = 0; row < runs.rows; row += runs.rows_a_run)
    for (int64_t start = 0; start < runs.length; start += runs.most) {
      const Places places{rows.data() + row, std::min(runs.rows_a_run, runs.rows - row),
                          std::min(runs.most, runs.length - start)};
      const float* from = y + (row * runs.length + start) * PLACE;
      for (int64_t g = 0; g < groups; g += WIDTH)
        for (int64_t i = 0; i < parts.count; i++)
          find_groups(parts.size(i))(places, x + start * PLACE + g, offsets.data() + parts.begin(i),
                                     from + g, sums + parts.begin(i) * PLACE + g);
    }
}

// ---- all tiles of a task -------------------------------------------------------------------------

template <class T>
void add_tile(const GradientPlan& plan, const GradientTask& task, const T* x, const T* y,
              int64_t unit, const std::vector<int64_t>& offsets, std::vector<int64_t>& rows,
              Sums& sums) {
  const TileShape shape(plan.axes, plan.size);
  const int64_t channel_size = shape.floats + WIDTH;
  const int64_t image = unit / product(plan.tiles);
  const Tile tile = find_tile(unit % product(plan.tiles), plan.tiles, plan.size);
  const Three size = clip(plan, tile);
  const Runs runs(size, plan.lane == OF_PLACES ? LONGEST_RUN * WIDTH : LONGEST_RUN);
  find_place_rows(shape, size, rows);
  sums.expect(runs.count());
  const float* input = pack_input(plan, task, x, image, tile, channel_size);
  if (plan.lane == OF_GROUPS) {
    const float* output = pack_output_groups(plan, task, y, image, tile, size);
    add_tile_groups(runs, rows, input, offsets, output, task.groups, sums.data());
    return;
  }
  const bool is_outer = plan.lane == OF_OUTPUTS;
  const float* output = is_outer ? pack_outputs(plan, task, y, image, tile, size) :
                                   pack_output_rows(plan, task, y, image, tile, size);
  const int64_t y_size = size[0] * size[1] * plan.row_size() + WIDTH;
  const int64_t group_size = is_outer ? product(size) * task.output_size() : task.outputs * y_size;
  const int64_t sums_size = is_outer ? task.output_size() : task.outputs * WIDTH;
  for (int64_t g = 0; g < task.groups; g++) {
    const float* x_g = input + g * task.channels * channel_size;
    const float* y_g = output + g * group_size;
    float* sums_g = sums.data() + g * task.rows(plan) * sums_size;
    if (is_outer) {
      add_tile_outer(runs, rows, x_g, offsets, y_g, task.output_size(), sums_g);
    } else {
      add_tile_dots(runs, rows, x_g, offsets, y_g, plan.row_size(), y_size, task.outputs, sums_g);
    }
  }
}

// A task's sums where they belong in w: [group][output][channel][tap].
template <class T>
void store_gradient(const GradientPlan& plan, const GradientTask& task, const float* sums, T* w) {
  const int64_t rows = task.rows(plan);
  const int64_t step = plan.channels * plan.taps();
  if (plan.lane == OF_GROUPS) {
    store_turned(w + task.group * step, step, sums, PLACE, task.groups, rows);
    return;
  }
  for (int64_t g = 0; g < task.groups; g++) {
    T* to = w + ((task.group + g) * plan.outputs + task.output) * step +
            task.channel * plan.taps();
    if (plan.lane == OF_PLACES) {
      for (int64_t o = 0; o < task.outputs; o++)
        store_row(to + o * step, sums + (g * task.outputs + o) * rows, rows);
    } else {
      store_turned(to, step, sums + g * rows * task.output_size(), task.output_size(),
                   task.outputs, rows);
    }
  }
}

template <class T, class Result>
void run_gradient_task(const GradientPlan& plan, const GradientTask& task, const Taps& taps,
                       const T* x, const T* y, Result* w) {
  const int64_t lanes = plan.lane == OF_PLACES ? WIDTH : 1;
  const int64_t outputs = plan.lane == OF_PLACES ? task.outputs : task.output_size();
  const int64_t count = task.rows(plan) * (plan.lane == OF_GROUPS ? PLACE : task.groups * outputs);
  Sums sums(count, lanes);
  std::vector<int64_t> offsets, rows;
  find_offsets(plan, taps, task.channels, offsets);
  const int64_t end = plan.units() * (task.part + 1) / plan.parts;
  for (int64_t unit = plan.units() * task.part / plan.parts; unit < end; unit++)
    add_tile(plan, task, x, y, unit, offsets, rows, sums);
  store_gradient(plan, task, sums.finish(), w);
}

// Parts are added in their order, whoever computed them.
template <class T>
void add_parts(const GradientPlan& plan, const float* parts, T* w) {
  const int64_t count = plan.weights();
  float line[WIDTH];
  for (int64_t i = 0; i < count; i += WIDTH) {
    const int64_t lanes = std::min<int64_t>(WIDTH, count - i);
    for (int64_t j = 0; j < lanes; j++) {
      double total = 0;
      for (int64_t part = 0; part < plan.parts; part++) total += parts[part * count + i + j];
      line[j] = float(total);
    }
    store_row(w + i, line, lanes);
  }
}

template <class T>
void weight_gradient(const Convolution& c, const T* x, const T* y, T* w, const Threads& threads) {
  const GradientPlan plan = gradient_plan(c);
  const Taps taps = make_taps(plan.axes, TileShape(plan.axes, plan.size), plan.kernel);
  const bool has_parts = plan.parts > 1;
  float* parts = has_parts ? scratch<float>(WEIGHTS, plan.parts * plan.weights()) : nullptr;
  auto run = [&](int64_t index) {
    const GradientTask task = find_gradient_task(plan, index);
    if (parts) {
      run_gradient_task(plan, task, taps, x, y, parts + task.part * plan.weights());
    } else {
      run_gradient_task(plan, task, taps, x, y, w);
    }
  };
  run_in_portions(threads, plan.blocks() * plan.parts, plan.products(), run);
  if (parts) add_parts(plan, parts, w);
}

}  // namespace flashconv
