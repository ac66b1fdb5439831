// The kernels of seeded.cuh by name, for tests.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flashx::cuda_emulated {

// Two blocks of a kernel of seeded.cuh, "product" or "transpose", with a bug, or with "none". The input is float16 a
// (128 x 128), b (32 x 128), the output float32 (128 x 32); or both are float32 (2 x 32 x 32).
std::vector<std::string> seeded_bug_names();  // "product/missing_wait", ...
void seeded_bug(const std::string& name, void* input, int64_t input_bytes, void* output, int64_t output_bytes);

}  // namespace flashx::cuda_emulated
