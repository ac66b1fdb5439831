// Forward: tiled exact attention. Loop order: row tiles in parallel, key tiles inside, row blocks innermost.
// Data movement: a row tile's Q and O stay in the L2 cache; each visible key tile is read once per row tile,
// so K and V are read ceil(rows / kRowBlocks / kBlockLanes) times, Q and O once. Nothing of size Lq x Lk
// exists.
#pragma once

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/poison.h"
#include "cpu/tile.h"

namespace flashx::FLASHX_ISA {

template <typename E>
class Forward {
  using W = typename ProductOf<E>::Type;
  using T = ComputeOf<E>;
  using Op = Operands<W>;
  static constexpr int kRowBlocks = 4;
  static constexpr int ld = kBlockLanes<W>;

 public:
  static constexpr int kRows = kRowBlocks * ld;

  Forward(const Problem& problem, const ForwardTensors& tensors)
      : problem_(problem),
        tensors_(tensors),
        dim_(static_cast<int>(round_up(problem.head_dim, Op::kPad))),
        value_dim_(static_cast<int>(round_up(problem.value_dim, Op::kPad))),
        arena_(bytes()),
        logits_(problem, arena_) {
    const int keys = tile_room<W>(problem);
    key_ = arena_.take<W>(keys * dim_);
    value_ = arena_.take<W>(keys * value_dim_);
    value_room_ = arena_.take<W>(Op::room(value_dim_, kTileKeys));
    weights_room_ = arena_.take<W>(Op::room(keys, ld));
    query_ = arena_.take<W>(ld * dim_);
    scores_ = arena_.take<T>(keys * ld);
    scratch_ = arena_.take<T>(ld * value_dim_);
    if (problem.dropout_p > 0) dropout_ = arena_.take<T>(keys * ld);
    for (int i = 0; i < row_blocks(); ++i) {
      states_[i].query = arena_.take<W>(dim_ * ld);
      states_[i].acc = arena_.take<T>(value_dim_ * ld);
    }
  }

  // Rows [first, first + count) of the packed rows, count <= kRows.
  void operator()(const RowPacking& packing, int64_t first, int64_t count) {
    const int blocks = begin(packing, first, count);
    const RowSchedule schedule(problem_.mask, problem_.k_len, packing.query(first), packing.query(first + count - 1),
                               kTileKeys);
    const int depth = Op::depth(problem_.head_dim, dim_);
    for (const KeyTile tile : schedule) {
      load_tile<E>(tensors_.key, packing.batch, packing.kv_head, tile, problem_.head_dim, key_, dim_);
      load_tile<E>(tensors_.value, packing.batch, packing.kv_head, tile, problem_.value_dim, value_, value_dim_);
      const int keys = static_cast<int>(tile.end - tile.begin);
      const bool hides = tile.kind != TileKind::Full || !logits_.only_intervals();
      poison_.clear();
      if (hides) poison_.take(value_, value_dim_, keys, problem_.value_dim);
      const int64_t value_ld = Op::left_ld(value_dim_, kTileKeys);
      const W* value = Op::left_from_columns(value_, value_dim_, keys, value_dim_, value_room_, value_ld);
      for (int i = 0; i < blocks; ++i) {
        State& state = states_[i];
        const RowBlock<W>& block = state.block;
        const KeyRange range = KeyRange::of(problem_, block, tile);
        if (range.padded == 0) continue;
        // S^T = K Q^T
        multiply<Layout::RowMajor>(range.padded, block.vectors, depth, key_ + range.offset * dim_, dim_, state.query,
                                   Op::right_ld(ld), scores_, ld, false);
        logits_(packing, block, tile.begin + range.offset, range, scores_, nullptr);
        update(state, range.padded);
        if (dropout_) drop(packing, block, tile.begin + range.offset, range);
        // O^T += V^T P^T
        const W* weights = Op::right_from_tile(scores_, ld, range.padded, block.vectors, weights_room_);
        multiply<Op::kTransposed>(value_dim_, block.vectors, Op::depth(range.count, range.padded),
                                  value + Op::left_offset(range.offset, value_ld), value_ld, weights, Op::right_ld(ld),
                                  state.acc, ld, true);
        poison_.add_to_columns(scores_, range.offset, range.count, state.acc);
      }
    }
    for (int i = 0; i < blocks; ++i) finish(packing, states_[i]);
  }

 private:
  // A row block's online softmax: transposed queries and output, running max and running sum.
  struct State {
    RowBlock<W> block;
    W* query;
    T* acc;
    alignas(64) T max[ld];
    alignas(64) T sum[ld];
  };

  // Row blocks that a task can have.
  int row_blocks() const {
    return static_cast<int>(smaller<int64_t>(kRowBlocks, ceil_div(problem_.q_len * problem_.group(), ld)));
  }

  size_t bytes() const {
    const int64_t keys = tile_room<W>(problem_);
    const int64_t operands = keys * (dim_ + value_dim_) + Op::room(value_dim_, kTileKeys) + Op::room(keys, ld) +
                             ld * dim_ + row_blocks() * ld * dim_;
    const int64_t sums = 2 * keys * ld + ld * value_dim_ + row_blocks() * ld * value_dim_;
    return operands * sizeof(W) + sums * sizeof(T) + Logits<W>::bytes(problem_) + 20 * Arena::kAlign;
  }

