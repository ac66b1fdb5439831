// Tiles on their way between tensors and registers: packed query rows, key tiles, and the logits of a tile.
//
// Scores are kept transposed, S^T[key][row]: query rows are vector lanes. Running max, running sum and
// rescaling are then plain vector operations, K and V are read as they lie, and only Q is transposed, once
// per row block.
#pragma once

#include "core/philox.h"
#include "core/problem.h"
#include "core/schedule.h"
#include "core/softmax.h"
#include "cpu/arena.h"
#include "cpu/math.h"
#include "cpu/operands.h"

namespace flashx::FLASHX_ISA {

// Rows of a row block: the lanes of one register block.
template <typename W>
constexpr int kBlockLanes = Operands<W>::kVectors * kLanes<ComputeOf<W>>;

// Keys of a key tile: with 4 row blocks and head dim 128, tiles of Q, K, V and O fill half of a 1 MiB L2 cache.
constexpr int kTileKeys = 128;

// Keys that the tiles of a problem have room for.
template <typename W>
int tile_room(const Problem& problem) {
  return static_cast<int>(smaller<int64_t>(kTileKeys, round_up(problem.k_len, Operands<W>::kKeyStep)));
}

// Row packing: packed row r is query r / heads of head first_head + r % heads. The heads of a group (GQA)
// thereby share the key tiles they read, and rows keep the order of their positions, which is what schedules
// need.
struct RowPacking {
  int64_t batch, first_head, heads, kv_head;

  FLASHX_CORE int64_t query(int64_t row) const { return row / heads; }
  FLASHX_CORE int64_t head(int64_t row) const { return first_head + row % heads; }
};

// Up to kBlockLanes packed rows and what their positions mean.
template <typename W>
struct RowBlock {
  using T = ComputeOf<W>;

  int64_t first;  // packed row of lane 0
  int count, vectors;
  int64_t q_first, q_last;
  int64_t lo[kBlockLanes<W>], hi[kBlockLanes<W>];  // visible keys of each lane; none for lanes past count
  int64_t diagonal[kBlockLanes<W>];                // key at distance 0
  T slope[kBlockLanes<W>];                         // ALiBi

  void place(const Problem& problem, const RowPacking& packing, int64_t first_row, int rows) {
    first = first_row, count = rows;
    vectors = static_cast<int>(round_up(ceil_div(rows, kLanes<T>), Operands<W>::kVectorStep));
    q_first = packing.query(first), q_last = packing.query(first + rows - 1);
    for (int lane = 0; lane < kBlockLanes<W>; ++lane) {
      const int64_t q = packing.query(first + lane);
      const bool real = lane < count;
      lo[lane] = real ? problem.mask.lo(q, problem.k_len) : 0;
      hi[lane] = real ? problem.mask.hi(q, problem.k_len) : 0;
      diagonal[lane] = q + problem.mask.shift;
      if (problem.alibi_slopes && real) {
        const T* slopes = static_cast<const T*>(problem.alibi_slopes) + packing.batch * problem.alibi_batch_stride;
        slope[lane] = slopes[packing.head(first + lane)];
      } else {
        slope[lane] = 0;
      }
    }
  }
};

// The part of a key tile that a row block sees, from `offset` in the tile on.
struct KeyRange {
  int offset;
  int count;   // keys that exist
  int padded;  // keys computed; like offset, a multiple of the operands' key step
  bool full;   // every row sees every computed key

  template <typename W>
  static KeyRange of(const Problem& problem, const RowBlock<W>& block, KeyTile tile) {
    return KeyRange(problem.mask, problem.k_len, block.q_first, block.q_last, tile, Operands<W>::kKeyStep);
  }

