// The CUDA backend's host side: checks sizes, picks the instance. Built by nvcc for GPUs, by the host compiler for the
// emulator.
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "built.h"  // generated: FLASHX_DIMS, the head dim classes of this build
#include "cuda/instances.h"
#include "cuda/sm80/host.cuh"

namespace flashx::FLASHX_MACHINE {
namespace {

// The parts that a call's keys are cut into: a function of its lengths alone, so that a sequence's result does not
// depend on what it is batched with; nor on how much longer than its keys their tensor is, since what fits one part is
// the same bits, cut or not.
int splits(const Problem& problem) {
  constexpr int64_t kRows = 64;
  if (problem.q_len == 0 || query_rows(problem) > kRows) return 1;
  const bool dense = !problem.sequences;
  const int64_t keys = dense ? problem.mask.hi(problem.q_len - 1, problem.k_len) : problem.k_len;
  return static_cast<int>(clamp<int64_t>(ceil_div(keys, split_keys(problem)), 1, std::numeric_limits<int>::max()));
}

int64_t forward_workspace(const Problem& problem) {
  const int64_t n = splits(problem);
  return n == 1 ? 0 : n * numbered_rows(problem) * (problem.value_dim + 1) * 4;
}

[[noreturn]] void refuse(const std::string& rule, const Problem& problem) {
  throw std::invalid_argument("the CUDA kernels take " + rule + ", got" + describe(problem));
}

// What the tables say is checked by the kernels; their sizes are not.
void check_tables(const Problem& p) {
  const auto whole = [](int64_t n) { return n >= 0 && n < int64_t{1} << 31; };
  const bool fits = p.q_rows >= p.q_len && (p.pages.table || p.k_rows >= p.k_len);
  const bool same = p.q_rows == p.q_len && (p.pages.table || p.k_rows == p.k_len);
  if (p.sequences ? !fits : !same) refuse("tensors as long as the longest sequence, or longer if it has a table", p);
  if (p.packed && !p.sequences) refuse("packed rows with a table of sequences", p);
  if (p.members && (!p.member_begin || p.groups < 1 || !p.sequences || p.packed || p.pages.table)) {
    refuse("members in groups, with a table of sequences that are neither packed nor paged", p);
  }
  if (p.pages.table && (p.pages.width < 1 || p.pages.size < 1 || p.pages.count < 1 || !whole(p.pages.width) ||
                        !whole(p.pages.size) || !whole(p.pages.count))) {
    refuse("page tables of at least one page", p);
  }
  if (p.bias.data && (p.sequences || p.pages.table)) refuse("a bias with dense batches only", p);
  const BlockMap& blocks = p.blocks;
  if (!blocks.map) return;
  const auto size = [](int32_t n) { return n >= 16 && n <= 256 && n % 16 == 0; };
  if (!size(blocks.q_block) || !size(blocks.k_block)) refuse("blocks of 16 to 256, multiples of 16", p);
  const bool bits =
      blocks.bitmaps == 0 || (blocks.bitmaps > 0 && blocks.bitmaps < (int64_t{1} << 31) - 2 && blocks.bits);
  const bool sizes = whole(blocks.q_blocks) && whole(blocks.k_blocks) && blocks.batch >= 0 && blocks.head >= 0;
  if (!bits || !sizes) refuse("block maps of at least 0 blocks, and the bitmaps that they name", p);
}

// What the kernels take for granted. Python has checked the tensors; this is what a GPU would not forgive.
void check(const Problem& p, std::initializer_list<View> views) {
  if (smaller(smaller(p.batch, p.q_heads), smaller(p.q_len, p.k_len)) < 0 || p.kv_heads < 0 || p.value_dim < 0) {
    refuse("sizes of at least 0", p);
  }
  if (p.kv_heads == 0 ? p.q_heads != 0 : p.q_heads % p.kv_heads != 0) {
    refuse("query heads that are a multiple of the key heads", p);
  }
  if (p.head_dim < 1 || p.head_dim > 256 || p.value_dim > 256)
    refuse("head dims of 1..256 and value dims up to 256", p);
  // Row and block indices have 32 bits on the device, one past a last tile too; a tile has at least 16 rows. Each size
  // by itself comes first, so that no product overflows.
  constexpr int64_t kLimit = int64_t{1} << 31, kTile = 1024;
  const bool small = larger(larger(p.batch, p.q_heads), larger(p.q_len, p.k_len)) < kLimit &&
                     larger(p.groups, p.q_rows) < kLimit && p.k_rows < int64_t{1} << 40;
  const int64_t longest = small ? larger(query_rows(p), p.k_len) : kLimit, heads = small ? p.batch * p.q_heads : kLimit;
  // All members' rows may be one group's.
  const bool shares = p.members && small && longest < kLimit;
  const int64_t rows = shares ? p.batch * query_rows(p) : longest;
  const int64_t groups = shares ? larger(p.batch, p.groups) * p.q_heads : heads;
  if (larger(longest, rows) >= kLimit - kTile || larger(heads, groups) >= kLimit ||
      (longest / 16 + 1) * (shares ? p.groups * p.q_heads : heads) >= kLimit ||
      (rows / 16 + p.groups + 1) * (shares ? p.q_heads : 1) >= kLimit || heads * p.q_len / 4 >= kLimit ||
      (p.packed ? p.q_heads : heads) * p.q_rows / 4 >= kLimit) {
    refuse("fewer than 2**31 rows and tiles", p);
  }
  constexpr int kLargestGridY = 65535;
  if (splits(p) > kLargestGridY) refuse("at most 65535 splits of 1024 keys", p);
  if (p.batch > 0) check_tables(p);
  const uintptr_t bytes = p.dtype == DType::Float32 ? 4 : 2;
  for (const View& view : views) {
    if (reinterpret_cast<uintptr_t>(view.data) % bytes != 0)
      refuse("addresses that are multiples of the element size", p);
  }
  const uintptr_t bias_bytes = p.bias.dtype == DType::Bool ? 1 : p.bias.dtype == DType::Float32 ? 4 : 2;
  if (p.bias.dtype == DType::Float64 || reinterpret_cast<uintptr_t>(p.bias.data) % bias_bytes != 0) {
    refuse("a bias of bool, float32, float16 or bfloat16 at a multiple of its element size", p);
  }
}

// f(element, std::integral_constant of the smallest head dim class that fits).
template <typename E, typename F, int... kDims>
void with_dim(int dim, F f, std::integer_sequence<int, kDims...>) {
  const bool found = ((dim <= kDims && (f(E{}, std::integral_constant<int, kDims>{}), true)) || ...);
  if (!found) throw std::invalid_argument("this build has no kernels for head dim " + std::to_string(dim));
}

template <typename F>
void visit(const Problem& problem, F f) {
  const int dim = larger(problem.head_dim, problem.value_dim);
  using Dims = std::integer_sequence<int, FLASHX_DIMS>;
  switch (problem.dtype) {
    case DType::Float32:
      return with_dim<float>(dim, f, Dims{});
    case DType::Float16:
      return with_dim<Half>(dim, f, Dims{});
    case DType::BFloat16:
      return with_dim<BFloat16>(dim, f, Dims{});
    default:
      throw std::invalid_argument("the CUDA kernels take float16, bfloat16 and float32");
  }
}

const char* forward_kernel(const Problem& problem) { return splits(problem) > 1 ? "sm80, split keys" : "sm80"; }

void forward(const Problem& problem, const ForwardTensors& tensors, const CudaCall& call) {
  check(problem, {tensors.query, tensors.key, tensors.value, tensors.out});
  const Carry& carry = tensors.carry;
  const bool complete = carry.max && carry.sum && (carry.acc || problem.value_dim == 0);
  if ((carry.max || carry.suspend) && !complete && numbered_rows(problem) > 0) {
    refuse("a carried state with its max, sum and accumulator", problem);
  }
  visit(problem, [&](auto element, auto dim) {
    ForwardInstance<decltype(element), decltype(dim)::value>::run(problem, tensors, call, splits(problem));
  });
}

void backward(const Problem& problem, const BackwardTensors& tensors, const CudaCall& call) {
  check(problem, {tensors.query, tensors.key, tensors.value, tensors.out, tensors.grad_out, tensors.grad_query,
                  tensors.grad_key, tensors.grad_value});
  if (problem.pages.table) refuse("pages in the forward only", problem);
  visit(problem, [&](auto element, auto dim) {
    BackwardInstance<decltype(element), decltype(dim)::value>::run(problem, tensors, call);
  });
}

}  // namespace

Machine machine() { return {forward_workspace, forward_kernel, forward, backward}; }

}  // namespace flashx::FLASHX_MACHINE
