// Forward: tiled exact attention. Loop order: row tiles in parallel, key tiles inside, row blocks innermost.
// Data movement: a row tile's Q and O stay in the L2 cache; each visible key tile is read once per row tile,
// so K and V are read ceil(rows / kRowBlocks / kBlockLanes) times, Q and O once. Nothing of size Lq x Lk
// exists.
// A row block of a few rows (decoding) has its own products, with dims as lanes (few.h), and keeps its sums by row.
// A sequence with few rows and many keys is cut at multiples of kSplitKeys; the parts' states are then
// merged in order. Where cuts are depends on the positions of keys alone, so a sequence's bits do not depend on its
// batch.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/few.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/poison.h"
#include "cpu/tile.h"

namespace flashx::FLASHX_ISA {

// States of rows outside of the kernel: max, sum and accumulator as in Carry, one part after the other.
template <typename T>
struct Parts {
  T *max = nullptr, *sum = nullptr, *acc = nullptr;
  int64_t count = 0, rows = 0;  // of the parts; of a part
  int64_t first = -1;           // of a part, the packing's row 0; -1: rows are in Problem::row's order

  int64_t at(const Problem& problem, int64_t part, const Row& row, int64_t packed) const {
    return part * rows + (first < 0 ? problem.row(row.b, row.head, row.tensor_row) : first + packed);
  }
};

template <typename E, typename W>
class Forward {
  using T = ComputeOf<E>;
  using Op = Operands<W>;
  static constexpr int kRowBlocks = Op::kDirect ? 4 : kPlanes<W> == 1 ? 8 : 16;  // planes of keys take time to make
  static constexpr bool kHasFew = kPlanes<W> == 1;
  static constexpr int ld = kBlockLanes<W>;
  static constexpr int kFew = smaller(kFewRows, ld);
  static constexpr int kFewLanes = static_cast<int>(round_up(kFew, kLanes<T>));

 public:
  static constexpr int kRows = kRowBlocks * ld;
  static constexpr int64_t kSplitKeys = 2048;

  Forward(const Problem& problem, const ForwardTensors& tensors)
      : problem_(problem),
        tensors_(tensors),
        carry_{static_cast<T*>(tensors.carry.max), static_cast<T*>(tensors.carry.sum),
               static_cast<T*>(tensors.carry.acc), tensors.carry.max ? 1 : 0, 0},
        dim_(static_cast<int>(round_up(problem.head_dim, Op::kPad))),
        value_dim_(static_cast<int>(round_up(problem.value_dim, Op::kPad))),
        arena_(bytes()),
        logits_(problem, arena_) {
    const int keys = score_room();
    key_ = arena_.take<W>(keys * dim_);
    value_ = arena_.take<W>(keys * value_dim_);
    value_room_ = arena_.take<W>(Op::room(value_dim_, kTileKeys));
    weights_room_ = arena_.take<W>(Op::room(keys, ld));
    query_ = arena_.take<W>(ld * dim_);
    scores_ = arena_.take<T>(keys * ld);
    scratch_ = arena_.take<T>(ld * value_dim_);
    if (problem.dropout_p > 0) dropout_ = arena_.take<T>(keys * ld);
    few_query_ = arena_.take<T>(kFew * few_dim());
    few_scores_ = arena_.take<T>(kFewLanes * kTileKeys);
    for (int i = 0; i < row_blocks(); ++i) {
      states_[i].query = arena_.take<W>(dim_ * ld);
      states_[i].acc = arena_.take<T>(value_dim_ * ld);
    }
  }

  // Rows [first, first + count) of the packed rows, count <= kRows.
  void operator()(const RowPacking& packing, int64_t first, int64_t count) {
    const int blocks = begin(packing, first, count);
    add(carry_, blocks);
    sweep(packing, first, count, 0, packing.keys.k_len, blocks);
    for (int i = 0; i < blocks; ++i) finish(states_[i]);
  }

  // The same over the keys [k_begin, k_end), into a part of `parts`.
  void part(const RowPacking& packing, int64_t first, int64_t count, int64_t k_begin, int64_t k_end,
            const Parts<T>& parts, int64_t index) {
    const int blocks = begin(packing, first, count);
    sweep(packing, first, count, k_begin, k_end, blocks);
    for (int i = 0; i < blocks; ++i) suspend(states_[i], parts, index);
  }

