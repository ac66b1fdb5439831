// Included last by each isa_*.cpp: the kernels of this instruction set, for every dtype.
#pragma once

#include "cpu/backward.h"
#include "cpu/kernels.h"
#include "cpu/levels.h"
#include "cpu/probe.h"

namespace flashx::FLASHX_ISA {

// Calls f with a value of the storage type.
template <typename F>
void visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::Float32:
      return f(float{});
    case DType::Float16:
      return f(Half{});
    case DType::BFloat16:
      return f(BFloat16{});
    case DType::Float64:
      return f(double{});
    case DType::Bool:
      return;
  }
}

Kernels kernels() {
  return {
      [](const ForwardCall* levels, int count, int threads) {
        visit(levels[0].problem.dtype, [&](auto element) { forward<decltype(element)>(levels, count, threads); });
      },
      [](const Problem& problem, const BackwardTensors& tensors, int threads) {
        visit(problem.dtype, [&](auto element) { backward<decltype(element)>(problem, tensors, threads); });
      },
      multiply_adds,
      read,
  };
}

}  // namespace flashx::FLASHX_ISA
