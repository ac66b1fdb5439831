// Forward: tiled exact attention. Loop order: row tiles in parallel, key tiles inside, row blocks innermost.
// Data movement: a row tile's Q and O stay in the L2 cache; each visible key tile is read once per row tile,
// so K and V are read ceil(rows / kRowBlocks / kBlockLanes) times, Q and O once. Nothing of size Lq x Lk
// exists.
// A row block of a few rows (decoding) has its own products, with dims as lanes (few.h), and keeps its sums by row.
// Which rows and keys a thread has, and in what order, is levels.h's affair.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/few.h"
#include "cpu/poison.h"
#include "cpu/tile.h"
#include "cpu/weigh.h"

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
  static constexpr int kRowBlocks = Op::kDirect ? 4 : 16;  // which share the making of operands from keys and values
  static constexpr bool kHasFew = kPlanes<W> == 1;
  static constexpr int kSteps = Op::kBeside ? 2 : 1;  // row blocks' steps that have scores or weights
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
    query_ = arena_.take<W>(ld * dim_);
    for (int i = 0; i < kSteps; ++i) {
      weights_room_[i] = arena_.take<W>(Op::room(keys, ld));
      scores_[i] = arena_.take<T>(keys * ld);
    }
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
  // A row block: transposed queries, and its sums.
  struct State : RowSums<W> {
    RowBlock<W> block;
    W* query;
    Outliers outliers;  // among the lanes
  };

  // A row block's step over a key tile.
  struct Step {
    State* state = nullptr;  // null: there is none
    KeyRange range;
    int place = 0;  // of its scores and weights
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
    const KeyWalk walk(packing, first, first + count - 1, limits, k_begin, k_end, few_ ? kTileKeys : Op::kForwardKeys);
    unified_ = !std::isnan(problem_.unified_max) && carry_.count == 0;
    if (unified_) {
      for (int i = 0; i < blocks; ++i)
        std::fill_n(states_[i].max, ld, static_cast<T>(problem_.unified_max) / logits_.unit());
    }
    sweep(packing, walk, blocks);
    if (!unified_) return;
    bool fits = true;
    for (int i = 0; i < blocks; ++i) fits &= sums_fit(states_[i]);
    if (fits) return;
    unified_ = false;
    for (int i = 0; i < blocks; ++i) clear(states_[i]);
    sweep(packing, walk, blocks);
  }

  void sweep(const RowPacking& packing, KeyWalk walk, int blocks) {
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
      // The steps of three row blocks at a time, if products run beside vectors: one's scores, weights of the one
      // before, and the output of the one before that.
      const bool at_once = !Op::kDirect && !dropout_ && poison_.empty();  // weights become an operand as they are made
      Step newer, older;
      for (int i = 0, steps = 0; i < blocks || newer.state || older.state; ++i) {
        Step next;
        if (i < blocks) {
          const KeyRange range = KeyRange::of(states_[i].block, tile);
          if (range.padded == 0) continue;
          next = {&states_[i], range, steps++ % kSteps};
        }
        if constexpr (Op::kBeside) {
          Weighing<E, W, W> weighing;
          if (newer.state && at_once) weighing = weights_of(newer, weights_room_[newer.place], pieces(newer));
          if (older.state) add_values(older, hidden, weighing);
          if (next.state) score(next, tile, weighing);
          weighing.finish();
          if (newer.state && !at_once) weigh(newer, tile);
          older = newer, newer = next;
        } else if (next.state) {
          score(next, tile, NoWork());
          at_once ? weights_of(next, weights_room_[next.place]).finish() : weigh(next, tile);
          add_values(next, hidden, NoWork());
        }
      }
    }
  }

  // S^T = K Q^T, and what becomes of it before it is weighed. Here and below, pieces of `work` are done meanwhile.
  template <typename Work>
  void score(const Step& step, const Tile& tile, Work&& work) {
    const State& state = *step.state;
    const KeyRange& range = step.range;
    T* const scores = scores_[step.place];
    keys_.within(range.offset, range.padded, dim_, [&](int index, int count, const W* rows) {
      Op::template multiply<Layout::RowMajor>(count, state.block.vectors, Op::depth(problem_.head_dim, dim_), rows,
                                              dim_, state.query, Op::right_ld(ld), scores + (index - range.offset) * ld,
                                              ld, false, keys_.outliers.from(index), state.outliers.from(0), work);
    });
    logits_(state.block, tile, range, scores, nullptr);
  }

  // O^T += V^T P^T
  template <typename Work>
  void add_values(const Step& step, bool hidden, Work&& work) {
    State& state = *step.state;
    const KeyRange& range = step.range;
    if constexpr (Op::kDirect) {
      values_.within(range.offset, range.count, value_dim_, [&](int index, int count, const W* rows) {
        Op::template multiply<Op::kTransposed>(value_dim_, state.block.vectors, count, rows, value_dim_,
                                               scores_[step.place] + (index - range.offset) * Op::right_ld(ld),
                                               Op::right_ld(ld), state.acc, ld, true);
      });
    } else {
      const int64_t value_ld = Op::left_ld(value_dim_, kTileKeys);
      Op::template multiply<Op::kTransposed>(value_dim_, state.block.vectors, Op::depth(range.count, range.padded),
                                             value_room_ + Op::left_offset(range.offset, value_ld), value_ld,
                                             weights_room_[step.place], Op::right_ld(ld), state.acc, ld, true,
                                             values_.outliers.from(0), nullptr, work);
    }
    poison_.add_to_columns(scores_[step.place], range.offset, range.count, state.acc, hidden);
  }

  // The softmax of a step's scores, to be done.
  template <typename To>
  Weighing<E, W, To> weights_of(const Step& step, To* to, int pieces = 1) {
    State& state = *step.state;
    return {
        state, state.block.vectors, value_dim_, scores_[step.place], step.range.padded, logits_.factor(), !unified_, to,
        pieces};
  }
  // Pieces that fit beside a step's products.
  int pieces(const Step& step) const { return pieces_of_work<W>(step.range.padded, dim_ + value_dim_); }

  // The softmax in the scores' own place, weights dropped, and from there to an operand.
  void weigh(const Step& step, const Tile& tile) {
    const RowBlock<W>& block = step.state->block;
    T* const scores = scores_[step.place];
    weights_of(step, scores).finish();
    if (dropout_) drop(block, tile, step.range, scores);
    Op::right_from_tile(scores, ld, step.range.padded, block.vectors, weights_room_[step.place], false);
  }

  // A tile's step for a block of a few rows.
  void step_of_few(State& state, const RowPacking& packing, const Tile& tile) {
    const RowBlock<W>& block = state.block;
    const KeyRange range = KeyRange::of(block, tile);
    if (range.padded == 0) return;
    const bool spreads = logits_.plain() && range.full && range.count == kTileKeys &&
                         problem_.head_dim % kLanes<T> == 0 && problem_.value_dim % kLanes<T> == 0;
    with_rows(tensors_.key, packing, tile, range, spreads, problem_.head_dim, key_, dim_, [&](auto keys) {
      few_scores(block.count, few_query_, few_dim(), keys, range.count, few_scores_, kTileKeys);
    });
    const int keys = static_cast<int>(round_up(range.padded, kLanes<T>));
    if (!logits_.plain() || !range.full) {
      transpose(few_scores_, kTileKeys, kFewLanes, keys, scores_[0], ld);
      logits_(block, tile, range, scores_[0], nullptr);
      transpose(scores_[0], ld, keys, kFewLanes, few_scores_, kTileKeys);
    }
    for (int lane = 0; lane < block.count; ++lane) {
      std::fill(few_scores_ + lane * kTileKeys + range.padded, few_scores_ + lane * kTileKeys + keys, -kInf<T>);
      update_row(state, lane, keys);
    }
    with_rows(tensors_.value, packing, tile, range, spreads, problem_.value_dim, value_, value_dim_, [&](auto values) {
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
          if (weights[j] != 0) scores_[0][count] = weights[j], seen[count++] = values[j];
        }
        few_values(1, scores_[0], kTileKeys, seen, count, state.acc + lane * few_value_dim(), few_value_dim());
      }
    });
  }

  // f(pointers to the rows of a range's keys or values): where they are, if their dims are whole vectors, or in copies.
  // Past the range's count there are as many more as make its padded count whole vectors. A whole tile can be spread
  // over several streams, which the hardware's prefetchers like, where nobody asks which key is which.
  template <typename F>
  void with_rows(const View& view, const RowPacking& packing, const Tile& tile, const KeyRange& range, bool spreads,
                 int dim, W* room, int64_t room_ld, F f) {
    constexpr int kRoom = kTileKeys + kLanes<T>;
    const auto pad = [&](auto at) { std::fill(at + range.count, at + round_up(range.padded, kLanes<T>), at[0]); };
    if (dim % kLanes<T> == 0) {
      const E* at[kRoom];
      const KeyRows rows(packing);
      tile.runs(range.offset, range.count, [&](int index, int64_t key, int count) {
        for (int i = 0; i < count; ++i) at[index - range.offset + i] = rows.at<E>(view, key + i);
      });
      pad(at);
      constexpr int kStreams = 4;
      const E* spread[kTileKeys];
      for (int i = 0; spreads && i < kTileKeys; ++i)
        spread[i] = at[i % kStreams * (kTileKeys / kStreams) + i / kStreams];
      f(static_cast<const E* const*>(spreads ? spread : at));
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
    const int64_t operands = keys * (dim_ + value_dim_) + Op::room(value_dim_, kTileKeys) +
                             kSteps * Op::room(keys, ld) + ld * dim_ + row_blocks() * ld * dim_;
    const int64_t few = kFew * few_dim() + kFewLanes * kTileKeys;
    const int64_t sums = (kSteps + 1) * keys * ld + ld * value_dim_ + row_blocks() * ld * value_dim_ + few;
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

  // update(), for one of a few rows and whole vectors of keys.
  void update_row(State& state, int lane, int keys) {
    constexpr int n = kLanes<T>;
    const T factor = logits_.factor();
    T* const scores = few_scores_ + lane * kTileKeys;
    T shift = state.max[lane];
    if (!unified_) {
      Vec<T> top = load(scores);
      for (int j = n; j < keys; j += n) top = max(top, load(scores + j));
      const T old_shift = std::exchange(state.max[lane], next_shift<E>(shift, largest<T>(top), factor));
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

  void drop(const RowBlock<W>& block, const Tile& tile, const KeyRange& range, T* weights) {
    dropout_factors(problem_, block, tile, range, dropout_);
    for (int i = 0; i < range.padded * ld; i += kLanes<T>) store(weights + i, load(weights + i) * load(dropout_ + i));
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
  W* key_;                   // [key][dim]: copies, as below
  W* value_;                 // [key][value dim]
  W* value_room_;            // for the value tile as a left operand
  W* weights_room_[kSteps];  // for P^T as a right operand
  W* query_;                 // [lane][dim]
  T* scores_[kSteps];        // [key][lane]: S^T, then P^T
  T* scratch_;               // [lane][value dim]
  T* dropout_ = nullptr;
  T* few_query_;   // [row][dim]
  T* few_scores_;  // [row][key]: S, then P
};

}  // namespace flashx::FLASHX_ISA