  // The same as the operator, from parts that hold all keys, level by level.
  void merge(const RowPacking& packing, int64_t first, int64_t count, const std::vector<Parts<T>>& levels) {
    const int blocks = begin(packing, first, count, false);
    add(carry_, blocks);
    for (const Parts<T>& parts : levels) add(parts, blocks);
    for (int i = 0; i < blocks; ++i) finish(states_[i]);
  }

 private:
  // A row block's online softmax: transposed queries and output, running max and running sum.
  struct State {
    RowBlock<W> block;
    W* query;
    T* acc;
    Outliers outliers;  // among the lanes
    alignas(64) T max[ld];
    alignas(64) T sum[ld];
  };

  // Keys that the memory of a tile has room for.
  int score_room() const { return static_cast<int>(round_up(tile_room<W>(problem_), kLanes<T>)); }
  // The dims in whole vectors: what a few rows are computed with.
  int few_dim() const { return static_cast<int>(round_up(problem_.head_dim, kLanes<T>)); }
  int few_value_dim() const { return static_cast<int>(round_up(problem_.value_dim, kLanes<T>)); }

  // Row blocks that a task can have.
  int row_blocks() const {
    return static_cast<int>(smaller<int64_t>(kRowBlocks, ceil_div(RowPacking::most(problem_), ld)));
  }

  // The tile loop over the keys [k_begin, k_end).
  void sweep(const RowPacking& packing, int64_t first, int64_t count, int64_t k_begin, int64_t k_end, int blocks) {
    Limits limits = Limits::none();
    for (int i = 0; i < blocks; ++i) limits.widen(states_[i].block.limits);
    unified_ = !std::isnan(problem_.unified_max) && carry_.count == 0;
    if (unified_) {
      for (int i = 0; i < blocks; ++i)
        std::fill_n(states_[i].max, ld, static_cast<T>(problem_.unified_max) / logits_.unit());
    }
    sweep(packing, KeyWalk(packing, first, first + count - 1, limits, k_begin, k_end), blocks);
    if (!unified_) return;
    bool fits = true;
    for (int i = 0; i < blocks; ++i) fits &= sums_fit(states_[i]);
    if (fits) return;
    unified_ = false;
    for (int i = 0; i < blocks; ++i) clear(states_[i]);
    sweep(packing, KeyWalk(packing, first, first + count - 1, limits, k_begin, k_end), blocks);
  }

  void sweep(const RowPacking& packing, KeyWalk walk, int blocks) {
    const int depth = Op::depth(problem_.head_dim, dim_);
    for (Tile tile; walk.next(tile);) {
      if constexpr (kHasFew) {
        if (few_) {
          step_of_few(states_[0], packing, tile);
          continue;
        }
      }
      keys_.template find<E>(tensors_.key, packing, tile, problem_.head_dim, key_, dim_);
      values_.template find<E>(tensors_.value, packing, tile, problem_.value_dim, value_, value_dim_);
      poison_.clear();
      const bool hidden = hides(tile, blocks);
      if ((hidden || values_.outliers.any) && any_nonfinite(values_)) {
        if (!values_.copied) {
          values_.template copy<E>(tensors_.value, packing, tile, problem_.value_dim, value_, value_dim_);
        }
        poison_.take(value_, value_dim_, tile.count, problem_.value_dim);
      }
      if constexpr (kPlanes<W> > 1) {
        // From here on the values' columns are rows of an operand, and all alike.
        if (values_.outliers.any) values_.outliers.clear(has_outliers(value_, tile.count * value_dim_));
      }
      if constexpr (!Op::kDirect) {
        for (int r = 0; r < values_.size; ++r) {
          Op::left_from_columns(values_.runs[r].rows, value_dim_, values_.runs[r].count, value_dim_,
                                value_room_ + values_.runs[r].begin, Op::left_ld(value_dim_, kTileKeys));
        }
      }
      for (int i = 0; i < blocks; ++i) {
        State& state = states_[i];
        const RowBlock<W>& block = state.block;
        const KeyRange range = KeyRange::of(block, tile);
        if (range.padded == 0) continue;
        // S^T = K Q^T
        keys_.within(range.offset, range.padded, dim_, [&](int index, int count, const W* rows) {
          Op::template multiply<Layout::RowMajor>(count, block.vectors, depth, rows, dim_, state.query,
                                                  Op::right_ld(ld), scores_ + (index - range.offset) * ld, ld, false,
                                                  keys_.outliers.from(index), state.outliers.from(0));
        });
        logits_(block, tile, range, scores_, nullptr);
        const W* const weights = weigh(state, tile, range);
        // O^T += V^T P^T
        if constexpr (Op::kDirect) {
          values_.within(range.offset, range.count, value_dim_, [&](int index, int count, const W* rows) {
            Op::template multiply<Op::kTransposed>(value_dim_, block.vectors, count, rows, value_dim_,
                                                   weights + (index - range.offset) * Op::right_ld(ld),
                                                   Op::right_ld(ld), state.acc, ld, true);
          });
        } else {
          const int64_t value_ld = Op::left_ld(value_dim_, kTileKeys);
          Op::template multiply<Op::kTransposed>(value_dim_, block.vectors, Op::depth(range.count, range.padded),
                                                 value_room_ + Op::left_offset(range.offset, value_ld), value_ld,
                                                 weights, Op::right_ld(ld), state.acc, ld, true,
                                                 values_.outliers.from(0));
        }
        poison_.add_to_columns(scores_, range.offset, range.count, state.acc, hidden);
      }
    }
  }

