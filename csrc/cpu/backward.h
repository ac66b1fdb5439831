// Backward by recomputation (Dao et al., "FlashAttention", section 3.1 and appendix B.4; "FlashAttention-2", 3.1.2):
//   P = exp(logits - lse), dV = P^T dO, dP = dO V^T, dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q.
// Key tiles own dK and dV and sweep the row blocks that see them. Where the tensors have the accumulation dtype, the
// same sweep adds to dQ, in the output itself, key tiles taking turns in order: five products. For 16-bit tensors that
// would need a float copy of dQ as long as the sequence, so row tiles own dQ in a sweep of their own: seven products.
// Either way nothing longer than a tile is held and the bits do not depend on the number of threads. dBias, if asked
// for, is swept by tiles of the bias.
#pragma once

#include "cpu/parallel.h"
#include "cpu/poison.h"
#include "cpu/tile.h"

namespace flashx::FLASHX_ISA {

// A row block's side of the backward and the step all three sweeps share: from Q, K, V, dO, lse and delta to
// P and dS.
template <typename E, typename W>
class Gradient {
 public:
  using T = ComputeOf<E>;
  using Op = Operands<W>;
  static constexpr int ld = kBlockLanes<W>;

  struct Rows {
    RowBlock<W> block;
    W* query;       // [lane][dim]
    W* query_t;     // right operand, summed over dim
    W* grad_out;    // [lane][value dim]
    W* grad_out_t;  // right operand, summed over value dim
    T lse[ld], delta[ld];
    Outliers query_outliers, grad_out_outliers;  // among the lanes
    bool finite;                                 // every delta is
  };

  Gradient(const Problem& problem, const BackwardTensors& tensors, int row_blocks)
      : problem(problem),
        tensors(tensors),
        dim(static_cast<int>(round_up(problem.head_dim, Op::kPad))),
        value_dim(static_cast<int>(round_up(problem.value_dim, Op::kPad))),
        arena(bytes(row_blocks)),
        logits(problem, arena) {
    key = arena.take<W>(kTileKeys * dim);
    value = arena.take<W>(kTileKeys * value_dim);
    clean_key_room = arena.take<W>(kTileKeys * dim);
    weights = arena.take<T>(kTileKeys * ld);
    grad_logits = arena.take<T>(kTileKeys * ld);
    tile_room = arena.take<W>(Op::room(kTileKeys, ld));
    operand_room = arena.take<W>(Op::room(kTileKeys, larger(dim, value_dim)));
    if (problem.softcap != 0) slope = arena.take<T>(kTileKeys * ld);
    if (problem.dropout_p > 0) dropout = arena.take<T>(kTileKeys * ld);
    rows = std::make_unique<Rows[]>(row_blocks);
    for (int i = 0; i < row_blocks; ++i) {
      rows[i].query = arena.take<W>(ld * dim);
      rows[i].query_t = arena.take<W>(dim * ld);
      rows[i].grad_out = arena.take<W>(ld * value_dim);
      rows[i].grad_out_t = arena.take<W>(value_dim * ld);
    }
  }

  void load_key_tile(const RowPacking& packing, const Tile& tile) {
    load_tile<E>(tensors.key, packing, tile, problem.head_dim, key, dim, &key_outliers);
    load_tile<E>(tensors.value, packing, tile, problem.value_dim, value, value_dim, &value_outliers);
    // Scores want the keys as they are, dQ wants them without NaN and inf.
    clean_key = key;
    poison.clear();
    if (has_nonfinite(key, tile.count * dim)) {
      std::memcpy(clean_key_room, key, kTileKeys * dim * sizeof(W));
      poison.take(clean_key_room, dim, tile.count, problem.head_dim);
      clean_key = clean_key_room;
    }
    if constexpr (kPlanes<W> > 1) {
      clean_key_outliers.clear(key_outliers.any && has_outliers(clean_key, tile.count * dim));
    }
  }

