// Tiles on their way between tensors and registers: packed query rows, key tiles, and the logits of a tile.
//
// Scores are kept transposed, S^T[key][row]: query rows are vector lanes. Running max, running sum and
// rescaling are then plain vector operations, K and V are read as they lie, and only Q is transposed, once
// per row block.
#pragma once

#include "core/philox.h"
#include "core/softmax.h"
#include "cpu/arena.h"
#include "cpu/math.h"
#include "cpu/rows.h"

namespace flashx::FLASHX_ISA {

#if FLASHX_BF16 == 2
template <typename E, int n>
FLASHX_CORE void load_planes(const E* from, int dim, Planes<n>* to, int64_t ld, bool exactly) {
  constexpr int kWords = kLanes<float>;
  for (int d = 0; d < ld; d += kPlaneBlock) {
    float edge[kPlaneBlock];
    const bool whole = d + kPlaneBlock <= dim;
    if (!whole || exactly) {
      const int count = clamp(dim - d, 0, kPlaneBlock);
      load_row(from + d, count, edge);
      std::memset(edge + count, 0, (kPlaneBlock - count) * sizeof(float));
    }
    if (exactly) {
      split_exactly<n>(edge, plane(to + d, 0));
    } else if (whole) {
      split<n>(load_as(from + d, float{}), load_as(from + d + kWords, float{}), plane(to + d, 0));
    } else {
      split<n>(load(edge), load(edge + kWords), plane(to + d, 0));
    }
  }
}
#endif

// `dim` elements as W, then zeros up to ld.
template <typename E, typename W>
FLASHX_CORE void load_padded_row(const E* from, int dim, W* to, int64_t ld, bool exactly = false) {
  if constexpr (kPlanes<W> > 1) {
    load_planes(from, dim, to, ld, exactly);
    return;
  } else if constexpr (std::is_same_v<E, W>) {
    std::memcpy(to, from, dim * sizeof(W));
  } else {
    load_row(from, dim, to);
  }
  if (dim < ld) std::memset(to + dim, 0, (ld - dim) * sizeof(W));
}

// fill(exactly) for rows whose outliers are wanted, or nobody's business.
template <typename W, typename F>
void fill_rows(const W* to, int rows, int64_t ld, Outliers* outliers, F fill) {
  if constexpr (kPlanes<W> > 1) {
    fill_planes(to, rows, ld, *outliers, fill);
  } else {
    fill(false);
  }
}

// Rows of (batch, head, length, dim) tensors that a block packs, as W, row-major; lanes past count are zero.
template <typename E, typename W>
void load_rows(const View& view, const RowBlock<W>& block, int dim, W* to, int64_t ld, Outliers* outliers) {
  const int64_t rest = block.vectors * kLanes<ComputeOf<W>> - block.count;
  std::memset(to + block.count * ld, 0, rest * ld * sizeof(W));
  fill_rows(to, block.count, ld, outliers, [&](bool exactly) {
    for (int lane = 0; lane < block.count; ++lane) {
      const Row& row = block.rows[lane];
      load_padded_row(view.at<E>(row.b, row.head, row.tensor_row), dim, to + lane * ld, ld, exactly);
    }
  });
}

// The transposed tile [dim][lane], times a factor per lane, back into the tensor, or added to what is there.
template <typename E, typename W, typename T = ComputeOf<W>>
void store_rows(const T* from, const T* factor, const RowBlock<W>& block, int dim, int64_t ld, T* scratch,
                const View& view, bool adds = false) {
  transpose(from, kBlockLanes<W>, static_cast<int>(ld), block.vectors * kLanes<T>, scratch, ld);
  for (int lane = 0; lane < block.count; ++lane) {
    const Row& row = block.rows[lane];
    T* scaled = scratch + lane * ld;
    for (int d = 0; d < ld; d += kLanes<T>) store(scaled + d, load(scaled + d) * factor[lane]);
    if (adds) {
      T* to = view.at<T>(row.b, row.head, row.tensor_row);
      for (int d = 0; d < dim; ++d) to[d] += scaled[d];
    } else {
      store_row(scaled, dim, view.at<E>(row.b, row.head, row.tensor_row));
    }
  }
}

// A tile's keys or values as W, row-major; zeros up to the next whole step (leftovers there would be hidden, but could
// be denormals, which are slow).
template <typename E, typename W>
void load_tile(const View& view, const RowPacking& packing, const Tile& tile, int dim, W* to, int64_t ld,
               Outliers* outliers) {
  const KeyRows rows(packing);
  std::memset(to + tile.count * ld, 0, (round_up(tile.count, Operands<W>::kKeyStep) - tile.count) * ld * sizeof(W));
  fill_rows(to, tile.count, ld, outliers, [&](bool exactly) {
    for (int i = 0; i < tile.count; ++i) load_padded_row(rows.at<E>(view, tile.key(i)), dim, to + i * ld, ld, exactly);
  });
}

// A tile's keys or values, in runs of neighbours [begin, begin + count) of the tile: where they lie in memory, if that
// is as load_tile would leave them, or one run of copies.
template <typename W>
struct Runs {
  struct Run {
    int begin, count;
    const W* rows;
  };
  int size = 0;
  bool copied = false;
  Outliers outliers;  // among the tile's keys
  Run runs[Tile::kPieces];

