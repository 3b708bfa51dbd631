// Starts the code that is compiled for one instruction set; isa_end.h ends it. The files between them are included once
// per instruction set, so neither they nor this file have include guards. Before each include, define
//
//   CPM_ISA           the namespace of the code inside cpm_rcnn
//   CPM_TARGET        the compiler's target string, such as "avx2,fma"; leave undefined for the compiler's default
//   CPM_VECTOR_BYTES  the size of a vector register in bytes
//
// isa_end.h undefines all three.

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
