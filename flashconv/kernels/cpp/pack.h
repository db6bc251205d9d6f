// pack.h: a tile of an array, padded with zeros and without strides, as float32; and the way back.
#pragma once
#include "scratch.h"
#include "taps.h"
#include "vector.h"

namespace flashconv {

// Steps in an array of one image: from channel to channel, and along each axis.
struct Layout {
  int64_t image, channel;
  Three step;
};

inline Layout layout(const Three& lengths, int64_t channels, bool channels_last) {
  const int64_t places = product(lengths);
  const int64_t width = channels_last ? channels : 1;
  Layout result;
  result.image = places * channels;
  result.channel = channels_last ? 1 : places;
  result.step = {width * lengths[2] * lengths[1], width * lengths[2], width};
  return result;
}

// What a tile is packed from: the first of its channels, and the end of the whole array.
template <class T>
struct Source {
  const T* data;
  const T* end;
  int64_t channel;
  Three step;
};

// One row of a packed tile: `before` zeros, `count` numbers from `source` on, zeros to the pitch.
struct Row {
  int64_t source, before, count;
};

// Which of a row's numbers are there, the same for all rows of a plane.
inline Row find_columns(const Axis& axis, int64_t step, int64_t start, int64_t pitch,
                        int64_t remainder) {
  const int64_t first = (start + axis.low) * axis.stride + remainder;
  const int64_t before = first < 0 ? divide_up(-first, axis.stride) : 0;
  const int64_t behind = divide_up(axis.length - first, axis.stride);
  const int64_t end = behind < pitch ? behind : pitch;
  return {(first + before * axis.stride) * step, before, before < end ? end - before : 0};
}

// The rows of all planes of a tile, in the order in which they are packed.
struct TileRows {
  const Row* rows;
  int64_t count, pitch, step;  // step: from a row's element to the next
  bool keeps_padding = true;   // else rows of nothing else are left as they are
};

inline Row* find_plane_rows(const std::array<Axis, 3>& axes, const Three& step, const Tile& tile,
                            const TileShape& shape, int64_t plane_depth, int64_t plane_height,
                            const Row& columns, Row* row) {
  for (int64_t d = 0; d < shape.lengths[0]; d++) {
    const int64_t depth = (tile.start[0] + d + axes[0].low) * axes[0].stride + plane_depth;
    for (int64_t h = 0; h < shape.lengths[1]; h++) {
      const int64_t height = (tile.start[1] + h + axes[1].low) * axes[1].stride + plane_height;
      const bool is_inside = depth >= 0 && depth < axes[0].length && height >= 0 &&
                             height < axes[1].length && columns.count > 0;
      const int64_t source = columns.source + depth * step[0] + height * step[1];
      *row++ = is_inside ? Row{source, columns.before, columns.count} : Row{0, shape.pitch, 0};
    }
  }
  return row;
}

inline TileRows find_rows(const std::array<Axis, 3>& axes, const Three& step, const Tile& tile,
                          const TileShape& shape) {
  const int64_t planes = TileShape::planes(axes);
  const int64_t count = planes * shape.lengths[0] * shape.lengths[1];
  Row* row = scratch<Row>(ROWS, count);
  const TileRows result{row, count, shape.pitch, axes[2].stride * step[2], true};
  for (int64_t depth : axes[0].planes)
    for (int64_t height : axes[1].planes)
      for (int64_t width : axes[2].planes) {
        const Row columns = find_columns(axes[2], step[2], tile.start[2], shape.pitch, width);
        row = find_plane_rows(axes, step, tile, shape, depth, height, columns, row);
      }
  return result;
}

// ---- rows of places: channels first --------------------------------------------------------------
// Rows are packed in the order in which they lie, so that each may write up to a vector too much:
// the next one overwrites it, and behind the last one there is room.

inline void clear_row(float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += WIDTH) store(to + i, Vector{});
}

template <class T>
inline void copy_row(float* to, const T* from, int64_t count, const T* end) {
  for (int64_t i = 0; i < count; i += WIDTH) store(to + i, load_until(from + i, end));
}

template <class T>
inline void copy_every_second(float* to, const T* from, int64_t count, const T* end) {
  for (int64_t i = 0; i < count; i += WIDTH) {
    const Vector low = load_until(from + 2 * i, end);
    const Vector high = load_until(from + 2 * i + WIDTH, end);
    store(to + i, every_second(low, high, Lanes()));
  }
}

template <class T>
inline void copy_any(float* to, const T* from, int64_t step, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = widen(from[i * step]);
}

template <class T>
inline void pack_row(float* to, const T* data, const T* end, const Row& row, const TileRows& rows) {
  if (row.count == 0 && !rows.keeps_padding) return;
  clear_row(to, row.before);
  float* middle = to + row.before;
  const T* from = data + row.source;
  if (rows.step == 1) {
    copy_row(middle, from, row.count, end);
  } else if (rows.step == 2) {
    copy_every_second(middle, from, row.count, end);
  } else {
    copy_any(middle, from, rows.step, row.count);
  }
  const int64_t filled = row.before + row.count;
  clear_row(to + filled, rows.pitch - filled);
}

// ---- rows of places out of rows of channels: channels last ---------------------------------------

// WIDTH places of WIDTH channels, transposed in registers.
template <class T>
inline void turn_block(float* to, int64_t channel_size, const T* from, int64_t step, const T* end,
                       int64_t places, int64_t channels) {
  Vector block[WIDTH];
  FLASHCONV_UNROLL
  for (int i = 0; i < WIDTH; i++)
    block[i] = i < places ? load_until(from + i * step, end) : Vector{};
  transpose(block);
  FLASHCONV_UNROLL
  for (int i = 0; i < WIDTH; i++)
    if (i < channels) store(to + i * channel_size, block[i]);
}

