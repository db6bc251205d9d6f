// conv.h: what the glue (sees MLX) and the kernels (plain C++17, no MLX headers) agree on.
#pragma once
#include <cstdint>

namespace flashconv {

// The number sum(y * conv(x, w)) is linear in x, in w and in y; each kind is its derivative by one of them.
enum Kind : int32_t { FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, BIAS_GRADIENT };
enum Dtype : int32_t { FLOAT32, FLOAT16, BFLOAT16 };

struct Convolution {
  int32_t kind, dtype;
  int32_t channels_last;              // x and y are (N, *spatial, C) instead of (N, C, *spatial); w is always PyTorch's
  int64_t batch, groups;
  int64_t in_channels, out_channels;  // of one group: x has groups * in_channels, y has groups * out_channels
  int64_t input[3], kernel[3], output[3];      // lengths along depth, height, width; 1 for leading axes that are not there
  int64_t stride[3], dilation[3], padding[3];  // padding before the first input only; what lies after follows from output
};

struct Threads {
  int64_t count;
  void (*run)(int64_t jobs, void (*job)(void* state, int64_t index), void* state);  // returns when all jobs are done
};

}  // namespace flashconv

// FORWARD:         first = x, second = w, bias = (groups * out_channels,) or null, result = y
// INPUT_GRADIENT:  first = w, second = y, bias = (groups * in_channels,) or null, result = x   (= transposed convolution, called forward)
// WEIGHT_GRADIENT: first = x, second = y, bias null, result = w
// BIAS_GRADIENT:   first = y, second null, bias null, result = (groups * out_channels,): sums over batch and places
// All arrays contiguous, of `dtype`; sums in float32 (bias gradient: without drift for a million terms), rounded once.
// Returns 0, or 1 when memory ran out (nothing is thrown across this border).
extern "C" int flashconv_run(const flashconv::Convolution*, const void* first, const void* second,
                             const void* bias, void* result, const flashconv::Threads*);
