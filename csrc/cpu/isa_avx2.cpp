#define FLASHX_ISA avx2
#define FLASHX_VECTOR_BYTES 32
#define FLASHX_REGISTERS 16
#include "cpu/isa.h"
