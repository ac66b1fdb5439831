// Small kernels with the bugs that the emulator is there to find, one at a time: tests/test_emulator.py sees each
// caught. Copies of the kernels' idioms, not of the kernels, so that these may change freely.
#pragma once

#include "cuda/launch.cuh"

namespace flashx::FLASHX_MACHINE {

enum class Bug {
  None,
  MissingWait,
  MissingCommit,
  MissingBarrier,      // between a write and its reading
  MissingLastBarrier,  // between a reading and the next write
  MissingWarpSync,     // the same among a warp's lanes
  ShuffleForBarrier,   // a shuffle in its place, which orders no memory
  StoreOverTile,       // small accesses after large ones, without a barrier
  BarrierOfHalf,       // among half of those who need it
  BarrierTooWide,      // waits for more threads than come
  DivergentBarrier,    // a warp leaves it out
  MixedBarriers,       // a warp is at another kind of barrier
  EarlyExit,           // a warp exits before it
  DivergentMma,        // a lane leaves it out
  DivergentWarp,       // half of a warp is at another instruction
  LaneExit,            // a lane exits before it
  WrongSwizzle,        // reads rows other than as they were written
  NoSwizzle,           // neither writes nor reads swizzled: right, but slow
  TileOffByOne,        // one row too far
  SharedOutOfBounds,
  MissingSharedBase,
  Misaligned,
  Unwritten,  // reads what nobody wrote
  ReadOnly,   // writes to an input
};

// out (64 per block x 32, float) = a (64 per block x dim) b^T (32 x dim) in float16: tiles of 32 columns,
// double-buffered.
template <Bug kBug>
struct SeededProduct {
  static constexpr int kRows = 64, kColumns = 32, kTile = 32, kTiles = 4, kDim = kTile * kTiles;
  static constexpr int kChunks = kTile * 2 / 16;
  static constexpr int kStageBytes = (kRows + kColumns) * kChunks * 16;
  static constexpr int kThreads = 128, kBlocks = 1, kSharedBytes = 2 * kStageBytes;
  static constexpr int kABytes = kRows * kDim * 2, kBBytes = kColumns * kDim * 2, kOutBytes = kRows * kColumns * 4;

  struct Params {
    const Half *a, *b;
    float* out;
  };

  static FLASHX_DEVICE void run(const Params& params) {
    const int lane = ptx::lane(), warp = ptx::warp();
    float sums[kColumns / 8][4] = {};
    load(params, 0);
    if (kBug != Bug::MissingCommit) ptx::cp_async_commit();
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile + 1 < kTiles) load(params, tile + 1);
      if (kBug != Bug::MissingCommit) ptx::cp_async_commit();
      if (kBug != Bug::MissingWait) ptx::cp_async_wait<1>();
      if (kBug != Bug::MissingBarrier) ptx::bar_sync();
      const uint32_t a_tile = ptx::shared_base() + tile % 2 * kStageBytes, b_tile = a_tile + kRows * kChunks * 16;
      if (kBug == Bug::LaneExit && ptx::thread() == 70) return;
      for (int k = 0; k < kChunks; k += 2) {
        uint32_t a[4], b[4];
        ptx::ldmatrix_x4(a, a_tile + offset(16 * warp + lane % 16, k + lane / 16, true));
        for (int n = 0; n < kColumns / 8; n += 2) {
          ptx::ldmatrix_x4(b, b_tile + offset(8 * n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2, true));
          if (kBug == Bug::DivergentMma && warp == 1 && lane == 5) continue;
          if (kBug == Bug::DivergentWarp && lane < 16) ptx::shfl_bfly(0, 1);
          ptx::mma<Half>(sums[n], a, {b[0], b[1]});
          ptx::mma<Half>(sums[n + 1], a, {b[2], b[3]});
        }
      }
      if (kBug != Bug::MissingLastBarrier && !(kBug == Bug::DivergentBarrier && warp == 3)) ptx::bar_sync();
    }
    if (kBug == Bug::StoreOverTile) {
      uint32_t words[4];
      if (warp == 0) ptx::ldmatrix_x4(words, ptx::shared_base() + 16 * lane);
      if (warp == 1) ptx::st_shared(ptx::shared_base() + 16 * lane + 4, 0.0f);
    }
    float* out = params.out + (ptx::block_x() * kRows + 16 * warp + lane / 4) * kColumns + lane % 4 * 2;
    for (int n = 0; n < kColumns / 8; ++n) {
      for (int r = 0; r < 4; ++r) ptx::st_global(out + r / 2 * 8 * kColumns + 8 * n + r % 2, sums[n][r]);
    }
  }

 private:
  static FLASHX_DEVICE uint32_t offset(int row, int chunk, bool reads) {
    const int swizzle = kBug == Bug::NoSwizzle ? 0 : kBug == Bug::WrongSwizzle && reads ? row & 3 : row >> 1 & 3;
    return static_cast<uint32_t>((row * kChunks + (chunk ^ swizzle)) * 16);
  }

  static FLASHX_DEVICE void load(const Params& params, int tile) {
    const uint32_t a_tile = ptx::shared_base() + tile % 2 * kStageBytes, b_tile = a_tile + kRows * kChunks * 16;
    const Half* a = params.a + static_cast<int64_t>(ptx::block_x()) * kRows * kDim + tile * kTile;
    const Half* b =
        params.b + tile * kTile + (kBug == Bug::TileOffByOne ? kDim : 0) + (kBug == Bug::Misaligned ? 4 : 0);
    for (int i = ptx::thread(); i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      ptx::cp_async_16(a_tile + offset(row, chunk, false), a + row * kDim + chunk * 8, 16);
    }
    for (int i = ptx::thread(); i < kColumns * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      ptx::cp_async_16(b_tile + offset(row, chunk, false), b + row * kDim + chunk * 8, 16);
    }
  }
};

