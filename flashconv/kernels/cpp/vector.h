// vector.h: one register full of float32 numbers, and how it meets memory of three element types.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__F16C__)
#include <immintrin.h>
#endif

// GCC keeps an array of vectors in registers only where every loop over it is unrolled.
#if defined(__clang__)
#define FLASHCONV_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FLASHCONV_UNROLL _Pragma("GCC unroll 16")
#endif

namespace flashconv {

#if defined(FLASHCONV_WIDTH)
constexpr int WIDTH = FLASHCONV_WIDTH;
#elif defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

// What arrays of 16-bit numbers hold. Nothing is computed in them: load widens, store rounds.
struct Float16 { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

template <class To, class From>
inline To reinterpret(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same bits under another type");
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

// ---- float32 -------------------------------------------------------------------------------------

inline Vector load(const float* from) {
  Vector value;
  memcpy(&value, from, sizeof value);  // one unaligned load
  return value;
}

inline void store(float* to, Vector value) { memcpy(to, &value, sizeof value); }

// ---- bfloat16: the upper half of a float32 -------------------------------------------------------

inline Vector load(const BFloat16* from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  return reinterpret<Vector>(__builtin_convertvector(halves, Bits) << 16);
}

// Adding just under half of the last kept bit rounds to the nearest, ties to even; the carry may
// run up to infinity, as it should. A NaN is kept a NaN, quiet.
inline void store(BFloat16* to, Vector value) {
  const Bits bits = reinterpret<Bits>(value);
  const Bits is_nan = reinterpret<Bits>(value != value);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits quiet = (bits >> 16) | 0x40;
  const Halves halves = __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), Halves);
  memcpy(to, &halves, sizeof halves);
}

// ---- float16: converted by an instruction where there is one -------------------------------------

#if defined(__F16C__) && defined(__AVX512F__)

// maskz with all lanes is the plain instruction, without GCC 12's warning about the plain one.
inline Vector load(const Float16* from) {
  return reinterpret<Vector>(_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256((const __m256i*)from)));
}

inline void store(Float16* to, Vector value) {
  const __m512 wide = reinterpret<__m512>(value);
  _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtps_ph(-1, wide, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__F16C__) && defined(__AVX2__) && !defined(FLASHCONV_WIDTH)

inline Vector load(const Float16* from) {
  return reinterpret<Vector>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)));
}

inline void store(Float16* to, Vector value) {
  const __m256 wide = reinterpret<__m256>(value);
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
}

#else

inline Bits choose(Bits condition, Bits yes, Bits no) { return (condition & yes) | (~condition & no); }

// Exponent and fraction move 13 places up; a product with 2^112 then mends the exponent's bias, and
// normalizes the smallest numbers on the way.
inline Vector load(const Float16* from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  const Bits bits = __builtin_convertvector(halves, Bits);
  const Bits magnitude = (bits & 0x7fff) << 13;
  const Vector scaled = reinterpret<Vector>(magnitude) * 0x1p112f;
  const Bits is_special = reinterpret<Bits>((bits & 0x7fff) >= 0x7c00);
  const Bits special = magnitude | 0x7f800000;
  const Bits result = choose(is_special, special, reinterpret<Bits>(scaled));
  return reinterpret<Vector>(result | ((bits & 0x8000) << 16));
}

// Three cases: too large (infinity or NaN), below float16's smallest normal number (an addition
// of 0.5 makes the processor round at the right bit), and all others (round half to even by hand).
inline void store(Float16* to, Vector value) {
  const Bits bits = reinterpret<Bits>(value);
  const Bits magnitude = bits & 0x7fffffff;
  const Bits is_nan = reinterpret<Bits>(magnitude > 0x7f800000);
  const Bits large = choose(is_nan, Bits{} + 0x7e00, Bits{} + 0x7c00);
  const Bits small = reinterpret<Bits>(reinterpret<Vector>(magnitude) + 0.5f) - 0x3f000000;
  const Bits odd = (magnitude >> 13) & 1;
  const Bits normal = (magnitude - 0x38000000 + 0xfff + odd) >> 13;
  const Bits finite = choose(reinterpret<Bits>(magnitude < 0x38800000), small, normal);
  const Bits result = choose(reinterpret<Bits>(magnitude >= 0x47800000), large, finite);
  const Halves halves = __builtin_convertvector(result | ((bits >> 16) & 0x8000), Halves);
  memcpy(to, &halves, sizeof halves);
}

#endif

// ---- the ends of arrays --------------------------------------------------------------------------

// The first `count` lanes from memory, zeros in the others: nothing behind them is touched.
template <class T>
inline Vector load_part(const T* from, int64_t count) {
  T part[WIDTH] = {};
  for (int64_t i = 0; i < count; i++) part[i] = from[i];
  return load(part);
}

template <class T>
inline void store_part(T* to, Vector value, int64_t count) {
  T part[WIDTH];
  store(part, value);
  for (int64_t i = 0; i < count; i++) to[i] = part[i];
}

// A whole vector where the array is long enough, whatever its last lanes are; `end` is its end.
template <class T>
inline Vector load_until(const T* from, const T* end) {
  if (end - from >= WIDTH) return load(from);
  return load_part(from, end - from > 0 ? end - from : 0);
}

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) { return reinterpret<float>(uint32_t(value.bits) << 16); }

inline float widen(Float16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  return load_part(&value, 1)[0];
#endif
}

// ---- lanes change places -------------------------------------------------------------------------

// Lane i of the result is lane index[i] of the two vectors side by side.
template <int... index>
inline Vector shuffle(Vector a, Vector b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index...);
#else
  return __builtin_shuffle(a, b, Integers{index...});
#endif
}

using Lanes = std::make_integer_sequence<int, WIDTH>;

// Numbers 0, 2, 4, ... of 2 * WIDTH neighbours.
template <int... i>
inline Vector every_second(Vector a, Vector b, std::integer_sequence<int, i...>) {
  return shuffle<2 * i...>(a, b);
}

// a0 b0 a1 b1 ...: the lower half of the lanes, then the upper.
template <int half, int... i>
inline Vector interleave(Vector a, Vector b, std::integer_sequence<int, i...>) {
  return shuffle<(half * WIDTH / 2 + i / 2 + (i & 1) * WIDTH)...>(a, b);
}

template <int distance, int... i>
inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, i...>) {
  const Vector first = shuffle<((i & distance) ? WIDTH + (i ^ distance) : i)...>(a, b);
  const Vector second = shuffle<((i & distance) ? WIDTH + i : (i | distance))...>(a, b);
  a = first;
  b = second;
}

// WIDTH vectors become their transpose: blocks of half the width change places, then quarters, ...
template <int distance = WIDTH / 2>
inline __attribute__((always_inline)) void transpose(Vector* rows) {
  FLASHCONV_UNROLL
  for (int i = 0; i < WIDTH; i++)
    if (!(i & distance)) exchange<distance>(rows[i], rows[i | distance], Lanes());
  if constexpr (distance > 1) transpose<distance / 2>(rows);
}

// The sum of a vector's lanes, pairwise.
inline float sum(Vector value) {
  float lanes[WIDTH];
  store(lanes, value);
  for (int half = WIDTH / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

}  // namespace flashconv