  void load_row_block(const RowPacking& packing, int64_t first, int count, Rows& to) {
    to.block.place(problem, packing, first, count);
    const int lanes = to.block.vectors * kLanes<T>;
    load_rows<E>(tensors.query, to.block, problem.head_dim, to.query, dim, &to.query_outliers);
    load_rows<E>(tensors.grad_out, to.block, problem.value_dim, to.grad_out, value_dim, &to.grad_out_outliers);
    to.finite = true;
    Op::right_from_columns(to.query, dim, lanes, dim, to.query_t, ld);
    Op::right_from_columns(to.grad_out, value_dim, lanes, value_dim, to.grad_out_t, ld);
    if (logits.negates_query()) negate(to.query_t, dim * ld);
    for (int lane = 0; lane < ld; ++lane) {
      const bool real = lane < count;
      const Row& row = to.block.rows[real ? lane : 0];
      const int64_t at = problem.row(row.b, row.head, row.tensor_row);
      to.lse[lane] = real ? backward_lse(static_cast<const T*>(tensors.lse)[at]) : kInf<T>;
      to.delta[lane] = real ? static_cast<const T*>(tensors.delta)[at] : T(0);
      to.finite &= std::isfinite(to.delta[lane]);
    }
  }

  // weights[key][lane] = P (after dropout), grad_logits[key][lane] = d loss / d logits (before softcap's slope).
  void operator()(const Rows& rows, const Tile& tile, const KeyRange& range) {
    constexpr int n = kLanes<T>;
    const RowBlock<W>& block = rows.block;
    // S^T = K Q^T, dP^T = V dO^T
    Op::template multiply<Layout::RowMajor>(range.padded, block.vectors, Op::depth(problem.head_dim, dim),
                                            key + range.offset * dim, dim, rows.query_t, Op::right_ld(ld), weights, ld,
                                            false, key_outliers.from(range.offset), rows.query_outliers.from(0));
    Op::template multiply<Layout::RowMajor>(range.padded, block.vectors, Op::depth(problem.value_dim, value_dim),
                                            value + range.offset * value_dim, value_dim, rows.grad_out_t,
                                            Op::right_ld(ld), grad_logits, ld, false, value_outliers.from(range.offset),
                                            rows.grad_out_outliers.from(0));
    logits(block, tile, range, weights, slope);
    if (dropout) dropout_factors(problem, block, tile, range, dropout);
    const T unit = logits.unit(), log2e = static_cast<T>(kLog2e);
    for (int v = 0; v < block.vectors; ++v) {
      const Vec<T> lse = load(rows.lse + v * n), delta = load(rows.delta + v * n);
      for (int j = 0; j < range.padded; ++j) {
        T* p_at = weights + j * ld + v * n;
        T* ds_at = grad_logits + j * ld + v * n;
        const Vec<T> logit = load(p_at);
        Vec<T> p = exp2<T>((logit * unit - lse) * log2e);
        Vec<T> dp = load(ds_at);
        Vec<T> dropped = p;
        if (dropout) {
          const Vec<T> kept = load(dropout + j * ld + v * n);
          dp *= kept;
          dropped *= kept;
        }
        // A hidden key's dP may be NaN; its dS is 0.
        const Vec<T> ds = logit == -kInf<T> ? Vec<T>{} : p * (dp - delta);
        store(p_at, dropped);
        store(ds_at, ds);
      }
    }
    // Lanes past the last row hold 0 times the keys and values, which may be infinite, and are summed over.
    for (int lane = block.count; lane < block.vectors * n; ++lane) {
      for (int j = 0; j < range.padded; ++j) weights[j * ld + lane] = grad_logits[j * ld + lane] = 0;
    }
  }

  // grad_logits' keys and lanes with elements that planes might lose. It has some where values, dO or delta do.
  void find_outliers(const Rows& rows, const KeyRange& range) {
    outlying_keys.clear(), outlying_lanes.clear();
    if (kPlanes<W> == 1 || (rows.finite && !value_outliers.any && !rows.grad_out_outliers.any)) return;
    std::fill_n(outlying_keys.at, Outliers::kMost, false), std::fill_n(outlying_lanes.at, Outliers::kMost, false);
    for (int j = 0; j < range.padded; ++j) {
      for (int lane = 0; lane < rows.block.vectors * kLanes<T>; ++lane) {
        const T x = grad_logits[j * ld + lane];
        if (!std::isinf(x) && (x == 0 || std::abs(x) >= kSmallestOfPlanes)) continue;
        outlying_keys.any = outlying_lanes.any = outlying_keys.at[j] = outlying_lanes.at[lane] = true;
      }
    }
  }