  template <typename E>
  void find(const View& view, const RowPacking& packing, const Tile& tile, int dim, W* room, int64_t ld) {
    constexpr int kStep = Operands<W>::kKeyStep;
    size = 0, copied = false;
    if constexpr (std::is_same_v<E, W>) {
      bool fits = dim == ld && view.row == ld && !packing.problem->pages.table;
      if (fits) {
        const KeyRows rows(packing);
        tile.runs(0, tile.count, [&](int i, int64_t key, int count) {
          fits &= count % kStep == 0;
          runs[size++] = {i, count, rows.at<E>(view, key)};
        });
      }
      if (fits) return;
    }
    copy<E>(view, packing, tile, dim, room, ld);
  }

  template <typename E>
  void copy(const View& view, const RowPacking& packing, const Tile& tile, int dim, W* room, int64_t ld) {
    constexpr int kStep = Operands<W>::kKeyStep;
    load_tile<E>(view, packing, tile, dim, room, ld, &outliers);
    size = 0, copied = true;
    bool whole = true;  // then cut as in find: sums, run by run, do not show where the rows lie
    tile.runs(0, tile.count, [&](int i, int64_t /*key*/, int count) {
      whole &= count % kStep == 0;
      runs[size++] = {i, count, room + i * ld};
    });
    if (whole) return;
    size = 1;
    runs[0] = {0, static_cast<int>(round_up(tile.count, kStep)), room};
  }

  // f(index in the tile, count, rows) for what of the runs lies within the tile's [begin, begin + count).
  template <typename F>
  void within(int begin, int count, int64_t ld, F f) const {
    for (int r = 0; r < size; ++r) {
      const int from = larger(runs[r].begin, begin), to = smaller(runs[r].begin + runs[r].count, begin + count);
      if (from < to) f(from, to - from, runs[r].rows + (from - runs[r].begin) * ld);
    }
  }
};

// One element, whatever it is made of.
template <typename W>
ComputeOf<W> get(const W* from, int64_t i) {
  ComputeOf<W> x;
  load_row(from + i, 1, &x);
  return x;
}
template <typename W>
void set_zero(W* to, int64_t i) {
  to[i] = W{};
}

// True if any of the elements is NaN or inf.
template <typename W>
bool has_nonfinite(const W* from, int64_t count) {
  using T = ComputeOf<W>;
  Mask<T> found = {};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> v = load_as(from + i, T{});
    found |= (v - v) != 0;  // NaN for NaN and inf
  }
  return any(found);
}

// Queries are negated for a negative scale.
template <typename W>
void negate(W* p, int64_t count) {
  using T = ComputeOf<W>;
  for (int64_t i = 0; i < count; i += kLanes<T>) store_as(p + i, -load_as(p + i, T{}));
}

// Turns raw scores S^T into logits, hidden ones -inf: scale, softcap, ALiBi, bias, masks.
template <typename W>
class Logits {
  using T = ComputeOf<W>;

 public:
  Logits(const Problem& problem, Arena& arena) : problem_(problem) {
    plain_ = !problem.bias.data && problem.softcap == 0 && !problem.alibi_slopes && problem.scale != 0;
    if (problem.bias.data) {
      bias_ = arena.take<T>(kTileKeys * kBlockLanes<W>);
      bias_rows_ = arena.take<T>(kBlockLanes<W> * kTileKeys);
    }
  }
  static size_t bytes(const Problem& problem) {
    return problem.bias.data ? 2 * kTileKeys * kBlockLanes<W> * sizeof(T) + 2 * Arena::kAlign : 0;
  }

  // True if the scores are hidden by nothing but masks: logits are then unit() times the scores.
  bool plain() const { return plain_; }
  // True if only the interval and block masks hide: a full KeyRange then has no hidden element.
  bool only_masks() const { return !problem_.bias.data; }

