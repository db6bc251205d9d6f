// forward.h: forward passes and input gradients of any layer.
#pragma once
#include <algorithm>
#include <optional>

#include "multiply.h"
#include "problem.h"
#include "shared.h"

namespace flashconv {

constexpr int64_t TILE_FLOATS = 48 << 10;  // of a packed tile, and of its sums: both stay in L2
constexpr int64_t CHUNK_FLOATS = 6 << 10;  // of what a block reads again and again: stays in L1
constexpr int64_t MOST_CHANNELS = 128;     // packed at a time: fewer, longer rows are read faster
constexpr int64_t MOST_SKIPPED = 21;       // taps along an axis: three axes in the bits of a number
constexpr int64_t FEW_STRIPS = 8;          // uses of a weight that are not worth packing it
constexpr int64_t PACKED_BLOCKS = 16;      // of weights: long enough to be read along
constexpr int64_t TASKS_A_THREAD = 3;      // so that threads end at about the same time

// How a problem is cut into tasks. A task is some outputs of some groups at the places of a tile.
struct Plan {
  int64_t group_block;        // groups of a task
  int64_t chunk;              // channels packed and summed at a time
  Parts blocks{1, 1};         // outputs, in blocks of registers
  int64_t blocks_a_task;
  int64_t phases_a_task;      // whole rows of phases
  Three size, tiles;
  bool is_flat;               // vectors run across rows, and what they sum between rows is dropped
  int64_t row_vectors;        // of a row, where they don't
  bool skips;                 // taps that see nothing but padding, vector by vector
  bool is_packed;             // weights; else they are read where they are
  SharedTaps shared;          // of a long kernel
  std::vector<Spot> spots;    // the vectors of a tile's places
  Taps taps;
  int64_t channel_size;       // of the packed tile
  int64_t group_tasks, block_tasks, phase_tasks;

