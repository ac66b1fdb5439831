// The CPU backend: picks the instruction set's kernels at run time.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace flashx {

// Names of the instruction sets that this build has and this machine runs, best first.
std::vector<std::string> cpu_isas();

// The kernels of one of cpu_isas(). Throws std::invalid_argument for another name.
Kernels cpu_kernels(const std::string& isa);

}  // namespace flashx