  // A tile's step for a block of a few rows.
  void step_of_few(State& state, const RowPacking& packing, const Tile& tile) {
    const RowBlock<W>& block = state.block;
    const KeyRange range = KeyRange::of(block, tile);
    if (range.padded == 0) return;
    with_rows(tensors_.key, packing, tile, range, problem_.head_dim, key_, dim_, [&](auto keys) {
      few_scores(block.count, few_query_, few_dim(), keys, range.count, few_scores_, kTileKeys);
    });
    const int keys = static_cast<int>(round_up(range.padded, kLanes<T>));
    if (!logits_.plain() || !range.full) {
      transpose(few_scores_, kTileKeys, kFewLanes, keys, scores_, ld);
      logits_(block, tile, range, scores_, nullptr);
      transpose(scores_, ld, keys, kFewLanes, few_scores_, kTileKeys);
    }
    for (int lane = 0; lane < block.count; ++lane) {
      std::fill(few_scores_ + lane * kTileKeys + range.padded, few_scores_ + lane * kTileKeys + keys, -kInf<T>);
      update_row(state, lane, keys);
    }
    with_rows(tensors_.value, packing, tile, range, problem_.value_dim, value_, value_dim_, [&](auto values) {
      if (range.full && logits_.only_masks()) {
        few_values(block.count, few_scores_, kTileKeys, values, range.count, state.acc, few_value_dim());
        return;
      }
      // Values that a row does not see may be NaN: each row goes over its own.
      for (int lane = 0; lane < block.count; ++lane) {
        const T* weights = few_scores_ + lane * kTileKeys;
        decltype(+*values) seen[kTileKeys];
        int count = 0;
        for (int j = 0; j < range.count; ++j) {
          if (weights[j] != 0) scores_[count] = weights[j], seen[count++] = values[j];
        }
        few_values(1, scores_, kTileKeys, seen, count, state.acc + lane * few_value_dim(), few_value_dim());
      }
    });
  }

  // f(pointers to the rows of a range's keys or values): where they are, if their dims are whole vectors, or in copies.
  // Past the range's count there are as many more as make its padded count whole vectors.
  template <typename F>
  void with_rows(const View& view, const RowPacking& packing, const Tile& tile, const KeyRange& range, int dim, W* room,
                 int64_t room_ld, F f) {
    constexpr int kRoom = kTileKeys + kLanes<T>;
    const auto pad = [&](auto at) { std::fill(at + range.count, at + round_up(range.padded, kLanes<T>), at[0]); };
    if (dim % kLanes<T> == 0) {
      const E* at[kRoom];
      const KeyRows rows(packing);
      tile.runs(range.offset, range.count, [&](int index, int64_t key, int count) {
        for (int i = 0; i < count; ++i) at[index - range.offset + i] = rows.at<E>(view, key + i);
      });
      pad(at);
      f(static_cast<const E* const*>(at));
    } else {
      load_tile<E>(view, packing, tile, dim, room, room_ld, nullptr);
      const W* at[kRoom];
      for (int i = 0; i < range.count; ++i) at[i] = room + (range.offset + i) * room_ld;
      pad(at);
      f(static_cast<const W* const*>(at));
    }
  }

  size_t bytes() const {
    const int64_t keys = score_room();
    const int64_t operands = keys * (dim_ + value_dim_) + Op::room(value_dim_, kTileKeys) + Op::room(keys, ld) +
                             ld * dim_ + row_blocks() * ld * dim_;
    const int64_t few = kFew * few_dim() + kFewLanes * kTileKeys;
    const int64_t sums = 2 * keys * ld + ld * value_dim_ + row_blocks() * ld * value_dim_ + few;
    return operands * sizeof(W) + sums * sizeof(T) + Logits<W>::bytes(problem_) + 20 * Arena::kAlign;
  }

