// Tasks over threads: one kernel object (with its tiles) per thread, tasks handed out one by one in order.
#pragma once

#include <atomic>
#include <exception>
#include <memory>

#include "core/config.h"

namespace flashx::FLASHX_ISA {

// body(kernel, task) for every task below `tasks`. An exception (out of memory) ends the work and is thrown
// to the caller.
template <typename Kernel, typename Tensors, typename Body>
void parallel(int threads, int64_t tasks, const Problem& problem, const Tensors& tensors, const Body& body) {
  const int team = static_cast<int>(clamp<int64_t>(tasks, 0, threads));
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

}  // namespace flashx::FLASHX_ISA