  // What the scores must still be multiplied with to be logits: Q is negated for a negative scale, so that the largest
  // score is the largest logit. And to be logits in log2 units.
  T unit() const { return plain_ ? static_cast<T>(magnitude()) : T(1); }
  T factor() const { return plain_ ? static_cast<T>(magnitude() * kLog2e) : static_cast<T>(kLog2e); }
  bool negates_query() const { return problem_.scale < 0; }

  // slope, if given, receives d(softcapped score) / d(scaled score).
  void operator()(const RowBlock<W>& block, const Tile& tile, const KeyRange& range, T* scores, T* slope) {
    constexpr int n = kLanes<T>, ld = kBlockLanes<W>;
    if (!plain_) {
      if (problem_.bias.data) load_bias(block, tile, range);
      const T scale = static_cast<T>(magnitude());
      const T cap = static_cast<T>(problem_.softcap), inverse_cap = cap == 0 ? T(0) : 1 / cap;
      const int64_t origin = tile.first_key[0];
      for (int v = 0; v < block.vectors; ++v) {
        Vec<T> distance, alibi = load(block.slope + v * n);
        for (int i = 0; i < n; ++i) distance[i] = static_cast<T>(block.diagonal[v * n + i] - origin);
        for (int j = 0; j < range.padded; ++j) {
          T* at = scores + j * ld + v * n;
          Vec<T> x = load(at) * scale;
          if (cap != 0) {
            const Vec<T> t = tanh(x * inverse_cap);
            x = cap * t;
            if (slope) store(slope + j * ld + v * n, 1 - t * t);
          }
          if (problem_.alibi_slopes && j < range.count) {
            const Vec<T> d = distance - static_cast<T>(tile.key(range.offset + j) - origin);
            x -= alibi * (d < 0 ? -d : d);
          }
          if (problem_.bias.data) {
            const Vec<T> bias = load(bias_ + j * ld + v * n);
            x = bias == -kInf<T> ? bias : x + bias;
          }
          store(at, x);
        }
      }
    }
    if (!range.full) hide(block, tile, range, scores);
  }

 private:
  double magnitude() const { return problem_.scale < 0 ? -problem_.scale : problem_.scale; }

  void hide(const RowBlock<W>& block, const Tile& tile, const KeyRange& range, T* scores) const {
    constexpr int n = kLanes<T>;
    const auto index = [&](int64_t key) {
      return static_cast<int>(clamp(tile.before(key) - range.offset, 0, range.padded));
    };
    // Every row sees the keys between.
    const int all_begin = index(block.limits.lo_max), all_end = index(block.limits.hi_min);
    for (int v = 0; v < block.vectors; ++v) {
      Mask<T> lo, hi, leading;
      for (int i = 0; i < n; ++i) {
        const int lane = v * n + i;
        lo[i] = index(block.lo[lane]), hi[i] = index(block.hi[lane]), leading[i] = index(block.leading[lane]);
      }
      for (int j = 0; j < range.padded; ++j) {
        if (j == all_begin && all_begin < all_end) j = all_end;
        if (j == range.padded) break;
        T* at = scores + j * kBlockLanes<W> + v * n;
        const Mask<T> key = Mask<T>{} + static_cast<IntOf<T>>(j);
        store(at, (key < hi) & ((key >= lo) | (key < leading)) ? load(at) : broadcast(-kInf<T>));
      }
    }
    if (tile.partial) hide_blocks(block, tile, range, scores);
  }

  // What the block mask's bitmaps hide.
  void hide_blocks(const RowBlock<W>& block, const Tile& tile, const KeyRange& range, T* scores) const {
    constexpr int n = kLanes<T>, ld = kBlockLanes<W>;
    constexpr uint32_t kAll = (1u << Tile::kPiece) - 1;
    for (int p = range.offset / Tile::kPiece; p * Tile::kPiece < range.offset + range.count; ++p) {
      uint32_t seen[ld], all = kAll;
      for (int lane = 0; lane < ld; ++lane) {
        const Row& row = block.rows[lane];
        seen[lane] =
            lane < block.count ? problem_.blocks.piece(kLoad, row.b, row.head, row.query, tile.first_key[p]) : kAll;
        all &= seen[lane];
      }
      if (all == kAll) continue;
      const int first = p * Tile::kPiece - range.offset;
      for (int j = larger(first, 0); j < smaller(first + Tile::kPiece, range.padded); ++j) {
        for (int v = 0; v < block.vectors; ++v) {
          Mask<T> visible;
          for (int i = 0; i < n; ++i) visible[i] = seen[v * n + i] >> (j - first) & 1;
          T* at = scores + j * ld + v * n;
          store(at, visible != 0 ? load(at) : broadcast(-kInf<T>));
        }
      }
    }
  }