  // True if some of the rows must not see some of the tile's keys.
  bool hides(const Tile& tile, int blocks) const {
    if (!logits_.only_masks()) return true;
    bool any = false;
    for (int i = 0; i < blocks; ++i) any |= !KeyRange::of(states_[i].block, tile).full;
    return any;
  }

  bool any_nonfinite(const Runs<W>& runs) const {
    for (int r = 0; r < runs.size; ++r) {
      if (has_nonfinite(runs.runs[r].rows, runs.runs[r].count * static_cast<int64_t>(value_dim_))) return true;
    }
    return false;
  }

  // Loads the queries and resets the states; returns the number of row blocks, evenly filled.
  int begin(const RowPacking& packing, int64_t first, int64_t count, bool loads = true) {
    const int64_t step = kLanes<T> * Op::kVectorStep;
    const int blocks = static_cast<int>(ceil_div(count, ld));
    // Members are how many they are: a row's bits must not show it.
    few_ = kHasFew && count <= kFew && !problem_.members && problem_.dropout_p == 0;
    const int64_t share = round_up(ceil_div(count, blocks), step);
    for (int i = 0; i < blocks; ++i) {
      State& state = states_[i];
      const int64_t row = first + i * share;
      state.block.place(problem_, packing, row, static_cast<int>(smaller(share, first + count - row)));
      clear(state);
      if (!loads) continue;
      if (few_) {
        load_few(state.block);
        continue;
      }
      if constexpr (std::is_same_v<E, W>) {
        if (const W* rows = query_rows(packing, state.block)) {
          const int lanes = state.block.count;
          Op::right_from_columns(rows, tensors_.query.row, lanes, dim_, state.query, ld);
          continue;
        }
      }
      load_rows<E>(tensors_.query, state.block, problem_.head_dim, query_, dim_, &state.outliers);
      if (logits_.negates_query()) negate(query_, state.block.vectors * kLanes<T> * dim_);
      Op::right_from_columns(query_, dim_, state.block.vectors * kLanes<T>, dim_, state.query, ld);
    }
    return blocks;
  }

  // A block's queries where they lie, if that is as load_rows would leave them but for the rows' distance; or null.
  const W* query_rows(const RowPacking& packing, const RowBlock<W>& block) const {
    const bool fits = packing.heads == 1 && !problem_.sequences && dim_ == problem_.head_dim &&
                      block.count == block.vectors * kLanes<T> && tensors_.query.row % 2 == 0 &&
                      !logits_.negates_query();
    const Row& row = block.rows[0];
    return fits ? tensors_.query.template at<E>(row.b, row.head, row.tensor_row) : nullptr;
  }

  void load_few(const RowBlock<W>& block) {
    for (int lane = 0; lane < kFew; ++lane) {
      const Row& row = block.rows[smaller(lane, block.count - 1)];
      load_padded_row(tensors_.query.template at<E>(row.b, row.head, row.tensor_row), problem_.head_dim,
                      few_query_ + lane * few_dim(), few_dim());
    }
    if (logits_.negates_query()) negate(few_query_, kFew * few_dim());
  }

  void clear(State& state) {
    constexpr int n = kLanes<T>;
    if (few_) {
      std::memset(state.acc, 0, kFew * few_value_dim() * sizeof(T));
    } else {
      for (int d = 0; d < value_dim_; ++d) {
        for (int v = 0; v < state.block.vectors; ++v) store(state.acc + d * ld + v * n, Vec<T>{});
      }
    }
    std::fill_n(state.max, ld, -kInf<T>);
    std::fill_n(state.sum, ld, T(0));
  }

  // True if the sums relative to the unified max are far from where floats end.
  bool sums_fit(const State& state) const {
    bool fits = true;
    for (int lane = 0; lane < state.block.count; ++lane) {
      fits &= state.sum[lane] >= T(0x1p-60) && state.sum[lane] <= T(0x1p60);
    }
    return fits && !has_nonfinite(state.acc, few_ ? state.block.count * few_value_dim() : value_dim_ * ld);
  }

