#define FLASHX_ISA avx512
#define FLASHX_VECTOR_BYTES 64
#define FLASHX_REGISTERS 32
#include "cpu/isa.h"