  // bias_[key][lane]. Rows are read along the keys and transposed; one row serves all lanes where it
  // broadcasts.
  void load_bias(const RowBlock<W>& block, const Tile& tile, const KeyRange& range) {
    constexpr int n = kLanes<T>, ld = kBlockLanes<W>;
    const Bias& bias = problem_.bias;
    const bool one_row = bias.stride[2] == 0 && (problem_.group() == 1 || bias.stride[1] == 0);
    const int rows = one_row ? 1 : block.count;
    for (int lane = 0; lane < rows; ++lane) {
      const Row& row = block.rows[lane];
      const int64_t start = row.b * bias.stride[0] + row.head * bias.stride[1] + row.query * bias.stride[2];
      tile.runs(range.offset, range.count, [&](int i, int64_t key, int count) {
        load_bias_keys(start + key * bias.stride[3], count, bias_rows_ + lane * kTileKeys + i - range.offset);
      });
    }
    // Lanes past the last row are summed over too, with weights of 0: they must be finite.
    for (int lane = rows; !one_row && lane < block.vectors * n; ++lane) {
      std::memset(bias_rows_ + lane * kTileKeys, 0, round_up(range.padded, n) * sizeof(T));
    }
    if (one_row) {
      for (int j = 0; j < range.padded; ++j) {
        for (int v = 0; v < block.vectors; ++v) store(bias_ + j * ld + v * n, broadcast(bias_rows_[j]));
      }
    } else {
      transpose(bias_rows_, kTileKeys, block.vectors * n, static_cast<int>(round_up(range.padded, n)), bias_, ld);
    }
  }

  void load_bias_keys(int64_t start, int count, T* to) const {
    switch (problem_.bias.dtype) {
      case DType::Float32:
        return load_bias_row<float>(start, count, to);
      case DType::Float64:
        return load_bias_row<double>(start, count, to);
      case DType::Float16:
        return load_bias_row<Half>(start, count, to);
      case DType::BFloat16:
        return load_bias_row<BFloat16>(start, count, to);
      case DType::Bool:
        return load_bias_row<bool>(start, count, to);
    }
  }

  template <typename E>
  void load_bias_row(int64_t start, int count, T* to) const {
    const int64_t stride = problem_.bias.stride[3];
    const E* from = static_cast<const E*>(problem_.bias.data) + start;
    E gathered[kTileKeys];
    if (stride != 1) {
      for (int j = 0; j < count; ++j) gathered[j] = from[j * stride];
      from = gathered;
    }
    if constexpr (std::is_same_v<E, bool>) {
      for (int j = 0; j < count; ++j) to[j] = from[j] ? T(0) : -kInf<T>;
    } else if constexpr (std::is_same_v<ComputeOf<E>, T>) {
      load_row(from, count, to);
    } else if constexpr (std::is_floating_point_v<E>) {
      for (int j = 0; j < count; ++j) to[j] = static_cast<T>(from[j]);
    }
  }

  const Problem& problem_;
  bool plain_;
  T* bias_ = nullptr;
  T* bias_rows_ = nullptr;
};

// Dropout's factors for the weights of a tile: factor[key][lane] is 0 or 1 / (1 - p).
template <typename W, typename T = ComputeOf<W>>
void dropout_factors(const Problem& problem, const RowBlock<W>& block, const Tile& tile, const KeyRange& range,
                     T* factor) {
  const Philox philox(problem.seed);
  const uint64_t threshold = dropout_threshold(problem.dropout_p);
  const T kept = problem.dropout_p < 1 ? static_cast<T>(1 / (1 - problem.dropout_p)) : T(0);
  std::memset(factor, 0, range.padded * kBlockLanes<W> * sizeof(T));
  tile.runs(range.offset, range.count, [&](int index, int64_t key, int count) {
    T* run = factor + (index - range.offset) * kBlockLanes<W>;
    for (int64_t four = key / 4; four * 4 < key + count; ++four) {
      for (int lane = 0; lane < block.count; ++lane) {
        const Row& row = block.rows[lane];
        uint32_t words[4];
        philox(static_cast<uint32_t>(four), static_cast<uint32_t>(row.query),
               static_cast<uint32_t>(row.b * problem.q_heads + row.head), words);
        for (int i = 0; i < 4; ++i) {
          const int64_t j = four * 4 + i - key;
          if (j >= 0 && j < count) run[j * kBlockLanes<W> + lane] = words[i] >= threshold ? kept : T(0);
        }
      }
    }
  });
}

}  // namespace flashx::FLASHX_ISA