  // Merges the parts into the states, in order.
  void add(const Parts<T>& parts, int blocks) {
    constexpr int n = kLanes<T>;
    const T factor = logits_.factor();
    for (int p = 0; p < parts.count; ++p) {
      for (int i = 0; i < blocks; ++i) {
        State& state = states_[i];
        const T* rows[ld] = {};  // null: saw nothing; its accumulator was perhaps never written
        T mine[ld], its[ld];
        std::fill_n(mine, ld, T(1)), std::fill_n(its, ld, T(0));
        for (int lane = 0; lane < state.block.count; ++lane) {
          const int64_t at = parts.at(problem_, p, state.block.rows[lane], state.block.first + lane);
          if (parts.sum[at] == 0) continue;
          const T top = larger(state.max[lane], parts.max[at]);
          mine[lane] = std::exp2((state.max[lane] - top) * factor),
          its[lane] = std::exp2((parts.max[at] - top) * factor);
          state.max[lane] = top;
          state.sum[lane] = state.sum[lane] * mine[lane] + parts.sum[at] * its[lane];
          rows[lane] = parts.acc + at * problem_.value_dim;
        }
        for_squares(state, [&](int lane, int d, Vec<T>(&acc)[n]) {
          for (int r = 0; r < n; ++r) {
            if (lane + r >= ld || !rows[lane + r]) continue;
            T x[n] = {};
            std::memcpy(x, rows[lane + r] + d, smaller(n, problem_.value_dim - d) * sizeof(T));
            const Vec<T> old = mine[lane + r] == 0 ? Vec<T>{} : acc[r] * mine[lane + r];
            acc[r] = old + load(x) * its[lane + r];
          }
          return true;
        });
      }
    }
  }

  void suspend(State& state, const Parts<T>& parts, int64_t index) {
    constexpr int n = kLanes<T>;
    T* rows[ld] = {};
    for (int lane = 0; lane < state.block.count; ++lane) {
      const int64_t at = parts.at(problem_, index, state.block.rows[lane], state.block.first + lane);
      parts.max[at] = state.max[lane], parts.sum[at] = state.sum[lane];
      rows[lane] = parts.acc + at * problem_.value_dim;
    }
    for_squares(state, [&](int lane, int d, Vec<T>(&acc)[n]) {
      for (int r = 0; r < n; ++r) {
        if (lane + r >= ld || !rows[lane + r]) continue;
        std::memcpy(rows[lane + r] + d, &acc[r], smaller(n, problem_.value_dim - d) * sizeof(T));
      }
      return false;
    });
  }

  // f(lane, d, acc) for squares of rows and value dims, acc[r] being row lane + r's sums from d on. True if it changed
  // them.
  template <typename F>
  void for_squares(State& state, F f) {
    constexpr int n = kLanes<T>;
    for (int lane = 0; lane < state.block.count; lane += n) {
      for (int d = 0; d < problem_.value_dim; d += n) {
        Vec<T> acc[n] = {};
        if (few_) {
          T* const at = state.acc + lane * few_value_dim() + d;
          const int rows = smaller(n, state.block.count - lane);
          for (int r = 0; r < rows; ++r) acc[r] = load(at + r * few_value_dim());
          if (!f(lane, d, acc)) continue;
          for (int r = 0; r < rows; ++r) store(at + r * few_value_dim(), acc[r]);
        } else {
          T* const at = state.acc + d * ld + lane;
          for (int i = 0; i < n; ++i) acc[i] = load(at + i * ld);
          transpose_registers<T>(acc);
          if (!f(lane, d, acc)) continue;
          transpose_registers<T>(acc);
          for (int i = 0; i < n; ++i) store(at + i * ld, acc[i]);
        }
      }
    }
  }

  // What a row's weights are relative to, after scores up to `top`: the largest score so far, or up to
  // kSlack less in log2 units, since rescaling the sums takes time (Shah et al., "FlashAttention-4"). The weight that
  // most of a row's output comes from is then not exp2(0), and rounded: too much for float32.
  static constexpr int kSlack = sizeof(E) == 2 ? 8 : 0;
  template <typename V>
  V next_shift(V shift, V top) const {
    return (top > shift + kSlack / logits_.factor()) | (shift == -kInf<T>) ? top : shift;
  }

  // update(), for one of a few rows and whole vectors of keys.
  void update_row(State& state, int lane, int keys) {
    constexpr int n = kLanes<T>;
    const T factor = logits_.factor();
    T* const scores = few_scores_ + lane * kTileKeys;
    T shift = state.max[lane];
    if (!unified_) {
      Vec<T> top = load(scores);
      for (int j = n; j < keys; j += n) top = max(top, load(scores + j));
      const T old_shift = std::exchange(state.max[lane], next_shift(shift, largest<T>(top)));
      shift = state.max[lane] == -kInf<T> ? T(0) : state.max[lane];
      if (old_shift != state.max[lane]) {
        const Vec<T> rescale = exp2<T>(broadcast((old_shift - shift) * factor));
        state.sum[lane] *= rescale[0];
        T* const acc = state.acc + lane * few_value_dim();
        for (int d = 0; d < few_value_dim(); d += n) store(acc + d, load(acc + d) * rescale);
      }
    }
    Vec<T> total = {};
    for (int j = 0; j < keys; j += n) {
      const Vec<T> p = exp2<T>((load(scores + j) - shift) * factor);
      total += p;
      store(scores + j, p);
    }
    state.sum[lane] += sum<T>(total);
  }

