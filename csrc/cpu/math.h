// exp2 and tanh on vectors. Coefficients: minimax fits of relative error (Remez), made for these intervals.
#pragma once

#include <cmath>

#include "cpu/simd.h"

namespace flashx::FLASHX_ISA {

template <typename T>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low mantissa bits
  static constexpr int kBias = 127, kMantissa = 23;
  // 2^f on [-1/2, 1/2], relative error 1.9e-9; the constant term is 1, so 2^0 is exactly 1.
  static constexpr float kPoly[] = {
      1.0f, 0.693147205737f, 0.24022646891f, 0.0555032877688f, 0.0096184889235f, 0.00133999312578f, 0.000153458205475f};
};

template <>
struct Exp2<double> {
  static constexpr double kRound = 0x1.8p52;
  static constexpr int kBias = 1023, kMantissa = 52;
  static constexpr double kPoly[] = {1.0,
                                     0.69314718055994533046,
                                     0.24022650695910156203,
                                     0.055504108664819921482,
                                     0.0096181291075883356971,
                                     0.0013333558146789954566,
                                     0.00015403530462513906055,
                                     0.000015252733489955560676,
                                     1.321543308990612687e-6,
                                     1.0178198035371477308e-7,
                                     7.0741055798305341942e-9,
                                     4.4352807031925459598e-10};
};

#if defined(__AVX512F__)
// x minus the nearest integer, 0 for infinities; and 2^n p, 0 where x is below the smallest normal number's exponent.
FLASHX_CORE Vec<float> fraction(Vec<float> x) { return (Vec<float>)_mm512_reduce_ps((__m512)x, 0); }
FLASHX_CORE Vec<double> fraction(Vec<double> x) { return (Vec<double>)_mm512_reduce_pd((__m512d)x, 0); }
FLASHX_CORE Vec<float> scale_exponent(Vec<float> p, Vec<float> n, Vec<float> x) {
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(1 - Exp2<float>::kBias), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
}
FLASHX_CORE Vec<double> scale_exponent(Vec<double> p, Vec<double> n, Vec<double> x) {
  const __mmask8 normal = _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(1 - Exp2<double>::kBias), _CMP_NLT_UQ);
  return (Vec<double>)_mm512_maskz_scalef_pd(normal, (__m512d)p, (__m512d)n);
}
#endif

// 2^x for x below the largest exponent; 0 below the smallest normal number, NaN for NaN.
template <typename T>
FLASHX_CORE Vec<T> exp2(Vec<T> x) {
  using E = Exp2<T>;
#if defined(__AVX512F__)
  const Vec<T> f = fraction(x);
#else
  x = max(broadcast<T>(-E::kBias), x);  // in this order NaN stays
  const Vec<T> rounded = x + E::kRound;
  const Vec<T> f = x - (rounded - E::kRound);
#endif
  constexpr int degree = sizeof(E::kPoly) / sizeof(T) - 1;
  Vec<T> p = broadcast(E::kPoly[degree]);
#pragma GCC unroll 16
  for (int i = degree - 1; i >= 0; --i) p = p * f + E::kPoly[i];
#if defined(__AVX512F__)
  return scale_exponent(p, x - f, x);
#else
  const Mask<T> exponent = (bit_cast<Mask<T>>(rounded) + E::kBias) << E::kMantissa;
  return p * bit_cast<Vec<T>>(exponent);
#endif
}

FLASHX_CORE Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

FLASHX_CORE Vec<float> tanh(Vec<float> x) {
  // Small arguments: x * P(x^2) keeps the relative error (4e-9) that 1 - 2 / (e^2x + 1) loses to
  // cancellation.
  const Vec<float> z = x * x;
  const Vec<float> p =
      0.999999996075f +
      z * (-0.333332605267f +
           z * (0.133311275322f + z * (-0.0537210677872f + z * (0.0205909878207f + z * -0.00565998862992f))));
  const Vec<float> magnitude = x < 0 ? -x : x;
  const Vec<float> clipped = magnitude > 20.0f ? broadcast(20.0f) : magnitude;
  const Vec<float> large = 1.0f - 2.0f / (exp2<float>(clipped * static_cast<float>(2 * kLog2e)) + 1.0f);
  return magnitude < 0.625f ? x * p : (x < 0 ? -large : large);
}

}  // namespace flashx::FLASHX_ISA
