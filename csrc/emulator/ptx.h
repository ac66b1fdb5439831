// The names of csrc/cuda/ptx.cuh for the emulator: what they do on a GPU, and checked. Included by every kernel, so
// only declarations and numbers are here; the machine itself is machine.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/problem.h"

#define FLASHX_DEVICE inline
#define FLASHX_UNROLL

namespace flashx::emulator {

// Of the fiber that asks, so the same for all of a function's run.
__attribute__((const)) int thread_index();
__attribute__((const)) int block_index(int axis);

// Where a block's shared memory begins: not 0, so that an address without shared_base() is out of bounds.
constexpr uint32_t kSharedBase = 1024;

bool barrier(int id, int threads, bool reduce, bool value);
bool block_barrier(bool reduce, bool value);

void warp_sync();
float shuffle(float value, int mask);
uint32_t shuffle_from(uint32_t value, int lane);
uint32_t ballot(bool value);
int reduce_min(int value);
int reduce_max(int value);
void ldmatrix(uint32_t* d, uint32_t address, bool transposed);
enum class MmaType { Half, BFloat16, Tf32 };
void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b);

// Checked; where the bytes are.
const void* global_read(const void* address, int bytes);
void* global_write(void* address, int bytes);
const void* shared_read(uint32_t address, int bytes);
void* shared_write(uint32_t address, int bytes);

void copy_async(uint32_t shared, const void* global, int bytes);
void copy_commit();
void copy_wait(int groups);

}  // namespace flashx::emulator

namespace flashx::ptx {

// ---- Where this thread is

inline int thread() { return emulator::thread_index(); }
inline int lane() { return emulator::thread_index() % 32; }
inline int warp() { return emulator::thread_index() / 32; }
inline int block_x() { return emulator::block_index(0); }
inline int block_y() { return emulator::block_index(1); }
inline int block_z() { return emulator::block_index(2); }
inline uint32_t shared_base() { return emulator::kSharedBase; }

// ---- Barriers, shuffles, votes

inline void bar_sync() { emulator::block_barrier(false, false); }
inline void bar_sync(int id, int threads) { emulator::barrier(id, threads, false, false); }
inline bool bar_red_or(bool value) { return emulator::block_barrier(true, value); }
inline void bar_warp_sync() { emulator::warp_sync(); }
inline float shfl_bfly(float value, int mask) { return emulator::shuffle(value, mask); }
inline uint32_t shfl_idx(uint32_t value, int lane) { return emulator::shuffle_from(value, lane); }
inline uint32_t vote_ballot(bool value) { return emulator::ballot(value); }
inline int redux_min(int value) { return emulator::reduce_min(value); }
inline int redux_max(int value) { return emulator::reduce_max(value); }

// ---- Memory

struct alignas(8) Words2 {
  uint32_t w[2];
};
struct alignas(16) Words4 {
  uint32_t w[4];
};

template <typename T>
inline T ld_global(const T* address) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);
  T value;
  std::memcpy(&value, emulator::global_read(address, sizeof(T)), sizeof(T));
  return value;
}
template <typename T>
inline void st_global(T* address, T value) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);
  std::memcpy(emulator::global_write(address, sizeof(T)), &value, sizeof(T));
}

template <typename T>
inline T ld_shared(uint32_t address) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  T value;
  std::memcpy(&value, emulator::shared_read(address, sizeof(T)), sizeof(T));
  return value;
}
template <typename T>
inline void st_shared(uint32_t address, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  std::memcpy(emulator::shared_write(address, sizeof(T)), &value, sizeof(T));
}

inline void cp_async_16(uint32_t shared, const void* global, int bytes) { emulator::copy_async(shared, global, bytes); }
inline void cp_async_commit() { emulator::copy_commit(); }
template <int N>
inline void cp_async_wait() {
  static_assert(N >= 0);
  emulator::copy_wait(N);
}

// ---- Matrices

inline void ldmatrix_x4(uint32_t (&d)[4], uint32_t address) { emulator::ldmatrix(d, address, false); }
inline void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t address) { emulator::ldmatrix(d, address, true); }

template <typename E>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
inline void mma<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::MmaType::Half, d, a, b);
}
template <>
inline void mma<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::MmaType::BFloat16, d, a, b);
}
template <>
inline void mma<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::MmaType::Tf32, d, a, b);
}

// ---- Numbers

inline int clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// As exact as floats go, where a GPU is 2 units in the last place off; denormals are zeros.
inline float ex2(float x) {
  if (x < -126.0f) return 0.0f;
  return std::exp2(x);
}

inline float cvt_tf32(float x) {
  const uint32_t bits = bits_of(x);
  // Half of what is dropped, added to the magnitude; may carry into the exponent, up to inf.
  return (bits & 0x7f800000u) == 0x7f800000u ? x : float_of((bits + 0x1000u) & ~0x1fffu);
}

inline float cvt_f32(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float cvt_f32(float x) { return x; }
inline float cvt_f32(Half x) {
  // Exponent and mantissa where float32 has them, then 2^112 for the difference of the biases; this also makes
  // denormals numbers. What was inf or NaN is 2^16 or more by then.
  const float magnitude = float_of((x.bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x1p16f ? 0x7f800000u : 0u;
  return float_of(bits_of(magnitude) | special | (x.bits & 0x8000u) << 16);
}

template <typename E>
inline uint32_t cvt_x2(float low, float high);
template <>
inline uint32_t cvt_x2<BFloat16>(float low, float high) {
  const auto round = [](float x) -> uint32_t {
    const uint32_t bits = bits_of(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}
template <>
inline uint32_t cvt_x2<Half>(float low, float high) {
  const auto round = [](float x) -> uint32_t {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more
    // Below 2^-14, where halves are denormal: adding 0.5 leaves their 10 bits of 2^-24 at the end, rounded.
    if (magnitude < 0x38800000u) return sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
    return sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13);
  };
  return round(low) | round(high) << 16;
}

}  // namespace flashx::ptx
