// The matrix instructions of a whole warp. Products are exact and summed in double, the result rounded once: at least
// as exact as a GPU.
#include <cstring>

#include "emulator/block.h"

namespace flashx::emulator {

namespace {

#define FLASHX_INLINE inline __attribute__((always_inline))

// A row of b or d, in whatever vectors the function that this is inlined into may use.
using Row = double __attribute__((vector_size(64)));
using FloatRow = float __attribute__((vector_size(32)));

// d (16 x 8) += a (16 x depth) b (depth x 8).
template <int kDepth>
FLASHX_INLINE void multiply_add(const float (&a)[16][kDepth], const float (&b)[kDepth][8], float (&d)[16][8]) {
  Row rows[kDepth];
  for (int k = 0; k < kDepth; ++k) {
    FloatRow row;
    std::memcpy(&row, b[k], sizeof(row));
    rows[k] = __builtin_convertvector(row, Row);
  }
  double wide[16][kDepth];
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < kDepth; ++k) wide[i][k] = a[i][k];
  }
  constexpr int kTogether = 4;
  for (int i = 0; i < 16; i += kTogether) {
    Row sums[kTogether];
    for (int r = 0; r < kTogether; ++r) {
      FloatRow row;
      std::memcpy(&row, d[i + r], sizeof(row));
      sums[r] = __builtin_convertvector(row, Row);
    }
    for (int k = 0; k < kDepth; ++k) {
      for (int r = 0; r < kTogether; ++r) sums[r] += wide[i + r][k] * rows[k];
    }
    for (int r = 0; r < kTogether; ++r) {
      const FloatRow row = __builtin_convertvector(sums[r], FloatRow);
      std::memcpy(d[i + r], &row, sizeof(row));
    }
  }
}

// Fragments as ptx.cuh describes them: g = lane / 4, t = lane % 4.
FLASHX_INLINE void gather_sums(const Arguments (&lanes)[kLanes], float (&d)[16][8]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int r = 0; r < 2; ++r) std::memcpy(&d[lane / 4 + 8 * r][lane % 4 * 2], lanes[lane].d + 2 * r, 8);
  }
}

FLASHX_INLINE void scatter_sums(const Arguments (&lanes)[kLanes], const float (&d)[16][8]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int r = 0; r < 2; ++r) std::memcpy(lanes[lane].d + 2 * r, &d[lane / 4 + 8 * r][lane % 4 * 2], 8);
  }
}

template <typename E>
FLASHX_INLINE void convert(const uint16_t* from, float* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = ptx::cvt_f32(E{from[i]});
}

template <typename E>
FLASHX_INLINE void multiply_halves(const Arguments (&lanes)[kLanes]) {
  uint16_t a_bits[16][16], b_bits[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Arguments& from = lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) {
        a_bits[g + 8 * (r % 2)][2 * t + half + 8 * (r / 2)] = static_cast<uint16_t>(from.a[r] >> (16 * half));
      }
      for (int r = 0; r < 2; ++r) b_bits[2 * t + half + 8 * r][g] = static_cast<uint16_t>(from.b[r] >> (16 * half));
    }
  }
  float a[16][16], b[16][8], d[16][8];
  convert<E>(a_bits[0], a[0], 256);
  convert<E>(b_bits[0], b[0], 128);
  gather_sums(lanes, d);
  multiply_add(a, b, d);
  scatter_sums(lanes, d);
}

FLASHX_INLINE void multiply_tf32(const Arguments (&lanes)[kLanes]) {
  float a[16][8], b[8][8], d[16][8];
  const auto tf32 = [](uint32_t word) { return ptx::float_of(word & ~0x1fffu); };
  for (int lane = 0; lane < kLanes; ++lane) {
    const Arguments& from = lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][t + 4 * (r / 2)] = tf32(from.a[r]);
    for (int r = 0; r < 2; ++r) b[t + 4 * r][g] = tf32(from.b[r]);
  }
  gather_sums(lanes, d);
  multiply_add(a, b, d);
  scatter_sums(lanes, d);
}

FLASHX_INLINE void multiply_any(MmaType type, const Arguments (&lanes)[kLanes]) {
  switch (type) {
    case MmaType::Half:
      return multiply_halves<Half>(lanes);
    case MmaType::BFloat16:
      return multiply_halves<BFloat16>(lanes);
    case MmaType::Tf32:
      return multiply_tf32(lanes);
  }
}

using Multiply = void (*)(MmaType, const Arguments (&)[kLanes]);

void multiply_plain(MmaType type, const Arguments (&lanes)[kLanes]) { multiply_any(type, lanes); }

// The products are exact in double, so that fused multiply-adds change no bit.
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void multiply_avx2(MmaType type, const Arguments (&lanes)[kLanes]) {
  multiply_any(type, lanes);
}
__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma"))) void multiply_avx512(
    MmaType type, const Arguments (&lanes)[kLanes]) {
  multiply_any(type, lanes);
}

Multiply best() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq")) {
    return multiply_avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return multiply_avx2;
  return multiply_plain;
}
#else
Multiply best() { return multiply_plain; }
#endif

}  // namespace

void multiply(MmaType type, const Arguments (&lanes)[kLanes]) {
  static const Multiply fastest = best();
  fastest(type, lanes);
}

void Worker::execute_ldmatrix(Warp& warp, bool transposed) {
  const Arguments(&lanes)[kLanes] = warp.lanes;
  uint16_t rows[kLanes][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    // Faults name the lane that gave the address.
    running = threads_[warp.index * kLanes + lane].get();
    const char* row = shared(lanes[lane].address, 16, "ldmatrix");
    if (Race* const race = this->race())
      race->access(*running, lanes[lane].address - kSharedBase, 16, Access::LdMatrix);
    std::memcpy(rows[lane], row, 16);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; ++m) {
      const uint16_t (*matrix)[8] = rows + 8 * m;
      const uint32_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint32_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      lanes[lane].out[m] = low | high << 16;
    }
  }
  ++counters_.ldmatrix;
  // Eight rows of 16 bytes are one wavefront if they lie in different banks; rows at the same address share theirs.
  for (int phase = 0; phase < 4; ++phase) {
    uint32_t banks = 0;
    for (int i = 0; i < 8; ++i) banks |= 1u << (lanes[8 * phase + i].address / 16 % 8);
    if (banks == 0xff) continue;
    int most = 0;
    for (int bank = 0; bank < 8; ++bank) {
      int different = 0;
      for (int i = 0; i < 8; ++i) {
        const uint32_t address = lanes[8 * phase + i].address;
        bool first = static_cast<int>(address / 16 % 8) == bank;
        for (int j = 0; first && j < i; ++j) first = lanes[8 * phase + j].address != address;
        different += first;
      }
      if (different > most) most = different;
    }
    counters_.ldmatrix_conflicts += most - 1;
  }
}

}  // namespace flashx::emulator
