// The CUDA backend's host interface: once for GPUs (namespace cuda, built by nvcc), once for the emulator (namespace
// cuda_emulated, the same sources built by the host compiler). Knows no torch.
#pragma once

#include <string>
#include <vector>

#include "core/problem.h"

namespace flashx {

// What a call runs on.
struct CudaCall {
  int device = 0;
  void* stream = nullptr;     // cudaStream_t
  void* workspace = nullptr;  // forward_workspace() bytes on the device, aligned to 16
  bool tf32 = false;          // float32 products in plain TF32 instead of three of them
};

// Failures are std::runtime_error, naming kernel and problem. Nothing here waits for the device.
struct Machine {
  int64_t (*forward_workspace)(const Problem&);  // in bytes; 0 for most
  const char* (*forward_kernel)(const Problem&);
  void (*forward)(const Problem&, const ForwardTensors&, const CudaCall&);
  void (*backward)(const Problem&, const BackwardTensors&, const CudaCall&);
};

namespace cuda {
Machine machine();
std::vector<std::string> conformance_names();
void conformance(const std::string& name, const void* input, int64_t input_bytes, void* output, int64_t output_bytes,
                 const CudaCall& call);
}  // namespace cuda
namespace cuda_emulated {
Machine machine();
std::vector<std::string> conformance_names();
void conformance(const std::string& name, const void* input, int64_t input_bytes, void* output, int64_t output_bytes,
                 const CudaCall& call);
}  // namespace cuda_emulated

}  // namespace flashx
