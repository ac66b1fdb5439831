#include "cpu/cpu.h"

#include <stdexcept>

namespace flashx {

#if FLASHX_X86
namespace avx512 {
Kernels kernels();
}
namespace avx2 {
Kernels kernels();
}
#endif
namespace plain {
Kernels kernels();
}

namespace {

struct Isa {
  const char* name;
  Kernels (*kernels)();
  bool (*usable)();
};

// Best first. What each needs is what CMakeLists.txt compiles it with.
constexpr Isa kIsas[] = {
#if FLASHX_X86
    {"avx512", avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     }},
    {"avx2", avx2::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"plain", plain::kernels, [] { return true; }},
};

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.usable()) names.push_back(isa.name);
  }
  return names;
}

Kernels cpu_kernels(const std::string& name) {
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.usable()) return isa.kernels();
  }
  throw std::invalid_argument("isa must be one that this machine runs, got '" + name + "'");
}

}  // namespace flashx
