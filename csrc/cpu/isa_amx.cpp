// AVX-512, and bfloat16 products on AMX tiles.
#define FLASHX_ISA amx
#define FLASHX_VECTOR_BYTES 64
#define FLASHX_REGISTERS 32
#define FLASHX_BF16 2
#include "cpu/isa.h"
