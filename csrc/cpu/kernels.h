// What one instruction set's file offers to cpu.cpp.
#pragma once

#include "core/problem.h"

namespace flashx {

struct ForwardTensors {
  View query, key, value, out;
  void* lse;  // (batch, q_heads, q_len), accumulation dtype
};

struct BackwardTensors {
  View query, key, value, out, grad_out;
  const void* lse;
  const void* grad_lse;  // may be null
  void* delta;           // out: rowsum(grad_out * out) - grad_lse, (batch, q_heads, q_len)
  View grad_query, grad_key, grad_value;
  void* grad_bias;  // contiguous, bias's own size and dtype; may be null
};

struct Kernels {
  void (*forward)(const Problem&, const ForwardTensors&, int threads);
  void (*backward)(const Problem&, const BackwardTensors&, int threads);
};

}  // namespace flashx
