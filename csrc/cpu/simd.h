// Vectors for one instruction set. The including isa_*.cpp defines FLASHX_ISA (a namespace),
// FLASHX_VECTOR_BYTES and FLASHX_REGISTERS; nothing else differs between instruction sets but what the
// compiler makes of the flags. Element-wise operators are the compiler's vector extensions; multiply-adds
// contract to FMA (-ffp-contract=fast).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/problem.h"

namespace flashx::FLASHX_ISA {

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FLASHX_VECTOR_BYTES)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;

// Elements of T in a vector register.
template <typename T>
constexpr int kLanes = FLASHX_VECTOR_BYTES / sizeof(T);

// The integer as wide as T: comparisons of Vec<T> give vectors of it, all ones where true.
template <typename T>
using IntOf = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <typename T>
using Mask = Vec<IntOf<T>>;

template <typename T>
FLASHX_CORE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
FLASHX_CORE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <typename T>
FLASHX_CORE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();

template <typename To, typename From>
FLASHX_CORE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// a > b ? a : b, so b where either is NaN.
template <typename V>
FLASHX_CORE V max(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (std::is_same_v<V, Vec<double>>) return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm256_max_ps((__m256)a, (__m256)b);
  if constexpr (std::is_same_v<V, Vec<double>>) return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
#endif
  return a > b ? a : b;
}

template <typename M>
FLASHX_CORE bool any(M mask) {
  uint64_t words[FLASHX_VECTOR_BYTES / 8];
  std::memcpy(words, &mask, sizeof words);
  uint64_t all = 0;
  for (uint64_t word : words) all |= word;
  return all != 0;
}

// ---- Storage types: how 16-bit floats are read and written
// --------------------------------------------------------

// The type a tensor's elements are computed in.
template <typename E>
using ComputeOf = std::conditional_t<std::is_same_v<E, double>, double, float>;

typedef uint16_t HalfBits __attribute__((vector_size(FLASHX_VECTOR_BYTES / 2)));
typedef Vec<uint32_t> WordBits;

FLASHX_CORE WordBits widen(const uint16_t* p) {
#if defined(__AVX512F__)
  // What convertvector becomes is half as fast.
  return (WordBits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  HalfBits bits;
  std::memcpy(&bits, p, sizeof bits);
  return __builtin_convertvector(bits, WordBits);
#endif
}

FLASHX_CORE void narrow(uint16_t* p, WordBits words) {
  const HalfBits bits = __builtin_convertvector(words, HalfBits);
  std::memcpy(p, &bits, sizeof bits);
}

FLASHX_CORE Vec<float> load_as(const float* p, float) { return load(p); }
FLASHX_CORE Vec<double> load_as(const double* p, double) { return load(p); }
FLASHX_CORE Vec<float> load_as(const BFloat16* p, float) { return bit_cast<Vec<float>>(widen(&p->bits) << 16); }
FLASHX_CORE Vec<float> load_as(const Half* p, float) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // Exponent and mantissa moved up, then rescaled by 2^112, which also normalises denormals; inf and NaN by
  // hand.
  const WordBits half = widen(&p->bits);
  const WordBits sign = (half & 0x8000u) << 16;
  const WordBits magnitude = (half & 0x7fffu) << 13;
  const WordBits scaled = bit_cast<WordBits>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
  return bit_cast<Vec<float>>(sign | ((half & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : scaled));
#endif
}

FLASHX_CORE void store_as(float* p, Vec<float> v) { store(p, v); }
FLASHX_CORE void store_as(double* p, Vec<double> v) { store(p, v); }
FLASHX_CORE void store_as(BFloat16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const WordBits bits = bit_cast<WordBits>(v);
  const WordBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  narrow(&p->bits, v != v ? (bits >> 16) | 0x40u : rounded);
#endif
}
FLASHX_CORE void store_as(Half* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  const WordBits bits = bit_cast<WordBits>(v);
  const WordBits magnitude = bits & 0x7fffffffu;
  // Round to nearest even on the way down; a carry out of the mantissa raises the exponent, up to infinity.
  const WordBits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns a denormal's last bit with the float's, with the adder's own rounding.
  const WordBits denormal = bit_cast<WordBits>(bit_cast<Vec<float>>(magnitude) + 0.5f) - (126u << 23);
  WordBits half = magnitude < (113u << 23) ? denormal : normal;
  half = magnitude >= (143u << 23) ? broadcast<uint32_t>(0x7c00u) : half;
  half = magnitude > 0x7f800000u ? broadcast<uint32_t>(0x7e00u) : half;
  narrow(&p->bits, half | ((bits >> 16) & 0x8000u));
#endif
}

// One element, and a count of elements short of a vector, through the vector forms: one meaning for both.
template <typename E, typename T = ComputeOf<E>>
FLASHX_CORE void load_row(const E* from, int count, T* to) {
  int i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load_as(from + i, T{}));
  if (i < count) {
    E edge[kLanes<T>] = {};
    std::memcpy(edge, from + i, (count - i) * sizeof(E));
    T wide[kLanes<T>];
    store(wide, load_as(edge, T{}));
    std::memcpy(to + i, wide, (count - i) * sizeof(T));
  }
}

template <typename E, typename T = ComputeOf<E>>
FLASHX_CORE void store_row(const T* from, int count, E* to) {
  int i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store_as(to + i, load(from + i));
  if (i < count) {
    T edge[kLanes<T>] = {};
    std::memcpy(edge, from + i, (count - i) * sizeof(T));
    E narrow_edge[kLanes<T>];
    store_as(narrow_edge, load(edge));
    std::memcpy(to + i, narrow_edge, (count - i) * sizeof(E));
  }
}

// ---- Transpose
// ----------------------------------------------------------------------------------------------------

// Lane indices for one exchange step at distance `d`: which lanes of the pair (a, b) make the new a, or the
// new b.
template <typename T, int d, bool kSecond, size_t... lane>
FLASHX_CORE Mask<T> exchange_lanes(std::index_sequence<lane...>) {
  constexpr int n = kLanes<T>;
  return Mask<T>{(kSecond ? ((lane & d) ? n + IntOf<T>(lane) : IntOf<T>(lane) + d)
                          : ((lane & d) ? n + IntOf<T>(lane) - d : IntOf<T>(lane)))...};
}

template <typename T, int d = 1>
FLASHX_CORE void transpose_registers(Vec<T> (&v)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  if constexpr (d < n) {
    const Mask<T> first = exchange_lanes<T, d, false>(std::make_index_sequence<n>{});
    const Mask<T> second = exchange_lanes<T, d, true>(std::make_index_sequence<n>{});
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i & d) continue;
      const Vec<T> a = v[i], b = v[i + d];
      v[i] = __builtin_shuffle(a, b, first);
      v[i + d] = __builtin_shuffle(a, b, second);
    }
    transpose_registers<T, 2 * d>(v);
  }
}

// to[c][r] = from[r][c]: rows and columns are multiples of a vector; leading dimensions in elements.
template <typename T>
void transpose(const T* from, int64_t from_ld, int rows, int columns, T* to, int64_t to_ld) {
  constexpr int n = kLanes<T>;
  for (int r = 0; r < rows; r += n) {
    for (int c = 0; c < columns; c += n) {
      Vec<T> v[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) v[i] = load(from + (r + i) * from_ld + c);
      transpose_registers<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) store(to + (c + i) * to_ld + r, v[i]);
    }
  }
}

}  // namespace flashx::FLASHX_ISA