  // From d / d logits to d / d (scaled scores).
  void apply_softcap_slope(const KeyRange& range) {
    if (!slope) return;
    for (int i = 0; i < range.padded * ld; i += kLanes<T>) {
      const Vec<T> ds = load(grad_logits + i);
      store(grad_logits + i, ds == 0 ? ds : ds * load(slope + i));
    }
  }

  const Problem& problem;
  const BackwardTensors& tensors;
  int dim, value_dim;  // padded
  typename Op::Unit unit;
  Arena arena;
  Logits<W> logits;
  std::unique_ptr<Rows[]> rows;
  Poison<W> poison;                        // of the key tile
  Outliers key_outliers, value_outliers;   // among the tile's keys
  Outliers clean_key_outliers;             // all or none
  Outliers outlying_keys, outlying_lanes;  // of grad_logits
  W* key;                                  // [key][dim]
  W* clean_key_room;
  const W* clean_key;  // key, or a copy of it without NaN and inf
  W* value;            // [key][value dim]
  T* weights;          // [key][lane]
  T* grad_logits;      // [key][lane]
  W* tile_room;        // for either of the two as an operand
  W* operand_room;     // for K, Q or dO in another form
  T* slope = nullptr;
  T* dropout = nullptr;

 private:
  size_t bytes(int row_blocks) const {
    const int64_t dims = dim + value_dim;
    const int64_t operands =
        kTileKeys * (dims + dim) + Op::room(kTileKeys, ld) + 2 * Op::room(kTileKeys, dims) + row_blocks * 2 * ld * dims;
    // The sweeps' own sums: a key tile, or as many row blocks as there are.
    const int64_t sums = kTileKeys * (5 * ld + dims) + (row_blocks + 2) * ld * dims;
    return operands * sizeof(W) + sums * sizeof(T) + Logits<W>::bytes(problem) + (20 + 8 * row_blocks) * Arena::kAlign;
  }
};

// True if gradients can be summed in the tensors themselves, by key tiles that take turns. Which key tiles a row block
// sees must then follow from its limits; where more than one call adds to dQ, and for block masks, it has a sweep.
template <typename E>
bool sums_in_place(const Problem& problem, const BackwardTensors& tensors) {
  return std::is_same_v<E, ComputeOf<E>> && !problem.blocks.map && !problem.members && !tensors.adds_grad_query;
}

// Row blocks that a packing can have.
template <typename E>
int64_t most_row_blocks(const Problem& problem) {
  constexpr int kLeast =
      smaller(kBlockLanes<typename ProductOf<E>::Type>, kBlockLanes<typename WideProductOf<E>::Type>);
  return ceil_div(problem.q_len * problem.group(), kLeast);
}

// Owns dK and dV of one key tile; sweeps the row blocks that see it, and adds to their dQ where that can be in place.
template <typename E, typename W>
class GradKeyValue {
  using T = ComputeOf<E>;
  using Op = Operands<W>;
  static constexpr int ld = kBlockLanes<W>;

 public:
  GradKeyValue(const Problem& problem, const BackwardTensors& tensors)
      : step_(problem, tensors, 1), in_place_(sums_in_place<E>(problem, tensors)) {
    grad_key_ = step_.arena.template take<T>(kTileKeys * step_.dim);
    grad_value_ = step_.arena.template take<T>(kTileKeys * step_.value_dim);
    if (!in_place_) return;
    grad_query_ = step_.arena.template take<T>(round_up(ld, kBlockRows) * step_.dim);
    if constexpr (!Op::kDirect) {
      key_room_ = step_.arena.template take<W>(Op::room(kTileKeys, step_.dim));
      grad_query_t_ = step_.arena.template take<T>(step_.dim * ld);
    }
  }

