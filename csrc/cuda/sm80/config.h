// Tile sizes of the sm80 kernels (mma.sync, cp.async), as data. Head dims are rounded up to a class
// (FLASHX_DIMS of csrc/cuda/CMakeLists.txt).
//
// The limits: 99 KiB of shared memory a block (sm_86, sm_89, sm_120; sm_80 has 163, sm_90 and sm_100 227), 255
// registers a thread. A warp owns 16 rows a fragment: its sums take dim / 2 registers each, its logits keys / 2.
#pragma once

#include "core/config.h"

namespace flashx::sm80 {

constexpr int kLargestShared = 99 * 1024;

struct ForwardTiles {
  int warps;
  int fragments;  // of 16 rows, that a warp owns
  int keys;
  constexpr int rows() const { return warps * fragments * 16; }
};

// Two fragments a warp read each K and V fragment half as often; from head dim 192 on their sums do not fit the
// registers, nor do the operands of the general logits, which at 256 leave room for the scores of fewer keys.
constexpr ForwardTiles forward_tiles(int element_bytes, int dim, bool general) {
  if (element_bytes == 4) return {4, 1, dim == 256 || (dim == 128 && !general) ? 16 : 32};
  if (general || dim >= 192) return {4, 1, general && dim == 256 ? 32 : 64};
  return {4, 2, 64};
}

// Backward: a block owns rows (keys for dK and dV, queries for dQ) and streams over the others.
struct BackwardTiles {
  int warps;   // of 16 owned rows each
  int stream;  // rows of a streamed tile
  int stages;  // streamed tiles in shared memory
  constexpr int rows() const { return warps * 16; }
};

// The general logits' slopes, rows and random bits leave room for fewer of them.
constexpr BackwardTiles backward_tiles(int element_bytes, int dim, bool general) {
  if (element_bytes == 4) {
    if (dim <= 64) return {4, general ? 16 : 32, 2};
    if (dim <= 128) return {4, 16, 2};
    return {2, dim <= 192 ? 32 : 16, 1};
  }
  if (dim <= 64) return {4, general ? 32 : 64, 2};
  if (dim <= 128) return {4, general ? 16 : 32, 2};
  return {4, dim <= 192 ? 64 : 32, 1};
}

// dK and dV together need dim registers a thread: above this they are summed by a sweep each.
constexpr bool one_sweep(int element_bytes, int dim) { return dim <= (element_bytes == 4 ? 96 : 128); }

// Split-KV: a call whose query rows fit one tile is cut at multiples of kSplitKeys, counted from key 0, whatever it is
// batched with. Members share their keys, so their rows are many, and so are the parts that are written and read again.
constexpr int kSplitKeys = 1024, kMemberSplitKeys = 4096;

}  // namespace flashx::sm80
