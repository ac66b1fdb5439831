// Shared by every target: host compilers (once per instruction set) and, later, nvcc.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FLASHX_CORE __host__ __device__ __forceinline__
#else
// Always inline: the per-ISA files must not emit a shared copy of these functions built with their own flags,
// or the linker could hand AVX-512 code to a machine without it.
#define FLASHX_CORE inline __attribute__((always_inline))
#endif

namespace flashx {

constexpr double kLog2e = 1.44269504088896340736;
constexpr double kLn2 = 0.69314718055994530942;

template <typename T>
FLASHX_CORE constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
FLASHX_CORE constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

// v clamped to [low, high].
template <typename T>
FLASHX_CORE constexpr T clamp(T v, T low, T high) {
  return larger(low, smaller(v, high));
}

FLASHX_CORE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FLASHX_CORE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace flashx
