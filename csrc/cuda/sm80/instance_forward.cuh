// Forward's launches for one element type and head dim class; each is instantiated in a file that CMake generates.
#pragma once

#include "cuda/combine.cuh"
#include "cuda/instances.h"
#include "cuda/logits.cuh"
#include "cuda/sm80/forward.cuh"
#include "cuda/sm80/host.cuh"

namespace flashx::FLASHX_MACHINE {

template <typename E, typename Kernel>
void launch_forward(const char* pass, int dim, const Problem& problem, const ForwardTensors& tensors,
                    const CudaCall& call, int splits) {
  const Sizes query = query_sizes(problem, problem.head_dim), out = query_sizes(problem, problem.value_dim);
  const Sizes key = key_sizes(problem, problem.head_dim), value = key_sizes(problem, problem.value_dim);
  const int64_t rows = numbered_rows(problem);
  const Carry& carry = tensors.carry;
  typename Kernel::Params params{};
  params.problem = problem;
  params.tensors = tensors;
  params.carried = numbered_view(problem, carry.acc, problem.value_dim);
  params.row_tiles = row_tiles(problem, Kernel::kRows);
  params.rows = rows;
  params.split_tiles = splits > 1 ? split_keys(problem) / Kernel::kKeys : std::numeric_limits<int>::max();
  params.query_aligned = is_aligned(tensors.query, query, sizeof(E));
  params.key_aligned = is_aligned(tensors.key, key, sizeof(E));
  params.value_aligned = is_aligned(tensors.value, value, sizeof(E));
  params.out_aligned = is_aligned(tensors.out, out, sizeof(E));
  params.exact = !call.tf32;
  if (splits > 1) {
    params.partial_out = static_cast<float*>(call.workspace);
    params.partial_lse = params.partial_out + splits * rows * problem.value_dim;
  }
  const auto buffers = [&] {
    std::vector<Buffer> all{buffer("query", tensors.query, query, sizeof(E), false),
                            buffer("key", tensors.key, key, sizeof(E), false),
                            buffer("value", tensors.value, value, sizeof(E), false),
                            buffer("out", tensors.out, out, sizeof(E), true),
                            {"lse", tensors.lse, rows * 4, true}};
    add_logit_buffers(problem, all);
    if (carry.max) {
      all.push_back({"carry_max", carry.max, rows * 4, carry.suspend});
      all.push_back({"carry_sum", carry.sum, rows * 4, carry.suspend});
      all.push_back({"carry_acc", carry.acc, rows * problem.value_dim * 4, carry.suspend});
    }
    if (splits > 1) all.push_back({"workspace", call.workspace, splits * rows * (problem.value_dim + 1) * 4, true});
    return all;
  };
  const Grid grid{row_blocks(problem, Kernel::kRows), splits, 1};
  launch<Kernel>(kernel_name<E>(problem, pass, dim), grid, params, call, buffers);
  if (splits > 1) {
    const typename Combine<E>::Params combine{
        problem, tensors.out, static_cast<float*>(tensors.lse), carry, params.partial_out, params.partial_lse,
        rows,    splits};
    const int64_t warps = problem.batch * problem.q_heads * problem.q_len;
    launch<Combine<E>>(kernel_name<E>(problem, "combine", dim), {ceil_div(warps, Combine<E>::kWarps), 1, 1}, combine,
                       call, buffers);
  }
}

template <typename E, int kDim>
void ForwardInstance<E, kDim>::run(const Problem& problem, const ForwardTensors& tensors, const CudaCall& call,
                                   int splits) {
  // Few rows do not fill the plain kernel's larger tiles.
  if (is_plain(problem) && !tensors.carry.max && query_rows(problem) > Forward<E, kDim, true>::kRows) {
    launch_forward<E, Forward<E, kDim, false>>("forward", kDim, problem, tensors, call, splits);
  } else {
    launch_forward<E, Forward<E, kDim, true>>("forward, general", kDim, problem, tensors, call, splits);
  }
}

}  // namespace flashx::FLASHX_MACHINE