  // Keys [k_begin, k_end) of the packing's. turns: one per row block of every (sequence, key head).
  void operator()(const RowPacking& packing, int64_t k_begin, int64_t k_end, Turns& turns) {
    const Problem& problem = step_.problem;
    Tile tile = Tile::of(k_begin, k_end);
    std::memset(grad_key_, 0, kTileKeys * step_.dim * sizeof(T));
    std::memset(grad_value_, 0, kTileKeys * step_.value_dim * sizeof(T));
    step_.load_key_tile(packing, tile);
    if (in_place_) {
      key_t_ = Op::left_from_columns(step_.clean_key, step_.dim, tile.count, step_.dim, key_room_,
                                     Op::left_ld(step_.dim, kTileKeys));
    }
    // Row blocks start at multiples of ld from row 0: which rows share a block does not depend on the tile.
    const ColumnSchedule queries = schedule(packing, k_begin, k_end);
    const int64_t step = packing.heads * packing.group.count, end = queries.end * step;
    for (int64_t first = queries.begin * step / ld * ld; first < end; first += ld) {
      const int count = static_cast<int>(smaller<int64_t>(ld, packing.count() - first));
      if (problem.blocks.map && !sees(BlockSight(packing, first, first + count - 1), k_begin, k_end)) continue;
      accumulate(packing, tile, first, count, turns);
    }
    const T scale = static_cast<T>(problem.scale);
    for (int i = 0; i < kTileKeys * step_.dim; ++i) grad_key_[i] *= scale;
    const KeyRows rows(packing);
    for (int i = 0; i < tile.count; ++i) {
      store_row(grad_key_ + i * step_.dim, problem.head_dim, rows.at<E>(step_.tensors.grad_key, k_begin + i));
      store_row(grad_value_ + i * step_.value_dim, problem.value_dim,
                rows.at<E>(step_.tensors.grad_value, k_begin + i));
    }
  }

 private:
  // The queries that see any of these keys, of any member.
  static ColumnSchedule schedule(const RowPacking& packing, int64_t k_begin, int64_t k_end) {
    const Problem& problem = *packing.problem;
    ColumnSchedule all(problem.mask_of(packing.keys), packing.keys.q_len, k_begin, k_end);
    for (int64_t m = 1; m < packing.group.count; ++m) {
      const Sequence member = problem.sequence(problem.member(packing.group.begin + m, kLoad), kLoad);
      const ColumnSchedule its(problem.mask_of(member), packing.keys.q_len, k_begin, k_end);
      all.begin = smaller(all.begin, its.begin), all.end = larger(all.end, its.end);
    }
    return all;
  }

  static bool sees(const BlockSight& sight, int64_t k_begin, int64_t k_end) {
    const int64_t step = sight.blocks->k_block;
    for (int64_t column = k_begin / step; column * step < k_end; ++column) {
      if (sight.kind(column) != TileKind::Skip) return true;
    }
    return false;
  }

  void accumulate(const RowPacking& packing, Tile& tile, int64_t first, int count, Turns& turns) {
    auto& rows = step_.rows[0];
    step_.load_row_block(packing, first, count, rows);
    const KeyRange range = KeyRange::of(rows.block, tile, packing);
    if (range.padded == 0) return;
    step_(rows, tile, range);
    const bool hides = !range.full || !step_.logits.only_masks();
    step_.apply_softcap_slope(range);
    step_.find_outliers(rows, range);
    // dV += P^T dO, dK += dS^T Q
    product(hides, range, rows.block, step_.weights, rows.grad_out, step_.value_dim, grad_value_,
            rows.grad_out_outliers, Outliers());
    product(hides, range, rows.block, step_.grad_logits, rows.query, step_.dim, grad_key_, rows.query_outliers,
            step_.outlying_keys);
    if constexpr (std::is_same_v<E, T>) {
      if (in_place_) add_grad_query(packing, tile, rows, range, turns);
    }
  }

