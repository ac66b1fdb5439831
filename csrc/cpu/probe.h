// What the machine can do at best, to hold the kernels' speed against: multiply-adds that touch nothing but registers,
// and reads of memory that serve nothing but a sum. The caller takes the time.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace flashx::FLASHX_ISA {

// Independent accumulators: more than a multiply-add's latency times those that start per cycle, and as many registers.
constexpr int kChains = FLASHX_REGISTERS >= 32 ? 24 : 14;

// kChains steps a round. The chains begin apart, so that no compiler makes one of them.
template <typename Step>
FLASHX_CORE void run_chains(int64_t rounds, const Step& step) {
  Vec<float> acc[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) acc[i] = broadcast(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) acc[i] = step(acc[i]);
  }
  Vec<float> sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum += acc[i];
  [[maybe_unused]] volatile Vec<float> sink = sum;  // what nobody reads would not be computed
}

#if FLASHX_BF16 == 2

// A register block of tiles: four accumulators, two tiles of either operand. What they are loaded from is constant,
// because the compiler does not know that the instructions read it and would leave out stores to it.
inline void run_tiles(int64_t rounds) {
  struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  struct Ones {
    uint16_t values[16 * 32] = {};
    constexpr Ones() {
      for (uint16_t& value : values) value = 0x3f80;
    }
  };
  alignas(64) static constexpr Config config;
  alignas(64) static constexpr Ones ones;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, &ones, 64);
  _tile_loadd(5, &ones, 64);
  _tile_loadd(6, &ones, 64);
  _tile_loadd(7, &ones, 64);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

#endif

// Kernels::multiply_adds.
inline double multiply_adds(Unit unit, int64_t rounds, int threads) {
  double per_round = 0;
  void (*run)(int64_t) = nullptr;
  switch (unit) {
    case Unit::Float32:
      per_round = 2.0 * kChains * kLanes<float>;
      run = [](int64_t count) {
        const Vec<float> half = broadcast(0.5f);
        run_chains(count, [&](Vec<float> x) { return x * half + half; });  // tends to 1: no infinities, no denormals
      };
      break;
    case Unit::BFloat16Pairs:
#if defined(__AVX512BF16__)
      per_round = 4.0 * kChains * kLanes<float>;
      run = [](int64_t count) {
        const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
        run_chains(count, [&](Vec<float> x) { return (Vec<float>)_mm512_dpbf16_ps((__m512)x, ones, ones); });
      };
#endif
      break;
    case Unit::BFloat16Tiles:
#if FLASHX_BF16 == 2
      per_round = 4 * 2.0 * 16 * 16 * 32;
      run = run_tiles;
#endif
      break;
  }
  if (run == nullptr) return 0;
  int team = 0;  // as many as there really are
#pragma omp parallel num_threads(threads) reduction(+ : team)
  {
    run(rounds);
    ++team;
  }
  return per_round * rounds * team;
}

// Kernels::read. Several streams a thread, each within a page at a time, as the hardware's prefetchers like it.
inline uint32_t read(const uint32_t* words, int64_t count, int threads) {
  constexpr int n = kLanes<uint32_t>, kStreams = 4, kStep = 2 * n;
  constexpr int64_t kBlock = 1 << 16;  // words
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  uint32_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t block = 0; block < blocks; ++block) {
    const uint32_t* from = words + block * kBlock;
    const int64_t length = smaller(kBlock, count - block * kBlock);
    const int64_t stream = length / (kStreams * kStep) * kStep;
    Vec<uint32_t> sums[kStreams][2] = {};
    for (int64_t i = 0; i < stream; i += kStep) {
#pragma GCC unroll 4
      for (int s = 0; s < kStreams; ++s) {
        sums[s][0] += load(from + s * stream + i);
        sums[s][1] += load(from + s * stream + i + n);
      }
    }
    for (int64_t i = kStreams * stream; i < length; ++i) total += from[i];
    for (const auto& pair : sums) {
      const Vec<uint32_t> sum = pair[0] + pair[1];
      for (int lane = 0; lane < n; ++lane) total += sum[lane];
    }
  }
  return total;
}

}  // namespace flashx::FLASHX_ISA
