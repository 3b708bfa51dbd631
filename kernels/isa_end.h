// Ends the code that is compiled for one instruction set. See isa_begin.h.

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
