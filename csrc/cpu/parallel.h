// Tasks over threads: one kernel object (with its tiles) per thread, tasks handed out one by one in order.
#pragma once

#include <atomic>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "core/problem.h"

namespace flashx::FLASHX_ISA {

// Fewer multiply-adds than this are done sooner by one thread than shared with a second.
constexpr double kWorthAThread = 1e5;

// Threads worth waking for so many multiply-adds.
inline int worth_threads(int threads, double multiply_adds) {
  const double shares = multiply_adds / kWorthAThread;
  return shares < threads ? larger(1, static_cast<int>(shares)) : threads;
}

// Threads worth waking for a product of rows x keys x dim. To read an element takes as long as some multiply-adds.
inline int worth_threads(int threads, const Problem& problem) {
  constexpr double kRead = 4;
  const double rows = static_cast<double>(problem.batch * problem.q_heads) * problem.q_len;
  const double read = kRead * static_cast<double>(problem.key_groups() * problem.kv_heads);
  return worth_threads(threads, (rows + read) * problem.k_len * (problem.head_dim + problem.value_dim));
}

// body(kernel, task) for every task below `tasks`. An exception (out of memory) ends the work and is thrown
// to the caller.
template <typename Kernel, typename Tensors, typename Body>
void parallel(int threads, int64_t tasks, const Problem& problem, const Tensors& tensors, const Body& body) {
  const int team = static_cast<int>(clamp<int64_t>(tasks, 0, worth_threads(threads, problem)));
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  const auto work = [&] {
    try {
      const auto kernel = std::make_unique<Kernel>(problem, tensors);
      for (int64_t task = next++; task < tasks; task = next++) body(*kernel, task);
    } catch (...) {
      next = tasks;
#pragma omp critical(flashx_failure)
      failure = std::current_exception();
    }
  };
  if (team > 1) {
#pragma omp parallel num_threads(team)
    work();
  } else if (team == 1) {
    work();
  }
  if (failure) std::rethrow_exception(failure);
}

// Who may add to a shared sum next, so that it is the same sum for any number of threads: one counter per sum. Tasks
// must be handed out in the order of their turns, as parallel() does.
class Turns {
 public:
  explicit Turns(int64_t sums) : done_(sums) {}

  void wait(int64_t sum, int64_t turn) const {
    for (int spins = 0; done_[sum].load(std::memory_order_acquire) != turn; ++spins) {
      if (spins >= kSpins) std::this_thread::yield();
    }
  }
  void next(int64_t sum, int64_t turn) { done_[sum].store(turn + 1, std::memory_order_release); }

 private:
  static constexpr int kSpins = 1000;
  std::vector<std::atomic<int64_t>> done_;
};

}  // namespace flashx::FLASHX_ISA
