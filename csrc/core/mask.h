// Masks: which keys a query row may see. From a mask come both the tile schedule (schedule.h) and the element
// mask.
#pragma once

#include "core/config.h"

namespace flashx {

enum class TileKind : uint8_t { Skip, Partial, Full };

// Row q sees the keys [lo(q), hi(q)); both limits never decrease in q. Full, causal and sliding-window
// attention are this one mask. Widths of kUnbounded and more are no limit.
struct IntervalMask {
  static constexpr int64_t kUnbounded = int64_t{1} << 40;

  int64_t left = kUnbounded;
  int64_t right = kUnbounded;
  int64_t shift = 0;

  FLASHX_CORE int64_t lo(int64_t q, int64_t k_len) const {
    return left >= kUnbounded ? 0 : clamp<int64_t>(q + shift - left, 0, k_len);
  }
  FLASHX_CORE int64_t hi(int64_t q, int64_t k_len) const {
    return right >= kUnbounded ? k_len : clamp<int64_t>(q + shift + right + 1, 0, k_len);
  }

  // How the keys [k_begin, k_end) look to the query rows [q_first, q_last]. k_end may reach past the keys (a
  // ragged last tile): such a tile is never Full, since hi is clamped to k_len.
  FLASHX_CORE TileKind kind(int64_t q_first, int64_t q_last, int64_t k_begin, int64_t k_end, int64_t k_len) const {
    if (k_end <= lo(q_first, k_len) || k_begin >= hi(q_last, k_len)) return TileKind::Skip;
    if (lo(q_last, k_len) <= k_begin && k_end <= hi(q_first, k_len)) return TileKind::Full;
    return TileKind::Partial;
  }

  // The rows that see any of the keys [k_begin, k_end) lie in [first_row, end_row).
  FLASHX_CORE int64_t first_row(int64_t k_begin, int64_t q_len) const {
    return right >= kUnbounded ? 0 : clamp<int64_t>(k_begin - shift - right, 0, q_len);
  }
  FLASHX_CORE int64_t end_row(int64_t k_end, int64_t q_len) const {
    return left >= kUnbounded ? q_len : clamp<int64_t>(k_end - shift + left, 0, q_len);
  }
};

}  // namespace flashx
