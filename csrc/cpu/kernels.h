// What one instruction set's file offers to cpu.cpp.
#pragma once

#include "core/problem.h"

namespace flashx {

struct Kernels {
  void (*forward)(const Problem&, const ForwardTensors&, int threads);
  void (*backward)(const Problem&, const BackwardTensors&, int threads);
};

}  // namespace flashx
