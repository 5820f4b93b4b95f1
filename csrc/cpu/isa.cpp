#include "isa.h"

namespace bitcpm {

std::vector<Isa> list_isas() {
  std::vector<Isa> isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    isas.push_back({"avx512", get_kernels_avx512});
  if (__builtin_cpu_supports("avx2")) isas.push_back({"avx2", get_kernels_avx2});
#elif defined(__aarch64__)
  isas.push_back({"neon", get_kernels_neon});  // part of every 64-bit Arm that runs Linux
#endif
  isas.push_back({"generic", get_kernels_generic});
  return isas;
}

}  // namespace bitcpm
