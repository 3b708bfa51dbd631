// The choice of the instruction set at run time.
#pragma once

#include <ATen/Version.h>

#include <string>

#if defined(__x86_64__)
#define CPM_X86 1
#include <immintrin.h>
#endif

namespace cpm_rcnn {

enum class InstructionSet { portable, avx2, avx512 };

// Returns the best instruction set that the processor supports and that ATEN_CPU_CAPABILITY allows. avx2 includes FMA,
// and avx512 includes the parts F, BW, VL and DQ.
inline InstructionSet best_instruction_set() {
#if CPM_X86
  const std::string allowed = at::get_cpu_capability();
  const bool avx512 = allowed.find("AVX512") != std::string::npos;
  const bool avx2 = avx512 || allowed.find("AVX2") != std::string::npos;
  __builtin_cpu_init();
  if (avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return InstructionSet::avx512;
  if (avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
  return InstructionSet::portable;
}

}  // namespace cpm_rcnn
