// kernels.cpp: the one function that is called from outside, compiled with all of the others.
#include "bias_gradient.h"
#include "depthwise.h"
#include "forward.h"
#include "weight_gradient.h"

namespace flashconv {

inline Problem find_problem(const Convolution& c) {
  Problem p = c.kind == FORWARD ? forward_problem(c) : gradient_problem(c);
  share_long_axis(p, c);
  return p;
}

template <class T>
void convolve(const Problem& p, const T* read, const T* w, const void* bias, T* written,
              const Threads& threads) {
  if (is_depthwise(p)) {
    depthwise(p, read, w, bias, written, threads);
  } else {
    convolve_dense(p, read, w, bias, written, threads);
  }
}

template <class T>
void run(const Convolution& c, const void* first, const void* second, const void* bias,
         void* result, const Threads& threads) {
  const T* a = static_cast<const T*>(first);
  const T* b = static_cast<const T*>(second);
  T* to = static_cast<T*>(result);
  if (c.kind == FORWARD) convolve(find_problem(c), a, b, bias, to, threads);
  if (c.kind == INPUT_GRADIENT) convolve(find_problem(c), b, a, bias, to, threads);
  if (c.kind == WEIGHT_GRADIENT) weight_gradient(c, a, b, to, threads);
  if (c.kind == BIAS_GRADIENT) bias_gradient(c, a, to, threads);
}

}  // namespace flashconv

extern "C" __attribute__((visibility("default"))) int flashconv_run(
    const flashconv::Convolution* convolution, const void* first, const void* second,
    const void* bias, void* result, const flashconv::Threads* threads) {
  using namespace flashconv;
  try {
    switch (convolution->dtype) {
      case FLOAT32: run<float>(*convolution, first, second, bias, result, *threads); break;
      case FLOAT16: run<Float16>(*convolution, first, second, bias, result, *threads); break;
      case BFLOAT16: run<BFloat16>(*convolution, first, second, bias, result, *threads); break;
    }
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
