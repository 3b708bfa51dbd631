// Compiles the kernels for one instruction set. deform_conv_cpu.cpp includes this file once per instruction set, so it
// has no include guard. Before each include, define
//
//   CPM_ISA           the namespace of these kernels inside cpm_rcnn
//   CPM_TARGET        the compiler's target string, such as "avx2,fma"; leave undefined for the compiler's default
//   CPM_VECTOR_BYTES  the size of a vector register in bytes
//   CPM_BF16_DOT      1 if the target has the AVX512_BF16 instructions, else 0
//
// This file undefines all four.

#if defined(CPM_TARGET)
// _Pragma takes a string literal, and only _Pragma lets CPM_TARGET expand inside the pragma.
#define CPM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define CPM_PUSH_TARGET(target_string) \
  CPM_PRAGMA(clang attribute push(__attribute__((target(target_string))), apply_to = function))
CPM_PUSH_TARGET(CPM_TARGET)
#else
#define CPM_SET_TARGET(target_string) CPM_PRAGMA(GCC target(target_string))
#pragma GCC push_options
CPM_SET_TARGET(CPM_TARGET)
#endif
#endif

#include "deform_conv_simd.h"
#include "deform_conv_gemm.h"
#include "deform_conv_kernels.h"

#if defined(CPM_TARGET)
#if defined(__clang__)
#pragma clang attribute pop
#undef CPM_PUSH_TARGET
#else
#pragma GCC pop_options
#undef CPM_SET_TARGET
#endif
#undef CPM_PRAGMA
#undef CPM_TARGET
#endif

#undef CPM_ISA
#undef CPM_VECTOR_BYTES
#undef CPM_BF16_DOT
