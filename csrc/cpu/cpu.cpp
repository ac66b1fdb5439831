#include "cpu/cpu.h"

#include <stdexcept>

#if FLASHX_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace flashx {

#if FLASHX_X86
#if FLASHX_AMX
namespace amx {
Kernels kernels();
}
#endif
namespace avx512_bf16 {
Kernels kernels();
}
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

#if FLASHX_X86

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma");
}

bool has_avx512_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx512() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}

#if FLASHX_AMX

// The operating system keeps tile registers for a process only once it has asked for them.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  return (edx >> 22 & 1) && (edx >> 24 & 1) && may_use_tiles();
}

#endif

#endif

// Best first. What each needs is what CMakeLists.txt compiles it with.
constexpr Isa kIsas[] = {
#if FLASHX_X86
#if FLASHX_AMX
    {"amx", amx::kernels, has_amx},
#endif
    // Intel's vectors multiply bfloat16 pairs at less than the rate of float32, AMD's at twice that.
    {"avx512_bf16", avx512_bf16::kernels, [] { return has_avx512_bf16() && !__builtin_cpu_is("intel"); }},
    {"avx512", avx512::kernels, has_avx512},
    {"avx512_bf16", avx512_bf16::kernels, [] { return has_avx512_bf16() && __builtin_cpu_is("intel"); }},
    {"avx2", avx2::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"plain", plain::kernels, [] { return true; }},
};

// Asked once: cpuid takes tens of microseconds on a virtual machine.
const std::vector<Isa>& usable_isas() {
  static const std::vector<Isa> usable = [] {
    std::vector<Isa> found;
    for (const Isa& isa : kIsas) {
      if (isa.usable()) found.push_back(isa);
    }
    return found;
  }();
  return usable;
}

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : usable_isas()) names.push_back(isa.name);
  return names;
}

Kernels cpu_kernels(const std::string& name) {
  for (const Isa& isa : usable_isas()) {
    if (name == isa.name) return isa.kernels();
  }
  throw std::invalid_argument("isa must be one that this machine runs, got '" + name + "'");
}

}  // namespace flashx
