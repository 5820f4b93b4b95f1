// The table of kernels one instruction set provides. kernels.cpp is compiled once per set.
#pragma once

#include <cstdint>

#include "../common/contract.h"

namespace bitcpm {

// Every kernel works on groups [0, num_groups) of group_len contiguous elements each. A row-major
// [O, I] weight whose groups divide I is exactly that, so rows never appear here.
struct Kernels {
  // wq = code * scale in the type of w; wq may be w itself.
  void (*fake_quantize)(DType dtype, const void* w, void* wq, int64_t num_groups,
                        int64_t group_len, float eps);
  // codes in {-1, 0, 1} and one scale per group.
  void (*quantize)(DType dtype, const void* w, int8_t* codes, float* scales, int64_t num_groups,
                   int64_t group_len, float eps);
  // Canonical sums of absolute values, one per group.
  void (*abs_sums)(DType dtype, const void* w, float* sums, int64_t num_groups,
                   int64_t group_len);
  // As fake_quantize with the scales given.
  void (*fake_quantize_with_scales)(DType dtype, const void* w, const float* scales, void* wq,
                                    int64_t num_groups, int64_t group_len);
};

Kernels get_kernels_generic();
#if defined(__x86_64__)
Kernels get_kernels_avx2();
Kernels get_kernels_avx512();
#endif

}  // namespace bitcpm