// out = the transpose of in, both 32 x 32 per block, through shared memory whose rows are one word longer, for the
// banks; then each warp adds to a number the one of its mirrored lane.
template <Bug kBug>
struct SeededTranspose {
  static constexpr int kSide = 32, kThreads = 128, kBlocks = 1;
  static constexpr int kTransposeBytes = kSide * (kSide + 1) * 4;
  static constexpr int kSharedBytes = kTransposeBytes + kThreads * 4 - (kBug == Bug::SharedOutOfBounds ? 4 : 0);
  static constexpr int kInBytes = kSide * kSide * 4;

  struct Params {
    float *in, *out;
  };

  static FLASHX_DEVICE void run(const Params& params) {
    const int lane = ptx::lane(), warp = ptx::warp();
    const uint32_t base = kBug == Bug::MissingSharedBase ? 0 : ptx::shared_base() + (kBug == Bug::Misaligned ? 2 : 0);
    const int64_t block = static_cast<int64_t>(ptx::block_x()) * kSide * kSide;
    for (int row = warp; row < kSide; row += 4) {
      if (kBug == Bug::Unwritten && row == 7) continue;
      const int from = kBug == Bug::TileOffByOne ? row + 1 : row;
      ptx::st_shared(base + 4 * (row * (kSide + 1) + lane), ptx::ld_global(params.in + block + from * kSide + lane));
    }
    if (kBug == Bug::EarlyExit && warp == 3) return;
    if (kBug == Bug::BarrierOfHalf) {
      ptx::bar_sync(1 + warp / 2, 64);
    } else if (kBug == Bug::MixedBarriers && warp == 1) {
      ptx::bar_red_or(false);
    } else if (kBug != Bug::MissingBarrier && !(kBug == Bug::DivergentBarrier && warp == 2)) {
      ptx::bar_sync();
    }
    const uint32_t mirror = base + kTransposeBytes + 128 * warp;
    for (int row = warp; row < kSide; row += 4) {
      const float x = ptx::ld_shared<float>(base + 4 * (lane * (kSide + 1) + row));
      ptx::st_shared(mirror + 4 * lane, x);
      if (kBug != Bug::MissingWarpSync) ptx::bar_warp_sync();
      const float y = ptx::ld_shared<float>(mirror + 4 * (31 - lane));
      if (kBug == Bug::ShuffleForBarrier) {
        const float z = ptx::shfl_bfly(ptx::ld_shared<float>(mirror), 1);
        if (lane == 5) ptx::st_shared(mirror, z + ptx::ld_shared<float>(mirror));
      }
      if (kBug != Bug::MissingLastBarrier) ptx::bar_warp_sync();
      ptx::st_global((kBug == Bug::ReadOnly ? params.in : params.out) + block + row * kSide + lane, x + y);
    }
    // Two warps each, by their own barrier.
    ptx::bar_sync(1 + warp / 2, kBug == Bug::BarrierTooWide ? 96 : 64);
  }
};

}  // namespace flashx::FLASHX_MACHINE
