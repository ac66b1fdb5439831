// What one instruction set's file offers to cpu.cpp.
#pragma once

#include "core/problem.h"

namespace flashx {

// What multiplies and adds: float32 vectors, vectors of bfloat16 pairs, tiles of bfloat16.
enum class Unit { Float32, BFloat16Pairs, BFloat16Tiles };

struct Kernels {
  // One call, or the levels of one, without members: the last level has the results.
  void (*forward)(const ForwardCall* levels, int count, int threads);
  void (*backward)(const Problem&, const BackwardTensors&, int threads);
  // cpu/probe.h. Rounds of multiply-adds on every thread: the number of operations, two each; 0 without such a unit.
  double (*multiply_adds)(Unit, int64_t rounds, int threads);
  // The sum of all words, modulo 2^32.
  uint32_t (*read)(const uint32_t* words, int64_t count, int threads);
};

}  // namespace flashx