  // dQ += dS K
  void add_grad_query(const RowPacking& packing, const Tile& tile, const typename Gradient<E, W>::Rows& rows,
                      const KeyRange& range, Turns& turns) {
    const Problem& problem = step_.problem;
    const RowBlock<W>& block = rows.block;
    const int lanes = static_cast<int>(round_up(block.count, kBlockRows));
    if constexpr (Op::kDirect) {
      Op::template multiply<Layout::ColumnMajor>(lanes, step_.dim / kLanes<T>, range.count, step_.grad_logits, ld,
                                                 key_t_ + range.offset * step_.dim, step_.dim, grad_query_, step_.dim,
                                                 false);
    } else {
      // dQ^T = K^T dS^T
      const int64_t key_ld = Op::left_ld(step_.dim, kTileKeys);
      const W* weights = Op::right_from_tile(step_.grad_logits, ld, range.padded, block.vectors, step_.tile_room,
                                             step_.outlying_lanes.any);
      Op::template multiply<Op::kTransposed>(
          step_.dim, block.vectors, range.padded, key_t_ + Op::left_offset(range.offset, key_ld), key_ld, weights,
          Op::right_ld(ld), grad_query_t_, ld, false, step_.clean_key_outliers.from(0), step_.outlying_lanes.from(0));
      transpose(grad_query_t_, ld, step_.dim, block.vectors * kLanes<T>, grad_query_, step_.dim);
    }
    step_.poison.add_to_lanes(step_.grad_logits, range.offset, range.count, lanes, grad_query_, step_.dim);
    const RowSchedule schedule(block.limits, packing.keys.k_len, kTileKeys);
    const int64_t index = tile.first_key[0] / kTileKeys, turn = schedule.rank(index);
    const int64_t sum =
        (packing.key_batch * problem.kv_heads + packing.kv_head) * most_row_blocks<E>(problem) + block.first / ld;
    const T scale = static_cast<T>(problem.scale);
    turns.wait(sum, turn);
    for (int lane = 0; lane < block.count; ++lane) {
      const Row& row = block.rows[lane];
      T* to = step_.tensors.grad_query.template at<T>(row.b, row.head, row.tensor_row);
      T* from = grad_query_ + lane * step_.dim;
      for (int d = 0; d < problem.head_dim; ++d) {
        const T sum_so_far = turn == 0 ? from[d] : to[d] + from[d];
        to[d] = index + 1 == schedule.last() ? sum_so_far * scale : sum_so_far;
      }
    }
    turns.next(sum, turn);
  }

  // acc[key][dim] += tile[key][lane] values[lane][dim]
  void product(bool hides, const KeyRange& range, const RowBlock<W>& block, const T* tile, W* values, int dim, T* acc,
               Outliers& outliers, const Outliers& outlying_keys) {
    const int lanes = block.vectors * kLanes<T>;
    const bool poisoned = (hides || outliers.any) && poison_.take(values, dim, block.count, dim);
    if constexpr (kPlanes<W> > 1) {
      // From here on the values' columns are an operand's, and all alike.
      if (outliers.any) outliers.clear(has_outliers(values, block.count * dim));
    }
    const W* weights = Op::left_from_tile(tile, ld, range.padded, block.vectors, step_.tile_room, outlying_keys.any);
    const W* right = Op::right_from_rows(values, dim, lanes, dim, step_.operand_room);
    T* to = acc + range.offset * dim;
    Op::template multiply<Layout::RowMajor>(range.padded, dim / kLanes<T>, Op::depth(block.count, lanes), weights, ld,
                                            right, Op::right_ld(dim), to, dim, true, outlying_keys.from(0),
                                            outliers.from(0));
    if (poisoned) poison_.add_to_keys(tile, range.count, to, dim, hides);
  }

  Gradient<E, W> step_;
  bool in_place_;
  T* grad_key_;              // [key][dim]
  T* grad_value_;            // [key][value dim]
  T* grad_query_ = nullptr;  // [lane][dim]: this key tile's part
  T* grad_query_t_ = nullptr;
  W* key_room_ = nullptr;
  const W* key_t_ = nullptr;  // the key tile as the operand of dQ
  Poison<W> poison_;          // of a row block's Q or dO
};

// Owns dQ of one row tile; sweeps the key tiles that it sees.
template <typename E, typename W>
class GradQuery {
  using T = ComputeOf<E>;
  using Op = Operands<W>;
  static constexpr int ld = kBlockLanes<W>;
  static constexpr int kRowBlocks = 4;

 public:
  static constexpr int kRows = kRowBlocks * ld;

  GradQuery(const Problem& problem, const BackwardTensors& tensors) : step_(problem, tensors, kRowBlocks) {
    for (T*& grad : grad_query_) grad = step_.arena.template take<T>(step_.dim * ld);
    scratch_ = step_.arena.template take<T>(ld * step_.dim);
  }

