// The table of kernels one instruction set provides. kernels.cpp is compiled once per set.
#pragma once

#include <cstdint>

#include "../common/contract.h"

namespace bitcpm {

// Kernels work on groups [0, num_groups) of group_len contiguous elements each. A row-major [O, I]
// weight whose groups divide I is exactly that, so rows appear only where padding depends on them.
// An output may be its input itself, but must not overlap it in another way.
struct Kernels {
  // wq = level * scale in the type of w.
  void (*fake_quantize)(DType dtype, Grid grid, const void* w, void* wq, int64_t num_groups,
                        int64_t group_len, float eps);
  // Stored codes (those of half_sym4 are in units of scale / 2) and one scale per group.
  void (*quantize)(DType dtype, Grid grid, const void* w, int8_t* codes, float* scales,
                   int64_t num_groups, int64_t group_len, float eps);
  // Canonical sums of absolute values, one per group.
  void (*abs_sums)(DType dtype, const void* w, float* sums, int64_t num_groups,
                   int64_t group_len);
  // As fake_quantize with the scales given.
  void (*fake_quantize_with_scales)(DType dtype, Grid grid, const void* w, const float* scales,
                                    void* wq, int64_t num_groups, int64_t group_len);
  // Codes -1, 0, 1 to two-bit fields, and back. Return the first row with anything else, or -1;
  // the output is written in full in any case.
  int64_t (*pack2)(const int8_t* codes, uint8_t* packed, int64_t rows, int64_t cols);
  int64_t (*unpack2)(const uint8_t* packed, int8_t* codes, int64_t rows, int64_t cols);
  // Each row on its own grid of 255 steps, as values in the type of x.
  void (*int8_per_token)(DType dtype, const void* x, void* xq, int64_t rows, int64_t cols);
};

Kernels get_kernels_generic();
#if defined(__x86_64__)
Kernels get_kernels_avx2();
Kernels get_kernels_avx512();
#elif defined(__aarch64__)
Kernels get_kernels_neon();
#endif

}  // namespace bitcpm
