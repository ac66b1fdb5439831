// From a kernel to its launch: on a GPU, or on the emulator. A kernel is a struct with
//   struct Params;                            passed by value
//   static constexpr int kThreads, kBlocks;   threads of a block; blocks that should fit a multiprocessor
//   static constexpr int kSharedBytes;        dynamic shared memory
//   static FLASHX_DEVICE void run(const Params&);
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/cuda.h"
#include "cuda/ptx.cuh"

#if defined(FLASHX_EMULATED)
#include "emulator/machine.h"
#define FLASHX_MACHINE cuda_emulated
#else
#include <cuda_runtime.h>
#define FLASHX_MACHINE cuda
#endif

namespace flashx::FLASHX_MACHINE {

// Global memory that a launch may touch: what the emulator checks accesses against, and counts bytes by.
struct Buffer {
  const char* name;
  const void* data;
  int64_t bytes;
  bool writable;
};

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// A value, or what makes one: a launch's name is wanted only if it fails, its buffers only by the emulator.
template <typename T>
auto made(const T& value) {
  if constexpr (std::is_invocable_v<T>) {
    return value();
  } else {
    return value;
  }
}

#if defined(FLASHX_EMULATED)

template <typename Kernel, typename Name, typename Buffers = std::vector<Buffer>>
void launch(const Name& name, Grid grid, const typename Kernel::Params& params, const CudaCall&,
            const Buffers& buffers) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emulator::Launch launch;
  launch.kernel = made(name);
  launch.grid[0] = grid.x, launch.grid[1] = grid.y, launch.grid[2] = grid.z;
  launch.threads = Kernel::kThreads;
  launch.shared_bytes = Kernel::kSharedBytes;
  for (const Buffer& b : made(buffers)) launch.buffers.push_back({b.name, b.data, b.bytes, b.writable});
  emulator::run(launch, [&params] { Kernel::run(params); });
}

#else

template <typename Name>
void check(cudaError_t status, const Name& name) {
  if (status != cudaSuccess) throw std::runtime_error(made(name) + ": " + cudaGetErrorString(status));
}

// The numbers stand in the kernel's name for resources.py: the machine code has dynamic shared memory nowhere else.
template <typename Kernel, int kThreads = Kernel::kThreads, int kSharedBytes = Kernel::kSharedBytes>
__global__ void __launch_bounds__(kThreads, Kernel::kBlocks)
    entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

// The calling thread's device for the time of a launch.
class DeviceGuard {
 public:
  template <typename Name>
  DeviceGuard(int device, const Name& name) {
    check(cudaGetDevice(&before_), name);
    if (before_ != device) check(cudaSetDevice(device), name);
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <typename Kernel, typename Name, typename Buffers = std::vector<Buffer>>
void launch(const Name& name, Grid grid, const typename Kernel::Params& params, const CudaCall& call, const Buffers&) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const DeviceGuard guard(call.device, name);
  const auto kernel = reinterpret_cast<const void*>(&entry<Kernel, Kernel::kThreads, Kernel::kSharedBytes>);
  if constexpr (Kernel::kSharedBytes > 48 * 1024) {
    // Cheap, and not a stream operation: allowed while a graph is captured.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes), name);
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  void* arguments[] = {const_cast<typename Kernel::Params*>(&params)};
  check(cudaLaunchKernel(kernel, blocks, dim3(Kernel::kThreads), arguments, Kernel::kSharedBytes,
                         static_cast<cudaStream_t>(call.stream)),
        name);
}

#endif

}  // namespace flashx::FLASHX_MACHINE