  void operator()(const RowPacking& packing, int64_t first, int64_t count) {
    const Problem& problem = step_.problem;
    const int blocks = static_cast<int>(ceil_div(count, ld));
    Limits limits = Limits::none();
    for (int i = 0; i < blocks; ++i) {
      const int rows = static_cast<int>(smaller<int64_t>(ld, count - i * ld));
      step_.load_row_block(packing, first + i * ld, rows, step_.rows[i]);
      std::memset(grad_query_[i], 0, step_.dim * ld * sizeof(T));
      limits.widen(step_.rows[i].block.limits);
    }
    KeyWalk walk(packing, first, first + count - 1, limits, 0, packing.keys.k_len);
    for (Tile tile; walk.next(tile);) {
      step_.load_key_tile(packing, tile);
      key_ = Op::left_from_columns(step_.clean_key, step_.dim, tile.count, step_.dim, step_.operand_room,
                                   Op::left_ld(step_.dim, kTileKeys));
      for (int i = 0; i < blocks; ++i) accumulate(tile, i);
    }
    T factor[ld];
    for (T& f : factor) f = static_cast<T>(problem.scale);
    for (int i = 0; i < blocks; ++i) {
      store_rows<E>(grad_query_[i], factor, step_.rows[i].block, problem.head_dim, step_.dim, scratch_,
                    step_.tensors.grad_query, step_.tensors.adds_grad_query);
    }
  }

 private:
  void accumulate(const Tile& tile, int i) {
    const auto& rows = step_.rows[i];
    const RowBlock<W>& block = rows.block;
    const KeyRange range = KeyRange::of(block, tile);
    if (range.padded == 0) return;
    step_(rows, tile, range);
    step_.apply_softcap_slope(range);
    // dQ^T += K^T dS^T
    step_.find_outliers(rows, range);
    const W* weights = Op::right_from_tile(step_.grad_logits, ld, range.padded, block.vectors, step_.tile_room,
                                           step_.outlying_lanes.any);
    const int64_t key_ld = Op::left_ld(step_.dim, kTileKeys);
    Op::template multiply<Op::kTransposed>(step_.dim, block.vectors, Op::depth(range.count, range.padded),
                                           key_ + Op::left_offset(range.offset, key_ld), key_ld, weights,
                                           Op::right_ld(ld), grad_query_[i], ld, true, step_.clean_key_outliers.from(0),
                                           step_.outlying_lanes.from(0));
    step_.poison.add_to_columns(step_.grad_logits, range.offset, range.count, grad_query_[i]);
  }

  Gradient<E, W> step_;
  const W* key_;               // the key tile as a left operand, summed over the keys
  T* grad_query_[kRowBlocks];  // [dim][lane]
  T* scratch_;                 // [lane][dim]
};

// Owns a tile of dBias: the sum of dS over everything the bias broadcasts over. Heads are not packed here, so
// that lanes are consecutive queries.
template <typename E, typename W>
class GradBias {
  using T = ComputeOf<E>;
  static constexpr int ld = kBlockLanes<W>;

 public:
  GradBias(const Problem& problem, const BackwardTensors& tensors)
      : step_(problem, tensors, 1), sum_(step_.arena.template take<T>(kTileKeys * ld)) {}

  static int64_t tasks(const Problem& problem) {
    const int64_t* size = problem.bias.size;
    return size[0] * size[1] * ceil_div(size[2], ld) * ceil_div(size[3], kTileKeys);
  }

