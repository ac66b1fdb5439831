#include "emulator/testing.h"

#include <stdexcept>

#include "emulator/seeded.cuh"

namespace flashx::cuda_emulated {

namespace {

constexpr int kBlocks = 2;

void check_bytes(const std::string& name, int64_t in, int64_t in_wanted, int64_t out, int64_t out_wanted) {
  if (in == in_wanted && out == out_wanted) return;
  throw std::invalid_argument(name + " takes " + std::to_string(in_wanted) + " bytes and gives " +
                              std::to_string(out_wanted) + ", got " + std::to_string(in) + " and " +
                              std::to_string(out));
}

template <Bug kBug, bool kPacked = false>
void product(const std::string& name, void* in, int64_t in_bytes, void* out, int64_t out_bytes) {
  using Kernel = SeededProduct<kBug>;
  const int64_t a_bytes = kBlocks * Kernel::kABytes;
  check_bytes(name, in_bytes, a_bytes + Kernel::kBBytes, out_bytes, kBlocks * Kernel::kOutBytes);
  const Half *a = static_cast<Half*>(in), *b = a + a_bytes / 2;
  const Buffer first{"a", a, kPacked ? in_bytes : a_bytes, false};
  const Buffer second{"b", kPacked ? a : b, kPacked ? in_bytes : Kernel::kBBytes, false};
  launch<Kernel>(name, {kBlocks, 1, 1}, {a, b, static_cast<float*>(out)}, CudaCall{},
                 {{"out", out, out_bytes, true}, first, second});
}

template <Bug kBug>
void transpose(const std::string& name, void* in, int64_t in_bytes, void* out, int64_t out_bytes) {
  using Kernel = SeededTranspose<kBug>;
  check_bytes(name, in_bytes, kBlocks * Kernel::kInBytes, out_bytes, kBlocks * Kernel::kInBytes);
  launch<Kernel>(name, {kBlocks, 1, 1}, {static_cast<float*>(in), static_cast<float*>(out)}, CudaCall{},
                 {{"in", in, in_bytes, false}, {"out", out, out_bytes, true}});
}

struct Seeded {
  const char* name;
  void (*run)(const std::string&, void*, int64_t, void*, int64_t);
};

const Seeded kSeeded[] = {
    {"product/none", product<Bug::None>},
    {"product/packed", product<Bug::None, true>},  // no bug: a and b lie in one buffer with two names
    {"product/missing_wait", product<Bug::MissingWait>},
    {"product/missing_commit", product<Bug::MissingCommit>},
    {"product/missing_barrier", product<Bug::MissingBarrier>},
    {"product/missing_last_barrier", product<Bug::MissingLastBarrier>},
    {"product/store_over_tile", product<Bug::StoreOverTile>},
    {"product/wrong_swizzle", product<Bug::WrongSwizzle>},
    {"product/no_swizzle", product<Bug::NoSwizzle>},
    {"product/tile_off_by_one", product<Bug::TileOffByOne>},
    {"product/misaligned", product<Bug::Misaligned>},
    {"product/divergent_barrier", product<Bug::DivergentBarrier>},
    {"product/divergent_mma", product<Bug::DivergentMma>},
    {"product/divergent_warp", product<Bug::DivergentWarp>},
    {"product/lane_exit", product<Bug::LaneExit>},
    {"transpose/none", transpose<Bug::None>},
    {"transpose/missing_barrier", transpose<Bug::MissingBarrier>},
    {"transpose/missing_last_barrier", transpose<Bug::MissingLastBarrier>},
    {"transpose/tile_off_by_one", transpose<Bug::TileOffByOne>},
    {"transpose/shared_out_of_bounds", transpose<Bug::SharedOutOfBounds>},
    {"transpose/missing_shared_base", transpose<Bug::MissingSharedBase>},
    {"transpose/misaligned", transpose<Bug::Misaligned>},
    {"transpose/unwritten", transpose<Bug::Unwritten>},
    {"transpose/read_only", transpose<Bug::ReadOnly>},
    {"transpose/divergent_barrier", transpose<Bug::DivergentBarrier>},
    {"transpose/missing_warp_sync", transpose<Bug::MissingWarpSync>},
    {"transpose/shuffle_for_barrier", transpose<Bug::ShuffleForBarrier>},
    {"transpose/barrier_of_half", transpose<Bug::BarrierOfHalf>},
    {"transpose/barrier_too_wide", transpose<Bug::BarrierTooWide>},
    {"transpose/mixed_barriers", transpose<Bug::MixedBarriers>},
    {"transpose/early_exit", transpose<Bug::EarlyExit>},
};

}  // namespace

std::vector<std::string> seeded_bug_names() {
  std::vector<std::string> names;
  for (const Seeded& s : kSeeded) names.push_back(s.name);
  return names;
}

void seeded_bug(const std::string& name, void* input, int64_t input_bytes, void* output, int64_t output_bytes) {
  for (const Seeded& s : kSeeded) {
    if (name == s.name) return s.run(name, input, input_bytes, output, output_bytes);
  }
  throw std::invalid_argument("no seeded bug is called " + name);
}

}  // namespace flashx::cuda_emulated