  // P^T = exp2((scores - max) * factor), into `to`; the accumulator is rescaled where the max moved.
  template <typename To>
  void update(State& state, int keys, To* to) {
    constexpr int n = kLanes<T>;
    const T factor = logits_.factor();
    for (int v = 0; v < state.block.vectors; ++v) {
      const T* const scores = scores_ + v * n;
      Vec<T> shift = load(state.max + v * n);
      if (!unified_) {
        Vec<T> top[4] = {broadcast(-kInf<T>), broadcast(-kInf<T>), broadcast(-kInf<T>), broadcast(-kInf<T>)};
        for (int j = 0; j < keys; j += 4) {
#pragma GCC unroll 4
          for (int u = 0; u < 4; ++u) top[u] = max(top[u], load(scores + (j + u) * ld));
        }
        const Vec<T> old_shift = shift;
        shift = next_shift(shift, max(max(top[0], top[1]), max(top[2], top[3])));
        if (any(shift != old_shift)) {
          store(state.max + v * n, shift);
          rescale(state, v, old_shift, shift);
        }
        // A row that has seen nothing yet subtracts 0, not -inf.
        shift = shift == -kInf<T> ? Vec<T>{} : shift;
      }
      Vec<T> sum[4] = {};
      for (int j = 0; j < keys; j += 4) {
        Vec<T> p[4];
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) {
          p[u] = exp2<T>((load(scores + (j + u) * ld) - shift) * factor);
          sum[u] += p[u];
        }
        put(p, j, v, to);
      }
      store(state.sum + v * n, load(state.sum + v * n) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
  }

  // A vector of rows' sums, from one reference to another one.
  void rescale(State& state, int v, Vec<T> from, Vec<T> to) {
    constexpr int n = kLanes<T>;
    const Vec<T> by = from == to ? broadcast(T(1)) : exp2<T>((from - to) * logits_.factor());
    store(state.sum + v * n, load(state.sum + v * n) * by);
    for (int d = 0; d < value_dim_; ++d) {
      T* const acc = state.acc + d * ld + v * n;
      store(acc, load(acc) * by);
    }
  }

  // The scores' weights, dropped ones 0, as a right operand.
  const W* weigh(State& state, const Tile& tile, const KeyRange& range) {
    if constexpr (!Op::kDirect) {
      if (!dropout_ && poison_.empty()) {
        update(state, range.padded, weights_room_);
        return weights_room_;
      }
    }
    update(state, range.padded, scores_);
    if (dropout_) drop(state.block, tile, range);
    return Op::right_from_tile(scores_, ld, range.padded, state.block.vectors, weights_room_, false);
  }

  // Four keys' weights of vector v, to the scores' place or to that of an operand.
  static FLASHX_CORE void put(const Vec<T> (&p)[4], int j, int v, T* to) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) store(to + (j + u) * ld + v * kLanes<T>, p[u]);
  }
  template <typename To>
  static FLASHX_CORE void put(const Vec<T> (&p)[4], int j, int v, To* to) {
    Op::store_pair(p[0], p[1], ld, j, v, to);
    Op::store_pair(p[2], p[3], ld, j + 2, v, to);
  }

  void drop(const RowBlock<W>& block, const Tile& tile, const KeyRange& range) {
    dropout_factors(problem_, block, tile, range, dropout_);
    for (int i = 0; i < range.padded * ld; i += kLanes<T>) {
      store(scores_ + i, load(scores_ + i) * load(dropout_ + i));
    }
  }