  // Loads the queries and resets the states; returns the number of row blocks, evenly filled.
  int begin(const RowPacking& packing, int64_t first, int64_t count) {
    const int64_t step = kLanes<T> * Op::kVectorStep;
    const int blocks = static_cast<int>(ceil_div(count, ld));
    const int64_t share = round_up(ceil_div(count, blocks), step);
    for (int i = 0; i < blocks; ++i) {
      State& state = states_[i];
      const int64_t row = first + i * share;
      state.block.place(problem_, packing, row, static_cast<int>(smaller(share, first + count - row)));
      load_rows<E>(tensors_.query, packing, state.block, problem_.head_dim, query_, dim_);
      if (logits_.negates_query()) negate(query_, state.block.vectors * kLanes<T> * dim_);
      Op::right_from_columns(query_, dim_, state.block.vectors * kLanes<T>, dim_, state.query, ld);
      std::memset(state.acc, 0, value_dim_ * ld * sizeof(T));
      for (int lane = 0; lane < ld; ++lane) {
        // The sink is one more key, with value 0, seen before all others.
        const bool sink = problem_.sinks && lane < state.block.count;
        state.max[lane] =
            sink ? static_cast<const T*>(problem_.sinks)[packing.head(row + lane)] / logits_.unit() : -kInf<T>;
        state.sum[lane] = sink ? T(1) : T(0);
      }
    }
    return blocks;
  }

  // P^T = exp2((scores - max) * factor), in place; the accumulator is rescaled where the max moved.
  void update(State& state, int keys) {
    constexpr int n = kLanes<T>;
    const T factor = logits_.factor();
    for (int v = 0; v < state.block.vectors; ++v) {
      T* scores = scores_ + v * n;
      Vec<T> top[4] = {broadcast(-kInf<T>), broadcast(-kInf<T>), broadcast(-kInf<T>), broadcast(-kInf<T>)};
      for (int j = 0; j < keys; j += 4) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) top[u] = max(top[u], load(scores + (j + u) * ld));
      }
      const Vec<T> old_max = load(state.max + v * n);
      const Vec<T> new_max = max(old_max, max(max(top[0], top[1]), max(top[2], top[3])));
      // A row that has seen nothing yet subtracts 0, not -inf.
      const Vec<T> shift = new_max == -kInf<T> ? Vec<T>{} : new_max;
      const Vec<T> rescale = exp2<T>((old_max - shift) * factor);
      Vec<T> sum[4] = {};
      for (int j = 0; j < keys; j += 4) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) {
          const Vec<T> p = exp2<T>((load(scores + (j + u) * ld) - shift) * factor);
          sum[u] += p;
          store(scores + (j + u) * ld, p);
        }
      }
      store(state.sum + v * n, load(state.sum + v * n) * rescale + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
      store(state.max + v * n, new_max);
      if (any(rescale != 1)) {
        for (int d = 0; d < value_dim_; ++d) {
          T* acc = state.acc + d * ld + v * n;
          store(acc, load(acc) * rescale);
        }
      }
    }
  }

  void drop(const RowPacking& packing, const RowBlock<W>& block, int64_t k_begin, const KeyRange& range) {
    dropout_factors(problem_, packing, block, k_begin, range, dropout_);
    for (int i = 0; i < range.padded * ld; i += kLanes<T>) {
      store(scores_ + i, load(scores_ + i) * load(dropout_ + i));
    }
  }

  void finish(const RowPacking& packing, State& state) {
    T out_scale[ld];
    const T unit = logits_.unit();
    for (int lane = 0; lane < state.block.count; ++lane) {
      const RowResult<T> result = RowResult<T>::from(state.max[lane], state.sum[lane], unit);
      const int64_t row = state.block.first + lane;
      const int64_t head = packing.batch * problem_.q_heads + packing.head(row);
      static_cast<T*>(tensors_.lse)[head * problem_.q_len + packing.query(row)] = result.lse;
      out_scale[lane] = result.out_scale;
    }
    store_rows<E>(state.acc, out_scale, packing, state.block, problem_.value_dim, value_dim_, scratch_, tensors_.out);
  }

  const Problem& problem_;
  const ForwardTensors& tensors_;
  int dim_, value_dim_;  // padded
  typename Op::Unit unit_;
  Arena arena_;
  Logits<W> logits_;
  Poison<W> poison_;
  State states_[kRowBlocks];
  W* key_;           // [key][dim]
  W* value_;         // [key][value dim]
  W* value_room_;    // for the value tile as a left operand
  W* weights_room_;  // for P^T as a right operand
  W* query_;         // [lane][dim]
  T* scores_;        // [key][lane]: S^T, then P^T
  T* scratch_;       // [lane][value dim]
  T* dropout_ = nullptr;
};

template <typename E>
void forward(const Problem& problem, const ForwardTensors& tensors, int threads) {
  const int64_t rows = problem.q_len * problem.group();
  const int64_t row_tiles = ceil_div(rows, Forward<E>::kRows);
  const int64_t heads = problem.batch * problem.kv_heads;
  // Last row tiles first: under a causal mask they are the longest.
  parallel<Forward<E>>(threads, row_tiles * heads, problem, tensors, [&](Forward<E>& kernel, int64_t task) {
    const int64_t first = (row_tiles - 1 - task / heads) * Forward<E>::kRows;
    const int64_t head = task % heads;
    const int64_t kv_head = head % problem.kv_heads;
    kernel({head / problem.kv_heads, kv_head * problem.group(), problem.group(), kv_head}, first,
           smaller<int64_t>(Forward<E>::kRows, rows - first));
  });
}

}  // namespace flashx::FLASHX_ISA
