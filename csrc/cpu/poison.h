// NaN and inf in values that some rows must not see. 0 * NaN is NaN, so a hidden value would leak through its weight of
// 0. Such values are taken out of a tile before its product, and their share is then added where the weight is not 0;
// or everywhere, if nothing is hidden (hides is false) and they are taken out because planes cannot hold them.
#pragma once

#include <vector>

#include "cpu/tile.h"

namespace flashx::FLASHX_ISA {

template <typename W>
class Poison {
  using T = ComputeOf<W>;
  static constexpr int ld = kBlockLanes<W>;

 public:
  // Takes NaN and inf out of rows[r][c], zeros in their place. Returns true if there were any: rare, so all that
  // follows may be slow.
  bool take(W* rows, int64_t rows_ld, int count, int columns) {
    found_.clear();
    if (!has_nonfinite(rows, count * rows_ld)) return false;
    for (int r = 0; r < count; ++r) {
      for (int c = 0; c < columns; ++c) {
        const T x = get(rows + r * rows_ld, c);
        if (x - x == 0) continue;
        found_.push_back({r, c, x});
        set_zero(rows + r * rows_ld, c);
      }
    }
    return !found_.empty();
  }

  bool empty() const { return found_.empty(); }
  void clear() { found_.clear(); }

  // Rows are the keys of weights[key][lane], from key `first` on: sums[column][lane] += weight * value.
  void add_to_columns(const T* weights, int first, int keys, T* sums, bool hides = true) const {
    for (const Value& value : found_) {
      if (value.row < first || value.row >= first + keys) continue;
      add(weights + (value.row - first) * ld, 1, ld, value.x, sums + value.column * ld, 1, hides);
    }
  }

  // Rows are the keys of weights[key][lane], from key `first` on: sums[lane][column] += weight * value.
  void add_to_lanes(const T* weights, int first, int keys, int lanes, T* sums, int64_t sums_ld) const {
    for (const Value& value : found_) {
      if (value.row < first || value.row >= first + keys) continue;
      add(weights + (value.row - first) * ld, 1, lanes, value.x, sums + value.column, sums_ld);
    }
  }

  // Rows are the lanes of weights[key][lane]: sums[key][column] += weight * value.
  void add_to_keys(const T* weights, int keys, T* sums, int64_t sums_ld, bool hides = true) const {
    for (const Value& value : found_) add(weights + value.row, ld, keys, value.x, sums + value.column, sums_ld, hides);
  }

 private:
  struct Value {
    int row, column;
    T x;
  };

  static void add(const T* weights, int64_t weight_step, int count, T x, T* sums, int64_t sum_step, bool hides = true) {
    for (int i = 0; i < count; ++i) {
      const T weight = weights[i * weight_step];
      if (weight != 0 || !hides) sums[i * sum_step] += weight * x;
    }
  }

  std::vector<Value> found_;
};

}  // namespace flashx::FLASHX_ISA