  void finish(State& state) {
    if (tensors_.carry.suspend) return suspend(state, carry_, 0);
    T out_scale[ld];
    const T unit = logits_.unit(), factor = logits_.factor();
    for (int lane = 0; lane < state.block.count; ++lane) {
      const Row& row = state.block.rows[lane];
      T rescale = 1;
      if (problem_.sinks) {
        // The sink is one more key, with value 0.
        const T sink = static_cast<const T*>(problem_.sinks)[row.head] / unit, top = larger(state.max[lane], sink);
        const T shift = top == -kInf<T> ? T(0) : top;
        rescale = std::exp2((state.max[lane] - shift) * factor);
        state.sum[lane] = state.sum[lane] * rescale + std::exp2((sink - shift) * factor);
        state.max[lane] = top;
      }
      out_scale[lane] = RowResult<T>::scale_of(state.sum[lane]) * rescale;
      if (!tensors_.lse) continue;
      static_cast<T*>(tensors_.lse)[problem_.row(row.b, row.head, row.tensor_row)] =
          RowResult<T>::from(state.max[lane], state.sum[lane], unit).lse;
    }
    if (few_) {
      for (int lane = 0; lane < state.block.count; ++lane) {
        const Row& row = state.block.rows[lane];
        T* const acc = state.acc + lane * few_value_dim();
        for (int d = 0; d < few_value_dim(); d += kLanes<T>) store(acc + d, load(acc + d) * out_scale[lane]);
        store_row(acc, problem_.value_dim, tensors_.out.template at<E>(row.b, row.head, row.tensor_row));
      }
      return;
    }
    store_rows<E>(state.acc, out_scale, state.block, problem_.value_dim, value_dim_, scratch_, tensors_.out);
  }

  const Problem& problem_;
  const ForwardTensors& tensors_;
  Parts<T> carry_;
  bool unified_ = false;  // weights are relative to Problem::unified_max
  bool few_ = false;      // the rows are a few: sums lie by row
  int dim_, value_dim_;   // padded
  typename Op::Unit unit_;
  Arena arena_;
  Logits<W> logits_;
  Poison<W> poison_;
  State states_[kRowBlocks];
  Runs<W> keys_, values_;
  W* key_;           // [key][dim]: copies, as below
  W* value_;         // [key][value dim]
  W* value_room_;    // for the value tile as a left operand
  W* weights_room_;  // for P^T as a right operand
  W* query_;         // [lane][dim]
  T* scores_;        // [key][lane]: S^T, then P^T
  T* scratch_;       // [lane][value dim]
  T* dropout_ = nullptr;
  T* few_query_;   // [row][dim]
  T* few_scores_;  // [row][key]: S, then P
};

// A thread's kernels for the levels of a call.
template <typename E>
class LevelKernels {
 public:
  struct Levels {
    const ForwardCall* calls;
    int count;
  };
  using Kernels = ForPackings<Forward, E, ForwardTensors>;

  LevelKernels(const Problem&, const Levels& levels) {
    for (int i = 0; i < levels.count; ++i) kernels_.emplace_back(levels.calls[i].problem, levels.calls[i].tensors);
  }
  Kernels& operator[](int level) { return kernels_[level]; }

 private:
  std::vector<Kernels> kernels_;
};

// Levels one after the other: states go from call to call.
template <typename E>
void forward_in_turn(const ForwardCall* levels, int count, int threads);