  void operator()(int64_t task) {
    const Problem& problem = step_.problem;
    const int64_t* size = problem.bias.size;
    const int64_t key_tiles = ceil_div(size[3], kTileKeys), row_blocks = ceil_div(size[2], ld);
    const Owned keys = owned(task % key_tiles, kTileKeys, size[3], problem.k_len);
    task /= key_tiles;
    const Owned rows = owned(task % row_blocks, ld, size[2], problem.q_len);
    task /= row_blocks;
    const Owned heads = owned(task % size[1], 1, size[1], problem.q_heads);
    const Owned batches = owned(task / size[1], 1, size[0], problem.batch);
    std::memset(sum_, 0, kTileKeys * ld * sizeof(T));
    for (int64_t b = batches.begin; b < batches.end; ++b) {
      for (int64_t h = heads.begin; h < heads.end; ++h) {
        const RowPacking packing(problem, b, h / problem.group(), h, 1);
        for (int64_t row = rows.begin; row < rows.end; row += ld) {
          const int count = static_cast<int>(smaller<int64_t>(ld, rows.end - row));
          step_.load_row_block(packing, row, count, step_.rows[0]);
          for (int64_t k = keys.begin; k < keys.end; k += kTileKeys) accumulate(packing, k);
        }
      }
    }
    write(batches, heads, rows, keys);
  }

 private:
  struct Owned {
    int64_t begin, end;  // what is summed over or spanned, in the problem
    bool broadcast;
  };

  static Owned owned(int64_t index, int64_t step, int64_t size, int64_t full) {
    if (size == 1) return {0, full, true};
    return {index * step, smaller(index * step + step, full), false};
  }

  void accumulate(const RowPacking& packing, int64_t k_begin) {
    const auto& rows = step_.rows[0];
    Tile tile = Tile::of(k_begin, smaller(k_begin + kTileKeys, step_.problem.k_len));
    const KeyRange range = KeyRange::of(rows.block, tile, packing);
    if (range.padded == 0) return;
    step_.load_key_tile(packing, tile);
    step_(rows, tile, range);
    for (int j = 0; j < range.count; ++j) {
      for (int v = 0; v < rows.block.vectors; ++v) {
        T* to = sum_ + (range.offset + j) * ld + v * kLanes<T>;
        store(to, load(to) + load(step_.grad_logits + j * ld + v * kLanes<T>));
      }
    }
  }

  // sum_[key][lane], summed over the broadcast ones of the two, into the contiguous gradient.
  void write(Owned batches, Owned heads, Owned rows, Owned keys) {
    const Problem& problem = step_.problem;
    const int64_t* size = problem.bias.size;
    const int row_count = static_cast<int>(smaller<int64_t>(ld, rows.end - rows.begin));
    const int key_count = static_cast<int>(smaller<int64_t>(kTileKeys, keys.end - keys.begin));
    const int out_rows = rows.broadcast ? 1 : row_count, out_keys = keys.broadcast ? 1 : key_count;
    const int64_t batch = batches.broadcast ? 0 : batches.begin, head = heads.broadcast ? 0 : heads.begin;
    for (int i = 0; i < out_rows; ++i) {
      for (int j = 0; j < out_keys; ++j) {
        T total = 0;
        for (int r = i; r < (rows.broadcast ? row_count : i + 1); ++r) {
          for (int k = j; k < (keys.broadcast ? key_count : j + 1); ++k) total += sum_[k * ld + r];
        }
        const int64_t row = rows.broadcast ? 0 : rows.begin + i, key = keys.broadcast ? 0 : keys.begin + j;
        const int64_t at = ((batch * size[1] + head) * size[2] + row) * size[3] + key;
        void* grad = step_.tensors.grad_bias;
        switch (problem.bias.dtype) {
          case DType::Float32:
            static_cast<float*>(grad)[at] = static_cast<float>(total);
            break;
          case DType::Float64:
            static_cast<double*>(grad)[at] = static_cast<double>(total);
            break;
          case DType::Float16:
            store_one(total, static_cast<Half*>(grad) + at);
            break;
          case DType::BFloat16:
            store_one(total, static_cast<BFloat16*>(grad) + at);
            break;
          case DType::Bool:
            break;
        }
      }
    }
  }

  template <typename S>
  static void store_one(T value, S* to) {
    const float narrow = static_cast<float>(value);
    store_row(&narrow, 1, to);
  }