  // Groups that share a task are stored side by side: with all of their outputs.
  bool can_split_outputs(int64_t blocks) const {
    return group_block == 1 && blocks_a_task >= blocks;
  }
  int64_t sums_size() const { return int64_t(spots.size()) * WIDTH; }  // of an output
  int64_t tasks(const Problem& p) const {
    return p.batch * group_tasks * product(tiles) * block_tasks * phase_tasks;
  }
};

// Vectors that a tile's places take when they run across rows, and when each row has its own.
inline int64_t flat_vectors(const TileShape& shape, const Three& size) {
  return divide_up(shape.position(size[0] - 1, size[1] - 1) + size[2], WIDTH);
}

inline int64_t row_vectors(const Three& size) {
  return size[0] * size[1] * divide_up(size[2], WIDTH);
}

inline int64_t count_vectors(const Problem& p, const Three& size) {
  return std::min(flat_vectors(TileShape(p.axes, size), size), row_vectors(size));
}

// How many of `count` places from `first` on see the input through a tap, and not padding.
inline int64_t count_visible(const Axis& axis, const AxisTap& tap, int64_t first, int64_t count) {
  const int64_t behind = divide_up(axis.length - axis.planes[tap.plane], axis.stride) - tap.shift;
  const int64_t begin = std::max(first, -tap.shift);
  return std::max<int64_t>(0, std::min(first + count, behind) - begin);
}

inline double visible_share(const Axis& axis) {
  if (axis.taps.empty()) return 1;
  int64_t visible = 0;
  for (const AxisTap& tap : axis.taps) visible += count_visible(axis, tap, 0, axis.places);
  return double(visible) / double(axis.taps.size() * axis.places);
}

// Whether padding makes up much of what would be multiplied, as with large dilations.
inline bool is_worth_skipping(const Problem& p) {
  double share = 1;
  for (const Axis& axis : p.axes) {
    if (axis.phases > 1 || axis.taps.size() > MOST_SKIPPED) return false;
    share *= visible_share(axis);
  }
  return share < 0.8;
}

// Groups of few channels share a task where channels lie side by side: rows are packed for all.
inline int64_t choose_group_block(const Problem& p) {
  if (!p.channels_last) return 1;
  const int64_t channels = std::max(p.inputs, p.outputs);
  return std::min(p.groups, std::max<int64_t>(1, 2 * WIDTH / channels));
}

// As many channels as keep what a block of registers reads in L1.
inline int64_t choose_chunk(const Problem& p, int64_t rows) {
  const int64_t places = max_vectors(rows) * WIDTH + p.axes[2].span;
  int64_t lines = p.axes[2].planes.size();
  for (int i = 0; i < 2; i++) lines *= std::max<int64_t>(1, p.axes[i].first[1]);
  const int64_t taps = p.axes[0].first[1] * p.axes[1].first[1] * p.axes[2].first[1];
  const int64_t by_sum = LONGEST_SUM / std::max<int64_t>(1, taps);
  const int64_t by_cache = CHUNK_FLOATS / (lines * places);
  const int64_t most = std::max<int64_t>(4, std::min({by_sum, by_cache, MOST_CHANNELS}));
  return divide_up(p.inputs, divide_up(p.inputs, most));
}

inline double count_products(const Problem& p) {
  const double products = double(p.batch) * p.groups * p.inputs * p.outputs * product(p.kernel);
  return products * product(p.written) / p.phases();
}

inline int64_t count_tasks(const Problem& p, const Plan& plan) {
  const int64_t tiles = product(count_tiles({p.axes[0].places, p.axes[1].places, p.axes[2].places},
                                            plan.size));
  return p.batch * divide_up(p.groups, plan.group_block) * tiles *
         divide_up(plan.blocks.count, plan.blocks_a_task) *
         divide_up(p.phases(), plan.phases_a_task);
}

inline bool sums_fit(const Problem& p, const Plan& plan) {
  const int64_t outputs = std::min(p.outputs, plan.blocks_a_task * MAX_ROWS) * plan.group_block;
  return plan.phases_a_task * outputs * count_vectors(p, plan.size) * WIDTH <= TILE_FLOATS;
}

// Rows of padding are not even packed where taps that see only padding are skipped.
inline bool tile_fits(const Problem& p, const Plan& plan) {
  const TileShape shape(p.axes, plan.size);
  int64_t floats = shape.floats;
  for (int i = 0; i < 2 && plan.skips; i++)
    floats = floats / shape.lengths[i] * std::min(shape.lengths[i], p.axes[i].length);
  return plan.group_block * plan.chunk * floats <= TILE_FLOATS;
}

// Fewer channels at a time where most of a tile is what surrounds its places, else smaller tiles.
inline bool shrink_tile(const Problem& p, Plan& plan) {
  const int64_t places = product(plan.size) * TileShape::planes(p.axes);
  const bool is_mostly_halo = TileShape(p.axes, plan.size).floats > 2 * places;
  if (is_mostly_halo && plan.chunk > 4 && plan.group_block == 1) {
    plan.chunk = divide_up(plan.chunk, 2);
    return true;
  }
  return halve(plan.size);
}

// Fewer phases and outputs a task where a tile is small already, else smaller tiles.
inline bool shrink_sums(const Problem& p, Plan& plan) {
  const int64_t row_of_phases = p.axes[2].phases;
  const bool is_small = count_vectors(p, plan.size) <= 4 * SUMS_IN_REGISTERS;
  if (p.shared >= 0) return halve(plan.size);
  if (is_small && plan.phases_a_task > row_of_phases) {
    plan.phases_a_task = divide_up(plan.phases_a_task / row_of_phases, 2) * row_of_phases;
    return true;
  }
  if (is_small && plan.can_split_outputs(2)) {
    plan.blocks_a_task = divide_up(plan.blocks_a_task, 2);
    return true;
  }
  return halve(plan.size);
}

inline void choose_size(const Problem& p, Plan& plan) {
  plan.size = {p.axes[0].places, p.axes[1].places, p.axes[2].places};
  plan.phases_a_task = p.phases();
  plan.blocks_a_task = plan.blocks.count;
  while (!tile_fits(p, plan) && shrink_tile(p, plan)) continue;
  while (!sums_fit(p, plan) && shrink_sums(p, plan)) continue;
}

// Smaller tiles, then fewer outputs a task, until every thread has something to do.
inline void share_among_threads(const Problem& p, Plan& plan, int64_t threads) {
  if (threads == 1 || count_products(p) < 5 * SMALL_WORK) return;
  while (count_tasks(p, plan) < TASKS_A_THREAD * threads) {
    const int64_t vectors = count_vectors(p, plan.size);
    if (vectors > 512 / WIDTH && halve(plan.size)) continue;
    if (plan.can_split_outputs(4)) {
      plan.blocks_a_task = divide_up(plan.blocks_a_task, 2);
    } else if (vectors * WIDTH <= 64 || !halve(plan.size)) {
      break;
    }
  }
}

inline void place_vectors(const Problem& p, Plan& plan) {
  const TileShape shape(p.axes, plan.size);
  const int64_t flat = flat_vectors(shape, plan.size);
  plan.is_flat = flat <= row_vectors(plan.size) && !plan.skips;
  plan.row_vectors = divide_up(plan.size[2], WIDTH);
  if (plan.is_flat) {
    for (int64_t v = 0; v < flat; v++) plan.spots.push_back({v * WIDTH, v * WIDTH});
    return;
  }
  for (int64_t d = 0; d < plan.size[0]; d++)
    for (int64_t h = 0; h < plan.size[1]; h++)
      for (int64_t v = 0; v < plan.row_vectors; v++) {
        const int64_t sum = int64_t(plan.spots.size()) * WIDTH;
        plan.spots.push_back({shape.position(d, h) + v * WIDTH, sum});
      }
}

// Packing pays where a weight is used often: few places and many weights are read as they are.
inline bool is_packing_worthwhile(const Problem& p, const Plan& plan) {
  const Parts strips(plan.spots.size(), max_vectors(plan.blocks.largest()));
  const bool reads_along_rows = p.weight_input < p.weight_output;
  return !reads_along_rows || p.batch * product(plan.tiles) * strips.count > FEW_STRIPS;
}

inline Plan make_plan(const Problem& p, int64_t threads, bool is_float32) {
  Plan plan;
  plan.group_block = choose_group_block(p);
  plan.skips = is_worth_skipping(p);
  plan.blocks = Parts(p.outputs, MAX_ROWS);
  plan.chunk = choose_chunk(p, plan.blocks.largest());
  if (plan.group_block > 1) plan.chunk = p.inputs;
  choose_size(p, plan);
  share_among_threads(p, plan, threads);
  plan.tiles = count_tiles({p.axes[0].places, p.axes[1].places, p.axes[2].places}, plan.size);
  const TileShape shape(p.axes, plan.size);
  plan.channel_size = shape.floats + WIDTH;
  plan.taps = make_taps(p.axes, shape, p.kernel);
  place_vectors(p, plan);
  plan.is_packed = !is_float32 || p.shared >= 0 || is_packing_worthwhile(p, plan);
  if (p.shared >= 0) plan.shared = share_taps(p, plan.taps);
  plan.group_tasks = divide_up(p.groups, plan.group_block);
  plan.block_tasks = divide_up(plan.blocks.count, plan.blocks_a_task);
  plan.phase_tasks = divide_up(p.phases(), plan.phases_a_task);
  return plan;
}

// ---- weights: [group][phase][block][chunk][tap][channel][row] --------------------------------------

inline int64_t packed_at(const Problem& p, const Plan& plan, int64_t group, int64_t phase,
                         int64_t block, int64_t channel) {
  const int64_t all_taps = plan.taps.all.size();
  const int64_t rows = plan.blocks.size(block);
  const int64_t before = p.inputs * plan.blocks.begin(block) + channel * rows;
  return group * all_taps * p.inputs * p.outputs +
         plan.taps.first[phase] * p.inputs * p.outputs + before * plan.taps.count(phase);
}

// One block of one chunk. Reads w in the order in which it lies: along an output's channels in
// forward passes, along a channel's outputs in gradients.
template <class T>
void pack_block(const Problem& p, const T* w, const Tap* taps, int64_t count, int64_t rows,
                int64_t channels, float* to) {
  const int64_t tap_size = channels * rows;
  for (int64_t r = 0; r < rows && p.weight_input < p.weight_output; r++)
    for (int64_t c = 0; c < channels; c++) {
      const T* from = w + r * p.weight_output + c * p.weight_input;
      float* first = to + c * rows + r;
      for (int64_t t = 0; t < count; t++) first[t * tap_size] = widen(from[taps[t].kernel]);
    }
  for (int64_t c = 0; c < channels && p.weight_input >= p.weight_output; c++)
    for (int64_t t = 0; t < count; t++) {
      const T* from = w + c * p.weight_input + taps[t].kernel;
      float* first = to + t * tap_size + c * rows;
      for (int64_t r = 0; r < rows; r++) first[r] = widen(from[r * p.weight_output]);
    }
}

// Some blocks of one phase, all of them for one chunk after the other: a gradient's blocks lie side
// by side in each channel of w.
template <class T>
void pack_blocks(const Problem& p, const Plan& plan, const T* w, int64_t group, int64_t phase,
                 int64_t first, int64_t end, float* packed) {
  for (int64_t channel = 0; channel < p.inputs; channel += plan.chunk)
    for (int64_t b = first; b < end; b++)
      pack_block(p, w + channel * p.weight_input + plan.blocks.begin(b) * p.weight_output,
                 plan.taps.begin(phase), plan.taps.count(phase), plan.blocks.size(b),
                 std::min(plan.chunk, p.inputs - channel),
                 packed + packed_at(p, plan, group, phase, b, channel));
}

template <class T>
void pack_weights(const Problem& p, const Plan& plan, const T* w, float* packed,
                  const Threads& threads) {
  if (p.shared >= 0) {
    for (int64_t g = 0; g < p.groups; g++)
      pack_shared(p, plan.shared, w + g * group_weights(p), packed + g * plan.taps.all.size());
    return;
  }
  const int64_t portions = divide_up(plan.blocks.count, PACKED_BLOCKS);
  auto pack = [&](int64_t index) {
    const int64_t group = index / portions;
    const int64_t first = index % portions * PACKED_BLOCKS;
    const int64_t end = std::min(first + PACKED_BLOCKS, plan.blocks.count);
    for (int64_t phase = 0; phase < p.phases(); phase++)
      pack_blocks(p, plan, w + group * group_weights(p), group, phase, first, end, packed);
  };
  run_in_portions(threads, p.groups * portions, 4.0 * p.weights(), pack);
}

// ---- a task --------------------------------------------------------------------------------------

struct Task {
  int64_t image, group, groups;  // the first of its groups, and how many
  int64_t block, blocks;
  int64_t phase, phases;
  Tile tile;
};

inline Task find_task(const Problem& p, const Plan& plan, int64_t index) {
  Task task;
  task.phase = index % plan.phase_tasks * plan.phases_a_task;
  task.phases = std::min(plan.phases_a_task, p.phases() - task.phase);
  index /= plan.phase_tasks;
  task.block = index % plan.block_tasks * plan.blocks_a_task;
  task.blocks = std::min(plan.blocks_a_task, plan.blocks.count - task.block);
  index /= plan.block_tasks;
  task.tile = find_tile(index % product(plan.tiles), plan.tiles, plan.size);
  index /= product(plan.tiles);
  task.group = index % plan.group_tasks * plan.group_block;
  task.groups = std::min(plan.group_block, p.groups - task.group);
  task.image = index / plan.group_tasks;
  return task;
}

inline int64_t first_output(const Plan& plan, const Task& task) {
  return plan.blocks.begin(task.block);
}

inline int64_t count_outputs(const Plan& plan, const Task& task) {
  return plan.blocks.begin(task.block + task.blocks) - plan.blocks.begin(task.block);
}

// Sums of a task: sums[phase][group][output][place].
inline float* sums_at(float* sums, const Plan& plan, const Task& task, int64_t phase,
                      int64_t group) {
  return sums + (phase * task.groups + group) * count_outputs(plan, task) * plan.sums_size();
}

// What all tasks of a call share.
struct Call {
  const Problem& problem;
  const Plan& plan;
  const float* weights;  // packed, or as they are
  const float* bias;     // of every output of every group
};

// Which products are summed: a chunk of channels, from `channel` on, of a group in one phase.
struct Part {
  int64_t group, phase;  // of the problem
  int64_t channel, channels;
};

// Vectors of places that see the same taps.
struct Strip {
  const Spot* spots;
  int64_t count;
  const Tap* taps;
  int64_t tap_count;
};

inline Weights find_weights(const Call& call, const Part& part, int64_t block) {
  const Problem& p = call.problem;
  if (call.plan.is_packed)
    return {call.weights + packed_at(p, call.plan, part.group, part.phase, block, part.channel),
            0, 0};
  const int64_t row = call.plan.blocks.begin(block) * p.weight_output;
  return {call.weights + part.group * group_weights(p) + row + part.channel * p.weight_input,
          p.weight_input, p.weight_output};
}

// All blocks of outputs at a strip, `most` taps at a time.
inline void multiply_strip(const Call& call, const Task& task, const Part& part,
                           const Strip& strip, int64_t most, const float* tile, float* sums) {
  const Plan& plan = call.plan;
  for (int64_t t = 0; t == 0 || t < strip.tap_count; t += most) {
    const Terms terms{strip.taps + t, std::min(most, strip.tap_count - t), part.channels,
                      plan.channel_size};
    for (int64_t block = task.block; block < task.block + task.blocks; block++) {
      const int64_t rows = plan.blocks.size(block);
      const int64_t output = plan.blocks.begin(block);
      const float* bias = call.bias + part.group * call.problem.outputs + output;
      const Multiply multiply = plan.is_packed ? find_multiply<true>(rows, strip.count) :
                                                 find_multiply<false>(rows, strip.count);
      multiply(terms, tile, strip.spots, find_weights(call, part, block),
               part.channel == 0 && t == 0 ? bias : nullptr,
               sums + (output - first_output(plan, task)) * plan.sums_size(), plan.sums_size());
    }
  }
}

// Places in strips as wide as registers admit. What one reads stays in L1 while all outputs are
// computed from it.
inline void multiply_part(const Call& call, const Task& task, const Part& part, const Strip& all,
                          const float* tile, float* sums) {
  const Parts strips(all.count, max_vectors(call.plan.blocks.largest()));
  const int64_t most = std::max<int64_t>(1, LONGEST_SUM / part.channels);
  for (int64_t s = 0; s < strips.count; s++) {
    const Strip strip{all.spots + strips.begin(s), strips.size(s), all.taps, all.tap_count};
    multiply_strip(call, task, part, strip, most, tile, sums);
  }
}

// ---- padding is skipped ----------------------------------------------------------------------------

// The taps of an axis, as bits, through which any of `count` places sees the input.
inline uint64_t visible_taps(const Axis& axis, int64_t place, int64_t count) {
  uint64_t visible = 0;
  for (size_t t = 0; t < axis.taps.size(); t++)
    if (count_visible(axis, axis.taps[t], place, count)) visible |= uint64_t(1) << t;
  return visible;
}

// A tile's vectors sorted by the taps that they see, and these taps.
class VisibleStrips {
 public:
  VisibleStrips(const Problem& p, const Plan& plan, const Tile& tile) {
    struct Seen { uint64_t taps; Spot spot; };
    std::vector<Seen> seen;
    const Spot* spot = plan.spots.data();
    for (int64_t d = 0; d < plan.size[0]; d++)
      for (int64_t h = 0; h < plan.size[1]; h++)
        for (int64_t v = 0; v < plan.row_vectors; v++) {
          const int64_t place = tile.start[2] + v * WIDTH;
          const int64_t count = std::clamp<int64_t>(p.axes[2].places - place, 1, WIDTH);
          const uint64_t depths = visible_taps(p.axes[0], tile.start[0] + d, 1);
          const uint64_t heights = visible_taps(p.axes[1], tile.start[1] + h, 1);
          const uint64_t widths = visible_taps(p.axes[2], place, count);
          const uint64_t taps = (depths << MOST_SKIPPED | heights) << MOST_SKIPPED | widths;
          seen.push_back({taps, *spot++});
        }
    auto sees_less = [](const Seen& a, const Seen& b) { return a.taps < b.taps; };
    std::stable_sort(seen.begin(), seen.end(), sees_less);
    for (const Seen& s : seen) spots.push_back(s.spot);
    for (size_t i = 0; i < seen.size();) {
      size_t end = i;
      while (end < seen.size() && seen[end].taps == seen[i].taps) end++;
      ranges.push_back({int64_t(i), int64_t(end - i), int64_t(taps.size()), 0});
      find_taps(p, plan, seen[i].taps);
      ranges.back().tap_count = int64_t(taps.size()) - ranges.back().tap;
      i = end;
    }
  }