 private:
  KeyRange(const IntervalMask& mask, int64_t k_len, int64_t q_first, int64_t q_last, KeyTile tile, int step) {
    const int64_t lo = larger(mask.lo(q_first, k_len), tile.begin);
    const int64_t hi = smaller(mask.hi(q_last, k_len), tile.end);
    offset = static_cast<int>((lo - tile.begin) / step * step);
    padded = hi > lo ? static_cast<int>(round_up(hi - tile.begin - offset, step)) : 0;
    count = static_cast<int>(smaller<int64_t>(padded, tile.end - tile.begin - offset));
    const int64_t begin = tile.begin + offset;
    full = mask.kind(q_first, q_last, begin, begin + padded, k_len) == TileKind::Full;
  }
};

// `dim` elements as W, then zeros up to ld.
template <typename E, typename W>
FLASHX_CORE void load_padded_row(const E* from, int dim, W* to, int64_t ld) {
  if constexpr (std::is_same_v<E, W>) {
    std::memcpy(to, from, dim * sizeof(W));
  } else {
    load_row(from, dim, to);
  }
  std::memset(to + dim, 0, (ld - dim) * sizeof(W));
}

// Rows of (batch, head, length, dim) tensors that a block packs, as W, row-major; lanes past count are zero.
template <typename E, typename W>
void load_rows(const View& view, const RowPacking& packing, const RowBlock<W>& block, int dim, W* to, int64_t ld) {
  for (int lane = 0; lane < block.count; ++lane) {
    const int64_t row = block.first + lane;
    load_padded_row(view.at<E>(packing.batch, packing.head(row), packing.query(row)), dim, to + lane * ld, ld);
  }
  const int64_t rest = block.vectors * kLanes<ComputeOf<W>> - block.count;
  std::memset(to + block.count * ld, 0, rest * ld * sizeof(W));
}

// The transposed tile [dim][lane], times a factor per lane, back into the tensor.
template <typename E, typename W, typename T = ComputeOf<W>>
void store_rows(const T* from, const T* factor, const RowPacking& packing, const RowBlock<W>& block, int dim,
                int64_t ld, T* scratch, const View& view) {
  transpose(from, kBlockLanes<W>, static_cast<int>(ld), block.vectors * kLanes<T>, scratch, ld);
  for (int lane = 0; lane < block.count; ++lane) {
    T* row = scratch + lane * ld;
    for (int d = 0; d < ld; d += kLanes<T>) store(row + d, load(row + d) * factor[lane]);
    const int64_t packed = block.first + lane;
    store_row(row, dim, view.at<E>(packing.batch, packing.head(packed), packing.query(packed)));
  }
}

// Keys or values [tile.begin, tile.end) as W, row-major; zeros up to the next whole step (leftovers there would be
// hidden, but could be denormals, which are slow).
template <typename E, typename W>
void load_tile(const View& view, int64_t batch, int64_t kv_head, KeyTile tile, int dim, W* to, int64_t ld) {
  const int64_t keys = tile.end - tile.begin;
  for (int64_t k = 0; k < keys; ++k) load_padded_row(view.at<E>(batch, kv_head, tile.begin + k), dim, to + k * ld, ld);
  std::memset(to + keys * ld, 0, (round_up(keys, Operands<W>::kKeyStep) - keys) * ld * sizeof(W));
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

  // True if the scores are hidden by nothing but intervals: logits are then unit() times the scores.
  bool plain() const { return plain_; }
  // True if only the interval mask hides: a full KeyRange then has no hidden element.
  bool only_intervals() const { return !problem_.bias.data; }

  // What the scores must still be multiplied with to be logits: Q is negated for a negative scale, so that the largest
  // score is the largest logit. And to be logits in log2 units.
  T unit() const { return plain_ ? static_cast<T>(magnitude()) : T(1); }
  T factor() const { return plain_ ? static_cast<T>(magnitude() * kLog2e) : static_cast<T>(kLog2e); }
  bool negates_query() const { return problem_.scale < 0; }

  // slope, if given, receives d(softcapped score) / d(scaled score).
  void operator()(const RowPacking& packing, const RowBlock<W>& block, int64_t k_begin, const KeyRange& range,
                  T* scores, T* slope) {
    constexpr int n = kLanes<T>, ld = kBlockLanes<W>;
    if (!plain_) {
      if (problem_.bias.data) load_bias(packing, block, k_begin, range);
      const T scale = static_cast<T>(magnitude());
      const T cap = static_cast<T>(problem_.softcap), inverse_cap = cap == 0 ? T(0) : 1 / cap;
      for (int v = 0; v < block.vectors; ++v) {
        Vec<T> distance, alibi = load(block.slope + v * n);
        for (int i = 0; i < n; ++i) distance[i] = static_cast<T>(block.diagonal[v * n + i] - k_begin);
        for (int j = 0; j < range.padded; ++j) {
          T* at = scores + j * ld + v * n;
          Vec<T> x = load(at) * scale;
          if (cap != 0) {
            const Vec<T> t = tanh(x * inverse_cap);
            x = cap * t;
            if (slope) store(slope + j * ld + v * n, 1 - t * t);
          }
          if (problem_.alibi_slopes) {
            const Vec<T> d = distance - static_cast<T>(j);
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
    if (!range.full) hide(block, k_begin, range, scores);
  }

 private:
  double magnitude() const { return problem_.scale < 0 ? -problem_.scale : problem_.scale; }

  void hide(const RowBlock<W>& block, int64_t k_begin, const KeyRange& range, T* scores) const {
    constexpr int n = kLanes<T>;
    for (int v = 0; v < block.vectors; ++v) {
      Mask<T> lo, hi;
      for (int i = 0; i < n; ++i) {
        lo[i] = static_cast<IntOf<T>>(clamp<int64_t>(block.lo[v * n + i] - k_begin, 0, range.padded));
        hi[i] = static_cast<IntOf<T>>(clamp<int64_t>(block.hi[v * n + i] - k_begin, 0, range.padded));
      }
      for (int j = 0; j < range.padded; ++j) {
        T* at = scores + j * kBlockLanes<W> + v * n;
        const Mask<T> key = Mask<T>{} + static_cast<IntOf<T>>(j);
        store(at, (key >= lo) & (key < hi) ? load(at) : broadcast(-kInf<T>));
      }
    }
  }

  // bias_[key][lane]. Rows are read along the keys and transposed; one row serves all lanes where it
  // broadcasts.
  void load_bias(const RowPacking& packing, const RowBlock<W>& block, int64_t k_begin, const KeyRange& range) {
    constexpr int n = kLanes<T>, ld = kBlockLanes<W>;
    const Bias& bias = problem_.bias;
    const bool one_row = bias.stride[2] == 0 && (packing.heads == 1 || bias.stride[1] == 0);
    const int rows = one_row ? 1 : block.count;
    for (int lane = 0; lane < rows; ++lane) {
      const int64_t row = block.first + lane;
      const int64_t start = packing.batch * bias.stride[0] + packing.head(row) * bias.stride[1] +
                            packing.query(row) * bias.stride[2] + k_begin * bias.stride[3];
      T* to = bias_rows_ + lane * kTileKeys;
      switch (bias.dtype) {
        case DType::Float32:
          load_bias_row<float>(start, range.count, to);
          break;
        case DType::Float64:
          load_bias_row<double>(start, range.count, to);
          break;
        case DType::Float16:
          load_bias_row<Half>(start, range.count, to);
          break;
        case DType::BFloat16:
          load_bias_row<BFloat16>(start, range.count, to);
          break;
        case DType::Bool:
          load_bias_row<bool>(start, range.count, to);
          break;
      }
    }
    if (one_row) {
      for (int j = 0; j < range.padded; ++j) {
        for (int v = 0; v < block.vectors; ++v) store(bias_ + j * ld + v * n, broadcast(bias_rows_[j]));
      }
    } else {
      transpose(bias_rows_, kTileKeys, block.vectors * n, static_cast<int>(round_up(range.padded, n)), bias_, ld);
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
void dropout_factors(const Problem& problem, const RowPacking& packing, const RowBlock<W>& block, int64_t k_begin,
                     const KeyRange& range, T* factor) {
  const Philox philox(problem.seed);
  const uint64_t threshold = dropout_threshold(problem.dropout_p);
  const T kept = problem.dropout_p < 1 ? static_cast<T>(1 / (1 - problem.dropout_p)) : T(0);
  std::memset(factor, 0, range.padded * kBlockLanes<W> * sizeof(T));
  for (int64_t four = k_begin / 4; four * 4 < k_begin + range.count; ++four) {
    for (int lane = 0; lane < block.count; ++lane) {
      const int64_t row = block.first + lane;
      const int64_t head = packing.batch * problem.q_heads + packing.head(row);
      uint32_t words[4];
      philox(static_cast<uint32_t>(four), static_cast<uint32_t>(packing.query(row)), static_cast<uint32_t>(head),
             words);
      for (int i = 0; i < 4; ++i) {
        const int64_t j = four * 4 + i - k_begin;
        if (j >= 0 && j < range.padded) factor[j * kBlockLanes<W> + lane] = words[i] >= threshold ? kept : T(0);
      }
    }
  }
}

}  // namespace flashx::FLASHX_ISA
