// The target's baseline: SSE2 on x86-64, NEON on AArch64.
#define FLASHX_ISA plain
#define FLASHX_VECTOR_BYTES 16
#define FLASHX_REGISTERS 16
#include "cpu/isa.h"
