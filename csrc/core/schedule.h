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

// for (KeyTile tile : RowSchedule(...)): the visible key tiles of the query rows [q_first, q_last], left to
// right. Tile borders are multiples of tile_len counted from key 0, whatever the rows: a row's result does
// not depend on what it is tiled with.
class RowSchedule {
 public:
  FLASHX_CORE RowSchedule(const IntervalMask& mask, int64_t k_len, int64_t q_first, int64_t q_last, int64_t tile_len)
      : mask_(mask), k_len_(k_len), q_first_(q_first), q_last_(q_last), tile_len_(tile_len) {
    const int64_t lo = mask.lo(q_first, k_len);
    const int64_t hi = mask.hi(q_last, k_len);
    first_ = lo / tile_len;
    last_ = lo < hi ? ceil_div(hi, tile_len) : first_;
  }

  struct Iterator {
    const RowSchedule* schedule;
    int64_t index;
    FLASHX_CORE KeyTile operator*() const { return schedule->tile(index); }
    FLASHX_CORE void operator++() { ++index; }
    FLASHX_CORE bool operator!=(const Iterator& other) const { return index != other.index; }
  };
  // Index of the first tile, and one past the last.
  FLASHX_CORE int64_t first() const { return first_; }
  FLASHX_CORE int64_t last() const { return last_; }
  FLASHX_CORE Iterator begin() const { return {this, first_}; }
  FLASHX_CORE Iterator end() const { return {this, last_}; }

 private:
  FLASHX_CORE KeyTile tile(int64_t index) const {
    const int64_t begin = index * tile_len_;
    const int64_t end = begin + tile_len_;
    return {begin, smaller(end, k_len_), mask_.kind(q_first_, q_last_, begin, end, k_len_)};
  }

  const IntervalMask& mask_;
  int64_t k_len_, q_first_, q_last_, tile_len_, first_, last_;
};

// The transposed schedule: the query rows [begin, end) that see any of the keys [k_begin, k_end); rows in
// between may still see none of them only where the mask hides every key from them.
struct ColumnSchedule {
  int64_t begin, end;

  FLASHX_CORE ColumnSchedule(const IntervalMask& mask, int64_t q_len, int64_t k_begin, int64_t k_end)
      : begin(mask.first_row(k_begin, q_len)), end(mask.end_row(k_end, q_len)) {}
};

}  // namespace flashx
