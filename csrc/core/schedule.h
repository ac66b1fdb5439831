// Schedules: the tiles a row of query tiles (forward, dQ) or a column of key tiles (dK, dV) visits, and
// nothing else. This is where the IO-awareness is: a tile that no row sees is never named, so it is never
// read.
#pragma once

#include "core/mask.h"

namespace flashx {

struct KeyTile {
  int64_t begin, end;  // keys [begin, end)
  TileKind kind;       // seen by the whole row of tiles
};

// The visible key tiles of rows with these limits, left to right, by index:
//   for (int64_t i = schedule.first(); i < schedule.last(); i = schedule.next(i + 1)) schedule.tile(i)
// Tile borders are multiples of tile_len counted from key 0, whatever the rows: a row's result does not depend on what
// it is tiled with.
class RowSchedule {
 public:
  FLASHX_CORE RowSchedule(const Limits& limits, int64_t k_len, int64_t tile_len)
      : limits_(limits),
        k_len_(k_len),
        tile_len_(tile_len),
        leading_(ceil_div(smaller(limits.first, limits.hi_max), tile_len)),
        window_(limits.lo_min / tile_len),
        last_(larger(leading_, limits.lo_min < limits.hi_max ? ceil_div(limits.hi_max, tile_len) : 0)) {}
  FLASHX_CORE RowSchedule(const IntervalMask& mask, int64_t k_len, int64_t q_first, int64_t q_last, int64_t tile_len)
      : RowSchedule(mask.limits(q_first, q_last, k_len), k_len, tile_len) {}

  // The first visible tile's index, and one past the last's.
  FLASHX_CORE int64_t first() const { return next(0); }
  FLASHX_CORE int64_t last() const { return last_; }
  // Index of the first visible tile from `index` on; last() if there is none.
  FLASHX_CORE int64_t next(int64_t index) const {
    return smaller(index < leading_ ? index : larger(index, window_), last_);
  }

  // Visible tiles before the visible tile `index`.
  FLASHX_CORE int64_t rank(int64_t index) const {
    return index < leading_ ? index : leading_ + index - larger(leading_, window_);
  }

  FLASHX_CORE KeyTile tile(int64_t index) const {
    const int64_t begin = index * tile_len_;
    const int64_t end = begin + tile_len_;
    return {begin, smaller(end, k_len_), limits_.kind(begin, end)};
  }

  struct Iterator {
    const RowSchedule* schedule;
    int64_t index;
    FLASHX_CORE KeyTile operator*() const { return schedule->tile(index); }
    FLASHX_CORE void operator++() { index = schedule->next(index + 1); }
    FLASHX_CORE bool operator!=(const Iterator& other) const { return index != other.index; }
  };
  FLASHX_CORE Iterator begin() const { return {this, first()}; }
  FLASHX_CORE Iterator end() const { return {this, last_}; }

 private:
  Limits limits_;
  int64_t k_len_, tile_len_;
  int64_t leading_, window_, last_;  // tiles of the first keys; first one of the window; one past all
};

// The transposed schedule: the query rows [begin, end) that see any of the keys [k_begin, k_end); rows in
// between may still see none of them only where the mask hides every key from them.
struct ColumnSchedule {
  int64_t begin, end;

  FLASHX_CORE ColumnSchedule(const IntervalMask& mask, int64_t q_len, int64_t k_begin, int64_t k_end)
      : begin(mask.first_row(k_begin, q_len)), end(mask.end_row(k_begin, k_end, q_len)) {}
};

}  // namespace flashx
