// AVX-512 with products of bfloat16 pairs.
#define FLASHX_ISA avx512_bf16
#define FLASHX_VECTOR_BYTES 64
#define FLASHX_REGISTERS 32
#define FLASHX_BF16 1
#include "cpu/isa.h"