  Gradient<E, W> step_;
  T* sum_;  // [key][lane]
};

// delta = rowsum(dO * O) - dlse: how far a row's gradient moves with its normaliser. Rows that no sweep visits, since
// they see no key, get their dQ here: 0.
template <typename E>
void compute_delta(const Problem& problem, const BackwardTensors& tensors, int threads) {
  using T = ComputeOf<E>;
  struct Row {
    Row(const Problem& problem, const BackwardTensors&)
        : length(round_up(problem.value_dim, kLanes<T>)), arena(bytes()) {
      out = arena.take<T>(length), grad = arena.take<T>(length);
    }
    size_t bytes() const { return 2 * round_up(length * sizeof(T), Arena::kAlign); }
    int64_t length;
    Arena arena;
    T *out, *grad;
  };
  constexpr int64_t kRowsPerTask = 64;
  const int64_t row_tasks = ceil_div(problem.q_rows, kRowsPerTask);
  const int64_t heads = (problem.packed ? 1 : problem.batch) * problem.q_heads;
  parallel<Row>(threads, heads * row_tasks, problem, tensors, [&](Row& row, int64_t task) {
    const int64_t b = task / row_tasks / problem.q_heads, h = task / row_tasks % problem.q_heads;
    const int64_t first = task % row_tasks * kRowsPerTask;
    for (int64_t i = first; i < smaller(first + kRowsPerTask, problem.q_rows); ++i) {
      load_padded_row(tensors.out.at<E>(b, h, i), problem.value_dim, row.out, row.length);
      load_padded_row(tensors.grad_out.at<E>(b, h, i), problem.value_dim, row.grad, row.length);
      Vec<T> sum = {};
      for (int64_t d = 0; d < row.length; d += kLanes<T>) sum += load(row.out + d) * load(row.grad + d);
      T total = 0;
      for (int lane = 0; lane < kLanes<T>; ++lane) total += sum[lane];
      const int64_t at = problem.row(b, h, i);
      if (tensors.grad_lse) total -= static_cast<const T*>(tensors.grad_lse)[at];
      static_cast<T*>(tensors.delta)[at] = total;
      if (problem.sequences) continue;
      if (problem.mask.lo(i, problem.k_len) >= problem.mask.hi(i, problem.k_len)) {
        std::memset(tensors.grad_query.at<E>(b, h, i), 0, problem.head_dim * sizeof(E));
      }
    }
  });
}

template <typename E>
void backward(const Problem& problem, const BackwardTensors& tensors, int threads) {
  compute_delta<E>(problem, tensors, threads);
  const int64_t packings = problem.key_groups() * problem.kv_heads;
  const bool in_place = sums_in_place<E>(problem, tensors);

  // First key tiles first: under a causal mask they are the longest, and dQ's turns go in this order.
  Turns turns(in_place ? packings * most_row_blocks<E>(problem) : 0);
  using KeyValues = ForPackings<GradKeyValue, E, BackwardTensors>;
  parallel<KeyValues>(
      threads, ceil_div(problem.k_len, kTileKeys) * packings, problem, tensors, [&](KeyValues& kernels, int64_t task) {
        const RowPacking packing = RowPacking::of(problem, task % packings);
        const int64_t begin = task / packings * kTileKeys, k_len = packing.keys.k_len;
        if (begin >= k_len) return;
        kernels(packing, [&](auto& kernel) { kernel(packing, begin, smaller(begin + kTileKeys, k_len), turns); });
      });

  if (!in_place) {
    using Queries = ForPackings<GradQuery, E, BackwardTensors>;
    const RowTiles<Queries> tiles(problem);
    parallel<Queries>(threads, tiles.tasks(), problem, tensors, [&](Queries& kernels, int64_t task) {
      tiles(RowPacking::of(problem, task % packings), task, kernels,
            [](auto& kernel, const RowPacking& packing, int64_t first, int64_t rows) { kernel(packing, first, rows); });
    });
  }

  if (tensors.grad_bias) {
    using Biases = ForPackings<GradBias, E, BackwardTensors>;
    // Any packing is like all of them: a bias has no sequences of their own lengths.
    const RowPacking packing(problem, 0, 0, 0, 1);
    const int64_t tasks = larger(Biases::Narrow::tasks(problem), Biases::Wide::tasks(problem));
    parallel<Biases>(threads, tasks, problem, tensors, [&](Biases& kernels, int64_t task) {
      kernels(packing, [&](auto& kernel) {
        if (task < kernel.tasks(problem)) kernel(task);
      });
    });
  }
}

}  // namespace flashx::FLASHX_ISA
