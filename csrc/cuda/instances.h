// The kernels' launches, one instance for each element type and head dim class.
#pragma once

#include "cuda/launch.cuh"

namespace flashx::FLASHX_MACHINE {

template <typename E, int kDim>
struct ForwardInstance {
  // splits > 1: so many parts of the keys, combined afterwards.
  static void run(const Problem& problem, const ForwardTensors& tensors, const CudaCall& call, int splits);
};

template <typename E, int kDim>
struct BackwardInstance {
  static void run(const Problem& problem, const BackwardTensors& tensors, const CudaCall& call);
};

}  // namespace flashx::FLASHX_MACHINE
