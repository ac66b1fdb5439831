// Forward: a call's rows, its levels and parts of its keys over threads.
// A sequence with few rows and many keys is cut at multiples of kSplitKeys; the parts' states are then merged in order.
// Where cuts are depends on the positions of keys alone, so a sequence's bits do not depend on its batch.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/forward.h"
#include "cpu/parallel.h"

namespace flashx::FLASHX_ISA {

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
  constexpr int kLanesOfFew = Kernels::kNarrowLanes;
  const Problem& problem = levels[count - 1].problem;  // all have its rows
  const typename Thread::Levels all{levels, count};
  const Problem& longest =
      std::max_element(levels, levels + count, [](const ForwardCall& one, const ForwardCall& other) {
        return one.problem.k_len < other.problem.k_len;
      })->problem;
  if (count > 1 && RowPacking::most(problem) > kLanesOfFew) return forward_in_turn<E>(levels, count, threads);

  const RowTiles<Kernels> tiles(problem);
  const int64_t packings = tiles.packings();
  // f(kernel, packing, first, count) for a task's row tile.
  const auto tile = [&](Thread& thread, int level, int64_t task, auto f) {
    tiles(RowPacking::of(levels[level].problem, task % packings), task, thread[level], f);
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
    parallel<Thread>(threads, tiles.tasks(), problem, all, [&](Thread& thread, int64_t task) {
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
  parallel<Thread>(threads, tiles.tasks() * all_splits, longest, all, [&](Thread& thread, int64_t task) {
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
  parallel<Thread>(mergers, tiles.tasks(), problem, all, [&](Thread& thread, int64_t task) {
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
