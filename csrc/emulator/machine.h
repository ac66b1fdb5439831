// The emulated GPU's host side: launches, faults, traffic. Its device side is ptx.h.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace flashx::emulator {

// Global memory that a launch may touch. Buffers may overlap: the first that holds an access counts it.
struct Buffer {
  std::string name;
  const void* data;
  int64_t bytes;
  bool writable;
};

struct Launch {
  std::string kernel;
  int64_t grid[3] = {1, 1, 1};
  int threads = 0;
  int shared_bytes = 0;
  std::vector<Buffer> buffers;
};

// What a GPU would have done silently or by hanging: the message names kernel, block, thread and address.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs `thread` once for every CUDA thread of the launch, each on a fiber of its own; blocks are spread over the CPU's
// cores. Throws Fault, the one of the first block that has any.
void run(const Launch& launch, const std::function<void()>& thread);

// ---- Settings, for launches from then on

// When the bytes of a cp.async arrive: as late as the waits allow, or at once. Warps run in ascending order with Late,
// in descending order with Early.
enum class Completion { Late, Early };
void set_completion(Completion completion);
void set_race_check(bool on);
// Threads that a launch may use; 0 means one per core.
void set_workers(int workers);

// ---- What launches did since the last reset; only those that ended without a fault

struct Traffic {
  std::string buffer;
  int64_t read = 0, written = 0;  // bytes of global memory
};
// One entry per buffer name, in the order of first use.
std::vector<Traffic> traffic();

// launches, blocks, mma, ldmatrix (both per warp), ldmatrix_conflicts (wavefronts beyond the first of each eight rows),
// cp_async (per thread), barriers (per block or part of it).
std::vector<std::pair<std::string, int64_t>> counters();

void reset_traffic();

}  // namespace flashx::emulator