template <typename E>
void forward(const ForwardCall* levels, int count, int threads) {
  using Thread = LevelKernels<E>;
  using Kernels = typename Thread::Kernels;
  using T = ComputeOf<E>;
  constexpr int64_t kSplitKeys = Kernels::Narrow::kSplitKeys;
  constexpr int kLanesOfFew = kBlockLanes<typename ProductOf<E>::Type>;
  const Problem& problem = levels[count - 1].problem;  // all have its rows
  const typename Thread::Levels all{levels, count};
  const Problem& longest =
      std::max_element(levels, levels + count, [](const ForwardCall& one, const ForwardCall& other) {
        return one.problem.k_len < other.problem.k_len;
      })->problem;
  const int64_t most = RowPacking::most(problem);
  if (count > 1 && most > kLanesOfFew) return forward_in_turn<E>(levels, count, threads);

  const int64_t narrow_rows = tile_rows(problem, Kernels::Narrow::kRows, kLanesOfFew);
  const int64_t wide_rows = tile_rows(problem, Kernels::Wide::kRows, kBlockLanes<typename WideProductOf<E>::Type>);
  const int64_t row_tiles = ceil_div(most, smaller(narrow_rows, wide_rows));
  const int64_t packings = problem.key_groups() * problem.kv_heads;
  // f(kernel, packing, first, count) for the row tiles; the last ones first: under a causal mask they are the longest.
  const auto tile = [&](Thread& thread, int level, int64_t task, auto f) {
    const RowPacking packing = RowPacking::of(levels[level].problem, task % packings);
    const int64_t rows = is_wide(packing) ? wide_rows : narrow_rows;
    const int64_t first = (row_tiles - 1 - task / packings) * rows;
    if (first >= packing.count()) return;
    thread[level](packing, [&](auto& kernel) { f(kernel, packing, first, smaller(rows, packing.count() - first)); });
  };
  // Whether to cut is a sequence's own affair too. Levels are parts to begin with.
  const auto is_cut = [&](const RowPacking& packing) {
    return packing.count() <= kLanesOfFew && (count > 1 || packing.keys.k_len > kSplitKeys);
  };
  int64_t most_cut = 0;  // rows of a packing that is cut
  for (int64_t i = 0; (count > 1 || problem.k_len > kSplitKeys) && i < packings; i += problem.kv_heads) {
    const RowPacking packing = RowPacking::of(problem, i);
    if (is_cut(packing)) most_cut = larger(most_cut, packing.count());
  }
  if (most_cut == 0) {
    parallel<Thread>(threads, row_tiles * packings, problem, all, [&](Thread& thread, int64_t task) {
      tile(thread, 0, task,
           [&](auto& kernel, const RowPacking& packing, int64_t first, int64_t rows) { kernel(packing, first, rows); });
    });
    return;
  }

  struct Split {
    int level;
    int64_t index;  // of the level's
  };
  std::vector<Split> splits;
  std::vector<int64_t> first_split;
  for (int level = 0; level < count; ++level) {
    first_split.push_back(splits.size());
    const int64_t its = ceil_div(levels[level].problem.k_len, kSplitKeys);
    for (int64_t i = 0; i < its; ++i) splits.push_back({level, i});
  }
  const int64_t all_splits = splits.size(), all_rows = packings * most_cut;
  // No initial values: a part that no key is in is left out by its number of keys.
  const std::unique_ptr<T[]> memory(new T[all_splits * all_rows * (problem.value_dim + 2)]);
  const auto parts_of = [&](int64_t packing, int level, int64_t parts) {
    T* const max = memory.get() + first_split[level] * all_rows;
    T* const sum = max + all_splits * all_rows;
    T* const acc = memory.get() + (2 * all_splits + first_split[level] * problem.value_dim) * all_rows;
    return Parts<T>{max, sum, acc, parts, all_rows, packing * most_cut};
  };
  const auto count_of = [&](const RowPacking& packing) { return ceil_div(packing.keys.k_len, kSplitKeys); };
  parallel<Thread>(threads, row_tiles * packings * all_splits, longest, all, [&](Thread& thread, int64_t task) {
    const auto [level, split] = splits[task % all_splits];
    const int64_t index = task / all_splits;
    tile(thread, level, index, [&](auto& kernel, const RowPacking& packing, int64_t first, int64_t rows) {
      if (!is_cut(packing)) {
        if (split == 0) kernel(packing, first, rows);
      } else if (split < count_of(packing)) {
        const int64_t begin = split * kSplitKeys;
        kernel.part(packing, first, rows, begin, begin + kSplitKeys, parts_of(index % packings, level, all_splits),
                    split);
      }
    });
  });
  const int mergers = worth_threads(threads, static_cast<double>(all_splits * all_rows) * problem.value_dim);
  parallel<Thread>(mergers, row_tiles * packings, problem, all, [&](Thread& thread, int64_t task) {
    tile(thread, count - 1, task, [&](auto& kernel, const RowPacking& packing, int64_t first, int64_t rows) {
      if (!is_cut(packing)) return;
      std::vector<Parts<T>> parts;
      for (int level = 0; level < count; ++level) {
        const RowPacking its = RowPacking::of(levels[level].problem, task % packings);
        parts.push_back(parts_of(task % packings, level, count_of(its)));
      }
      kernel.merge(packing, first, rows, parts);
    });
  });
}

template <typename E>
void forward_in_turn(const ForwardCall* levels, int count, int threads) {
  using T = ComputeOf<E>;
  const Problem& problem = levels[0].problem;
  const int64_t rows = (problem.packed ? 1 : problem.batch) * problem.q_heads * problem.q_rows;
  const std::unique_ptr<T[]> memory(new T[rows * (problem.value_dim + 2)]);
  T *const sum = memory.get(), *const max = sum + rows;
  std::fill_n(sum, rows, T(0));  // a row without a sum has no other state
  for (int i = 0; i < count; ++i) {
    ForwardCall call = levels[i];
    call.tensors.carry = {max, sum, max + rows, i + 1 < count};
    forward<E>(&call, 1, threads);
  }
}

}  // namespace flashx::FLASHX_ISA
