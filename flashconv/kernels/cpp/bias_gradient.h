// bias_gradient.h: the sum of y over images and places, for each channel.
#pragma once
#include <algorithm>
#include <vector>

#include "pack.h"

namespace flashconv {

// Sums of a block are float32, lane by lane, and sums of blocks are float64: no error grows with
// the number of terms. Blocks and parts depend on sizes alone, never on the number of threads.
constexpr int64_t BLOCK_TERMS = 256;        // that a lane adds
constexpr int64_t PIECE = 1 << 16;          // numbers worth a task
constexpr int64_t MOST_PARTS = 64;

// The sum of neighbours: four vectors at a time, since an addition takes four cycles.
template <class T>
double sum_run(const T* from, int64_t count) {
  constexpr int64_t block = 4 * WIDTH * BLOCK_TERMS;
  double total = 0;
  for (int64_t start = 0; start < count; start += block) {
    const int64_t end = std::min(count, start + block);
    Vector sums[4] = {};
    int64_t i = start;
    for (; i + 4 * WIDTH <= end; i += 4 * WIDTH) {
      FLASHCONV_UNROLL
      for (int v = 0; v < 4; v++) sums[v] += load(from + i + v * WIDTH);
    }
    for (; i < end; i += WIDTH)
      sums[0] += end - i >= WIDTH ? load(from + i) : load_part(from + i, end - i);
    total += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return total;
}

// VECTORS * WIDTH neighbouring channels over some places, `channels` apart.
template <int VECTORS, class T>
void sum_columns(const T* from, int64_t places, int64_t channels, const T* end, double* totals,
                 int64_t count) {
  for (int64_t start = 0; start < places; start += BLOCK_TERMS) {
    Vector sums[VECTORS] = {};
    const int64_t stop = std::min(places, start + BLOCK_TERMS);
    for (int64_t i = start; i < stop; i++) {
      FLASHCONV_UNROLL
      for (int v = 0; v < VECTORS; v++)
        sums[v] += load_until(from + i * channels + v * WIDTH, end);
    }
    for (int64_t c = 0; c < count; c++) totals[c] += sums[c / WIDTH][c % WIDTH];
  }
}

// Parts of each channel, added in their order and rounded once.
template <class T>
void finish_bias(const std::vector<double>& totals, int64_t channels, int64_t parts,
                 int64_t channel_step, int64_t part_step, T* result) {
  for (int64_t c = 0; c < channels; c++) {
    double total = 0;
    for (int64_t part = 0; part < parts; part++)
      total += totals[c * channel_step + part * part_step];
    store_part(result + c, Vector{} + float(total), 1);
  }
}

template <class T>
void bias_gradient_first(const Convolution& c, const T* y, T* result, const Threads& threads) {
  const int64_t channels = c.groups * c.out_channels;
  const int64_t places = product(three(c.output));
  const int64_t pieces = divide_up(places, PIECE);
  const int64_t units = c.batch * pieces;  // of a channel: a piece of an image each
  const int64_t parts = std::min(units, std::max<int64_t>(1, MOST_PARTS / channels));
  std::vector<double> totals(channels * parts);
  auto run = [&](int64_t index) {
    const int64_t channel = index / parts;
    const int64_t part = index % parts;
    for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; unit++) {
      const int64_t start = unit % pieces * PIECE;
      const T* from = y + (unit / pieces * channels + channel) * places + start;
      totals[index] += sum_run(from, std::min(PIECE, places - start));
    }
  };
  run_in_portions(threads, channels * parts, double(channels) * c.batch * places, run);
  finish_bias(totals, channels, parts, parts, 1, result);
}

template <class T>
void bias_gradient_last(const Convolution& c, const T* y, T* result, const Threads& threads) {
  const int64_t channels = c.groups * c.out_channels;
  const int64_t places = c.batch * product(three(c.output));
  const int64_t parts = std::clamp<int64_t>(places * channels / PIECE, 1, MOST_PARTS);
  const T* end = y + places * channels;
  std::vector<double> totals(channels * parts);
  auto run = [&](int64_t part) {
    const int64_t first = places * part / parts;
    const int64_t count = places * (part + 1) / parts - first;
    double* sums = totals.data() + part * channels;
    int64_t channel = 0;
    const T* from = y + first * channels;
    for (; channel + 4 * WIDTH <= channels; channel += 4 * WIDTH)
      sum_columns<4>(from + channel, count, channels, end, sums + channel, 4 * WIDTH);
    for (; channel < channels; channel += WIDTH)
      sum_columns<1>(from + channel, count, channels, end, sums + channel,
                     std::min<int64_t>(WIDTH, channels - channel));
  };
  run_in_portions(threads, parts, double(places) * channels, run);
  finish_bias(totals, channels, parts, 1, channels, result);
}

template <class T>
void bias_gradient(const Convolution& c, const T* y, T* result, const Threads& threads) {
  if (c.channels_last) {
    bias_gradient_last(c, y, result, threads);
  } else {
    bias_gradient_first(c, y, result, threads);
  }
}

}  // namespace flashconv
