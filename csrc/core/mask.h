// Masks: which keys a query row may see. From a mask come both the tile schedule (schedule.h) and the element
// mask.
#pragma once

#include "core/config.h"

namespace flashx {

enum class TileKind : uint8_t { Skip, Partial, Full };

// What the rows of a tile see together: every row's limits lie between these. Rows also see the keys [0, first) that
// are before their hi.
struct Limits {
  int64_t lo_min, lo_max, hi_min, hi_max, first;

  // Limits of no rows, to be widened.
  static FLASHX_CORE Limits none() { return {INT64_MAX, 0, INT64_MAX, 0, 0}; }

  FLASHX_CORE void add(int64_t lo, int64_t hi, int64_t leading) {
    lo_min = smaller(lo_min, lo), lo_max = larger(lo_max, lo);
    hi_min = smaller(hi_min, hi), hi_max = larger(hi_max, hi);
    first = larger(first, leading);
  }

  FLASHX_CORE void widen(const Limits& other) {
    lo_min = smaller(lo_min, other.lo_min), lo_max = larger(lo_max, other.lo_max);
    hi_min = smaller(hi_min, other.hi_min), hi_max = larger(hi_max, other.hi_max);
    first = larger(first, other.first);
  }

  // How the keys [k_begin, k_end) look to these rows. k_end may reach past the keys (a ragged last tile): such a tile
  // is never Full, since hi is clamped to their number; nor is one of the first keys beyond the window.
  FLASHX_CORE TileKind kind(int64_t k_begin, int64_t k_end) const {
    if (k_begin >= hi_max || (k_end <= lo_min && k_begin >= first)) return TileKind::Skip;
    return lo_max <= k_begin && k_end <= hi_min ? TileKind::Full : TileKind::Partial;
  }
};

// Row q sees the keys [lo(q), hi(q)), and of the first keys those before hi(q); both limits never decrease in q. Full,
// causal and sliding-window attention, with sink tokens or without, are this one mask. Widths of kUnbounded and more
// are no limit.
struct IntervalMask {
  static constexpr int64_t kUnbounded = int64_t{1} << 40;

  int64_t left = kUnbounded;
  int64_t right = kUnbounded;
  int64_t shift = 0;
  int64_t first = 0;  // keys that stay visible however far the window is

  FLASHX_CORE int64_t lo(int64_t q, int64_t k_len) const {
    if (left >= kUnbounded) return 0;
    const int64_t low = clamp<int64_t>(q + shift - left, 0, k_len);
    return low <= first ? 0 : low;  // the first keys and the window are one interval
  }
  FLASHX_CORE int64_t hi(int64_t q, int64_t k_len) const {
    return right >= kUnbounded ? k_len : clamp<int64_t>(q + shift + right + 1, 0, k_len);
  }

  // Of the rows [q_first, q_last].
  FLASHX_CORE Limits limits(int64_t q_first, int64_t q_last, int64_t k_len) const {
    return {lo(q_first, k_len), lo(q_last, k_len), hi(q_first, k_len), hi(q_last, k_len), smaller(first, k_len)};
  }
  FLASHX_CORE TileKind kind(int64_t q_first, int64_t q_last, int64_t k_begin, int64_t k_end, int64_t k_len) const {
    return limits(q_first, q_last, k_len).kind(k_begin, k_end);
  }

  // The rows that see any of the keys [k_begin, k_end) lie in [first_row, end_row).
  FLASHX_CORE int64_t first_row(int64_t k_begin, int64_t q_len) const {
    return right >= kUnbounded ? 0 : clamp<int64_t>(k_begin - shift - right, 0, q_len);
  }
  FLASHX_CORE int64_t end_row(int64_t k_begin, int64_t k_end, int64_t q_len) const {
    return left >= kUnbounded || k_begin < first ? q_len : clamp<int64_t>(k_end - shift + left, 0, q_len);
  }
};

// A block mask (flashx/block_mask.py): for each block of queries and keys whether it is hidden, visible, or which
// bitmap says so element by element. Rows and columns of the map are the schedules of the forward and of the backward;
// what it holds is never trusted: an entry without a bitmap hides.
struct BlockMap {
  static constexpr int kPiece = 16;  // block sizes are multiples of this
  static constexpr int32_t kHidden = 0, kFull = 1, kBitmap = 2;

  const int32_t* map = nullptr;    // (batch, heads, q_blocks, k_blocks)
  const uint32_t* bits = nullptr;  // (bitmaps, q_block, words), lowest bit first
  int64_t batch = 0, head = 0;     // strides of the map; 0 where it broadcasts
  int64_t q_blocks = 0, k_blocks = 0, bitmaps = 0;
  int32_t q_block = 1, k_block = 1;

  FLASHX_CORE int32_t words() const { return (k_block + 31) / 32; }

  // `load` reads an element of the map or the bits.
  template <typename Load>
  FLASHX_CORE int32_t entry(Load load, int64_t b, int64_t h, int64_t q_index, int64_t k_index) const {
    if (q_index >= q_blocks || k_index >= k_blocks) return kHidden;
    const int32_t found = load(map + (b * batch + h * head + q_index * k_blocks + k_index));
    return found < 0 || found >= kBitmap + bitmaps ? kHidden : found;
  }

  // Bit i: whether query q sees key k + i, i < 16; k is a multiple of 16. Index: what positions fit, for cheap
  // division.
  template <typename Index = int64_t, typename Load>
  FLASHX_CORE uint32_t piece(Load load, int64_t b, int64_t h, Index q, Index k) const {
    const Index q_size = static_cast<Index>(q_block), k_size = static_cast<Index>(k_block);
    const int32_t found = entry(load, b, h, q / q_size, k / k_size);
    if (found < kBitmap) return found == kFull ? 0xffff : 0;
    const int32_t column = static_cast<int32_t>(k % k_size);
    const int64_t row = int64_t{found - kBitmap} * q_block + q % q_size;
    return load(bits + (row * words() + column / 32)) >> column % 32 & 0xffff;
  }
};

}  // namespace flashx