template <class T>
inline void turn_row(float* to, int64_t channel_size, const T* from, int64_t step, const T* end,
                     int64_t places, int64_t channels) {
  for (int64_t i = 0; i < places; i += WIDTH)
    for (int64_t c = 0; c < channels; c += WIDTH)
      turn_block(to + c * channel_size + i, channel_size, from + i * step + c, step, end,
                 places - i, channels - c);
}

// ---- a tile --------------------------------------------------------------------------------------

// to[channel][plane][depth][height][width], channels `channel_size` apart.
template <class T>
void pack_channels(float* to, int64_t channel_size, const Source<T>& source, int64_t channels,
                   const TileRows& rows) {
  if (source.channel != 1 || channels == 1) {
    for (int64_t c = 0; c < channels; c++)
      for (int64_t r = 0; r < rows.count; r++)
        pack_row(to + c * channel_size + r * rows.pitch, source.data + c * source.channel,
                 source.end, rows.rows[r], rows);
    return;
  }
  for (int64_t r = 0; r < rows.count; r++) {
    const Row& row = rows.rows[r];
    if (row.count == 0 && !rows.keeps_padding) continue;
    float* start = to + r * rows.pitch;
    const int64_t filled = row.before + row.count;
    for (int64_t c = 0; c < channels && row.before > 0; c++)
      clear_row(start + c * channel_size, row.before);
    turn_row(start + row.before, channel_size, source.data + row.source, rows.step, source.end,
             row.count, channels);
    for (int64_t c = 0; c < channels && filled < rows.pitch; c++)
      clear_row(start + c * channel_size + filled, rows.pitch - filled);
  }
}

// to[plane][depth][height][width][channel], for arrays with channels last: places are `place_size`
// apart, of which the first `channels` are filled, up to a whole vector with anything.
template <class T>
void pack_places(float* to, int64_t place_size, const Source<T>& source, int64_t channels,
                 const TileRows& rows) {
  for (int64_t r = 0; r < rows.count; r++) {
    const Row& row = rows.rows[r];
    float* place = to + r * rows.pitch * place_size;
    float* first = place + row.before * place_size;
    float* behind = first + row.count * place_size;
    float* end = place + rows.pitch * place_size;
    const T* from = source.data + row.source;
    for (; place < first; place += place_size) clear_row(place, channels);
    for (; place < behind; place += place_size, from += rows.step)
      copy_row(place, from, channels, source.end);
    for (; place < end; place += place_size) clear_row(place, channels);
  }
}

// ---- the way back: sums become rows of an array, and nothing else is written -----------------------

template <class T>
inline void store_row(T* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store(to + i, load(from + i));
  if (i == count) return;
  if (count >= WIDTH) {
    store(to + count - WIDTH, load(from + count - WIDTH));  // overlaps what is there already
  } else {
    store_part(to, load(from), count);
  }
}

template <class T>
inline void store_turned_block(T* to, int64_t step, const float* from, int64_t row_size,
                               int64_t places, int64_t channels) {
  Vector block[WIDTH];
  FLASHCONV_UNROLL
  for (int i = 0; i < WIDTH; i++)
    block[i] = i < channels ? load(from + i * row_size) : Vector{};
  transpose(block);
  FLASHCONV_UNROLL
  for (int i = 0; i < WIDTH; i++) {
    if (i >= places) continue;
    if (channels >= WIDTH) {
      store(to + i * step, block[i]);
    } else {
      store_part(to + i * step, block[i], channels);
    }
  }
}

// `channels` rows of `places` sums each, `row_size` apart, become places of channels, `step` apart.
template <class T>
inline void store_turned(T* to, int64_t step, const float* from, int64_t row_size, int64_t places,
                         int64_t channels) {
  for (int64_t c = 0; c < channels; c += WIDTH) {
    const bool overlaps = channels - c < WIDTH && channels > WIDTH;
    const int64_t start = overlaps ? channels - WIDTH : c;
    for (int64_t i = 0; i < places; i += WIDTH)
      store_turned_block(to + i * step + start, step, from + start * row_size + i, row_size,
                         places - i, channels - start);
  }
}

// Elements of a and b in turns.
inline void zip(float* to, Vector a, Vector b) {
  store(to, interleave<0>(a, b, Lanes()));
  store(to + WIDTH, interleave<1>(a, b, Lanes()));
}

// Phases in turns: element q * phases + f is place q of phase f, whose row is f * row_size away.
inline void interleave_phases(float* to, const float* sums, int64_t row_size, int64_t phases,
                              int64_t places) {
  if (phases != 2 && phases != 4) {
    store_turned(to, phases, sums, row_size, places, phases);
    return;
  }
  for (int64_t i = 0; i < places; i += WIDTH) {
    Vector row[4];
    for (int f = 0; f < phases; f++) row[f] = load(sums + f * row_size + i);
    float* here = to + i * phases;
    if (phases == 2) {
      zip(here, row[0], row[1]);
      continue;
    }
    zip(here, interleave<0>(row[0], row[2], Lanes()), interleave<0>(row[1], row[3], Lanes()));
    zip(here + 2 * WIDTH, interleave<1>(row[0], row[2], Lanes()),
        interleave<1>(row[1], row[3], Lanes()));
  }
}

}  // namespace flashconv
