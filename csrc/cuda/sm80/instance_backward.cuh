// Backward's launches for one element type and head dim class; each is instantiated in a file that CMake generates.
#pragma once

#include "cuda/instances.h"
#include "cuda/sm80/backward.cuh"
#include "cuda/sm80/host.cuh"

namespace flashx::FLASHX_MACHINE {

template <typename E, int kDim, bool kGeneral, typename Buffers>
void launch_sweeps(const BackwardParams& described, const CudaCall& call, const Buffers& buffers) {
  const Problem& problem = described.problem;
  const int64_t heads = problem.key_groups() * problem.kv_heads;
  const auto sweep_keys = [&](auto kernel) {
    using Kernel = decltype(kernel);
    BackwardParams params = described;
    params.tiles = ceil_div(problem.k_len, Kernel::kOwn);
    launch<Kernel>(kernel_name<E>(problem, "grad_key_value", kDim), {params.tiles * heads}, params, call, buffers);
  };
  if constexpr (sm80::one_sweep(sizeof(E), kDim)) {
    sweep_keys(GradKeyValue<E, kDim, kGeneral, true, true>{});
  } else {
    sweep_keys(GradKeyValue<E, kDim, kGeneral, true, false>{});
    sweep_keys(GradKeyValue<E, kDim, kGeneral, false, true>{});
  }
  BackwardParams params = described;
  using Kernel = GradQuery<E, kDim, kGeneral>;
  params.tiles = row_tiles(problem, Kernel::kOwn);
  const Grid grid{row_blocks(problem, Kernel::kOwn)};
  launch<Kernel>(kernel_name<E>(problem, "grad_query", kDim), grid, params, call, buffers);
}

template <typename E, int kDim>
void BackwardInstance<E, kDim>::run(const Problem& problem, const BackwardTensors& tensors, const CudaCall& call) {
  const Sizes query = query_sizes(problem, problem.head_dim), out = query_sizes(problem, problem.value_dim);
  const Sizes key = key_sizes(problem, problem.head_dim), value = key_sizes(problem, problem.value_dim);
  const int64_t rows = numbered_rows(problem);
  const int64_t grad_query_bytes = tensors.adds_grad_query ? 4 : sizeof(E);
  BackwardParams params{};
  params.problem = problem;
  params.tensors = tensors;
  params.query_aligned = is_aligned(tensors.query, query, sizeof(E));
  params.key_aligned = is_aligned(tensors.key, key, sizeof(E));
  params.value_aligned = is_aligned(tensors.value, value, sizeof(E));
  params.grad_out_aligned = is_aligned(tensors.grad_out, out, sizeof(E));
  params.grad_query_aligned = is_aligned(tensors.grad_query, query, sizeof(E));
  params.grad_key_aligned = is_aligned(tensors.grad_key, key, sizeof(E));
  params.grad_value_aligned = is_aligned(tensors.grad_value, value, sizeof(E));
  params.exact = !call.tf32;
  const auto buffers = [&] {
    std::vector<Buffer> all{buffer("query", tensors.query, query, sizeof(E), false),
                            buffer("key", tensors.key, key, sizeof(E), false),
                            buffer("value", tensors.value, value, sizeof(E), false),
                            buffer("out", tensors.out, out, sizeof(E), false),
                            buffer("grad_out", tensors.grad_out, out, sizeof(E), false),
                            {"lse", tensors.lse, rows * 4, false},
                            {"delta", tensors.delta, rows * 4, true},
                            buffer("grad_query", tensors.grad_query, query, grad_query_bytes, true),
                            buffer("grad_key", tensors.grad_key, key, sizeof(E), true),
                            buffer("grad_value", tensors.grad_value, value, sizeof(E), true)};
    if (tensors.grad_lse) all.push_back({"grad_lse", tensors.grad_lse, rows * 4, false});
    add_logit_buffers(problem, all);
    if (tensors.grad_bias) {
      const int64_t* size = problem.bias.size;
      const int64_t bytes = problem.bias.dtype == DType::Float32 ? 4 : 2;
      all.push_back({"grad_bias", tensors.grad_bias, size[0] * size[1] * size[2] * size[3] * bytes, true});
    }
    return all;
  };

  launch<Delta<E>>(kernel_name<E>(problem, "delta", kDim), {ceil_div(rows, Delta<E>::kWarps)}, params, call, buffers);
  if (is_plain(problem) && !tensors.adds_grad_query) {
    launch_sweeps<E, kDim, false>(params, call, buffers);
  } else {
    launch_sweeps<E, kDim, true>(params, call, buffers);
  }
  if (tensors.grad_bias) {
    using Kernel = GradBias<E, kDim>;
    launch<Kernel>(kernel_name<E>(problem, "grad_bias", kDim), {Kernel::blocks(problem)}, params, call, buffers);
  }
}

}  // namespace flashx::FLASHX_MACHINE
