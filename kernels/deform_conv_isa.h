// Compiles the kernels for one instruction set. deform_conv_cpu.cpp includes this file once per instruction set, so it
// has no include guard. Before each include, define the macros of isa_begin.h and
//
//   CPM_BF16_DOT  1 if the target has the AVX512_BF16 instructions, else 0
//
// This file undefines all of them.

#include "isa_begin.h"

#include "simd.h"
#include "product_tile.h"
#include "deform_conv_gemm.h"
#include "deform_conv_kernels.h"

#include "isa_end.h"

#undef CPM_BF16_DOT