  int64_t count() const { return ranges.size(); }
  Strip strip(int64_t i) const {
    const Range& range = ranges[i];
    return {spots.data() + range.spot, range.count, taps.data() + range.tap, range.tap_count};
  }

 private:
  struct Range { int64_t spot, count, tap, tap_count; };

  void find_taps(const Problem& p, const Plan& plan, uint64_t seen) {
    const int64_t heights = p.axes[1].taps.size();
    const int64_t widths = p.axes[2].taps.size();
    for (const Tap& tap : plan.taps.all) {
      const int64_t bits[] = {tap.index / widths / heights + 2 * MOST_SKIPPED,
                              tap.index / widths % heights + MOST_SKIPPED, tap.index % widths};
      const bool is_seen = (seen >> bits[0]) & (seen >> bits[1]) & (seen >> bits[2]) & 1;
      if (is_seen) taps.push_back(tap);
    }
  }

  std::vector<Spot> spots;
  std::vector<Tap> taps;
  std::vector<Range> ranges;
};

inline void multiply_all(const Call& call, const Task& task, const Part& part,
                         const VisibleStrips* visible, const float* tile, float* sums) {
  const Plan& plan = call.plan;
  if (call.problem.shared >= 0) {
    const int64_t group_weights = plan.taps.all.size();
    multiply_shared(plan.shared, plan.spots, tile, call.weights + part.group * group_weights,
                    call.bias[part.group], sums, task.groups * plan.sums_size());
    return;
  }
  if (visible) {
    for (int64_t i = 0; i < visible->count(); i++)
      multiply_part(call, task, part, visible->strip(i), tile, sums);
    return;
  }
  const Strip all{plan.spots.data(), int64_t(plan.spots.size()), plan.taps.begin(part.phase),
                  plan.taps.count(part.phase)};
  multiply_part(call, task, part, all, tile, sums);
}

// Packs and sums one chunk of channels after the other.
template <class T>
void sum_task(const Call& call, const Task& task, const T* read, float* sums) {
  const Problem& p = call.problem;
  const Plan& plan = call.plan;
  const Layout from = p.source();
  const TileShape shape(p.axes, plan.size);
  TileRows rows = find_rows(p.axes, from.step, task.tile, shape);
  rows.keeps_padding = !plan.skips;
  float* tile = scratch<float>(TILE, task.groups * plan.chunk * plan.channel_size);
  Source<T> source{read + task.image * from.image, read + p.batch * from.image, from.channel,
                   from.step};
  source.data += task.group * p.inputs * from.channel;
  std::optional<VisibleStrips> strips;
  if (plan.skips) strips.emplace(p, plan, task.tile);
  const VisibleStrips* visible = strips ? &*strips : nullptr;
  for (int64_t channel = 0; channel < p.inputs; channel += plan.chunk) {
    const int64_t channels = std::min(plan.chunk, p.inputs - channel);
    pack_channels(tile, plan.channel_size, source, task.groups * channels, rows);
    source.data += channels * from.channel;
    const int64_t phases = p.shared >= 0 ? 1 : task.phases;  // all four at once
    for (int64_t f = 0; f < phases; f++)
      for (int64_t g = 0; g < task.groups; g++)
        multiply_all(call, task, {task.group + g, task.phase + f, channel, channels}, visible,
                     tile + g * channels * plan.channel_size, sums_at(sums, plan, task, f, g));
  }
}

// ---- sums become places of the result ------------------------------------------------------------

// Rows of sums that become one row of the result: `phases` of them, in turns, for each output.
struct StoredRow {
  const float* sums;       // of the first phase and output
  int64_t phase_size, output_size;
  int64_t outputs;         // outputs side by side: those of all groups of the task
  int64_t phases, places;  // places of the longest phase
  int64_t count;           // elements of the row that are there
};

inline int64_t places_of_phase(const StoredRow& row, int64_t phase) {
  return divide_up(row.count - phase, row.phases);
}

template <class T>
void store_row_last(T* to, int64_t step, const StoredRow& row) {
  for (int64_t f = 0; f < row.phases && f < row.count; f++)
    store_turned(to + f * step, row.phases * step, row.sums + f * row.phase_size, row.output_size,
                 places_of_phase(row, f), row.outputs);
}

template <class T>
void store_row_first(T* to, int64_t channel, const StoredRow& row) {
  float* line = scratch<float>(LINE, row.phases * (row.places + WIDTH));
  for (int64_t o = 0; o < row.outputs; o++) {
    const float* sums = row.sums + o * row.output_size;
    if (row.phases > 1) interleave_phases(line, sums, row.phase_size, row.phases, row.places);
    store_row(to + o * channel, row.phases > 1 ? line : sums, row.count);
  }
}

// Where a row of a tile's sums starts.
inline int64_t sums_row(const Problem& p, const Plan& plan, int64_t depth, int64_t height) {
  if (plan.is_flat) return TileShape(p.axes, plan.size).position(depth, height);
  return (depth * plan.size[1] + height) * plan.row_vectors * WIDTH;
}

// All rows of one row of phases, which is that of `depth` and `height`, phases of these axes.
template <class T>
void store_phases(const Call& call, const Task& task, int64_t depth, int64_t height, StoredRow row,
                  T* to) {
  const Problem& p = call.problem;
  const Layout layout = p.target();
  const float* sums = row.sums;
  const int64_t width = task.tile.start[2] * row.phases;
  row.count = std::min(row.places * row.phases, p.written[2] - width);
  for (int64_t d = 0; d < task.tile.size[0]; d++)
    for (int64_t h = 0; h < task.tile.size[1]; h++) {
      const int64_t z = (task.tile.start[0] + d) * p.axes[0].phases + depth;
      const int64_t y = (task.tile.start[1] + h) * p.axes[1].phases + height;
      if (z >= p.written[0] || y >= p.written[1]) continue;
      row.sums = sums + sums_row(p, call.plan, d, h);
      T* start = to + z * layout.step[0] + y * layout.step[1] + width * layout.step[2];
      if (p.channels_last) {
        store_row_last(start, layout.step[2], row);
      } else {
        store_row_first(start, layout.channel, row);
      }
    }
}

template <class T>
void store_task(const Call& call, const Task& task, const float* sums, T* written) {
  const Problem& p = call.problem;
  const Layout layout = p.target();
  const int64_t output = task.group * p.outputs + first_output(call.plan, task);
  T* to = written + task.image * layout.image + output * layout.channel;
  StoredRow row;
  row.outputs = task.groups * count_outputs(call.plan, task);
  row.output_size = call.plan.sums_size();
  row.phase_size = row.outputs * row.output_size;
  row.phases = p.axes[2].phases;
  row.places = task.tile.size[2];
  for (int64_t f = 0; f < task.phases; f += row.phases) {
    const int64_t phase = (task.phase + f) / row.phases;
    row.sums = sums + f * row.phase_size;
    store_phases(call, task, phase / p.axes[1].phases, phase % p.axes[1].phases, row, to);
  }
}

// ---- all of it -----------------------------------------------------------------------------------

template <class T>
void convolve_dense(const Problem& p, const T* read, const T* w, const void* bias, T* written,
              const Threads& threads) {
  constexpr bool is_float32 = std::is_same_v<T, float>;
  const Plan plan = make_plan(p, threads.count, is_float32);
  const std::vector<float> start = widen_bias<T>(bias, p.groups * p.outputs);
  float* packed = nullptr;
  if (plan.is_packed) {
    packed = scratch<float>(WEIGHTS, plan.taps.all.size() * p.groups * p.inputs * p.outputs);
    pack_weights(p, plan, w, packed, threads);
  }
  const float* weights = packed;
  if constexpr (is_float32) weights = plan.is_packed ? packed : w;
  const Call call{p, plan, weights, start.data()};
  auto run = [&](int64_t index) {
    const Task task = find_task(p, plan, index);
    const int64_t outputs = task.groups * count_outputs(plan, task);
    float* sums = scratch<float>(SUMS, task.phases * outputs * plan.sums_size());
    sum_task(call, task, read, sums);
    store_task(call, task, sums, written);
  };
  run_in_portions(threads, plan.tasks(p), count_products(p), run);
}

}  // namespace flashconv
