// The operators over whole tensors and lists of tensors, spread over threads. The result does not
// depend on the number of threads. No Python here: the module and the checks both link it.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace bitcpm {

// One tensor as groups of group_len contiguous elements; wq may be w.
struct Job {
  const void* w;
  const float* scales;  // one per group; only fake_quantize_with_scales reads them
  void* wq;
  DType dtype;
  int64_t num_groups;
  int64_t group_len;
};

// Of the current processor's kernels; arguments as in struct Kernels. Sizes are not negative.
void fake_quantize(const Kernels& kernels, const std::vector<Job>& jobs, Grid grid, float eps,
                   int threads);
void fake_quantize_with_scales(const Kernels& kernels, const std::vector<Job>& jobs, Grid grid,
                               int threads);
void quantize(const Kernels& kernels, DType dtype, Grid grid, const void* w, int8_t* codes,
              float* scales, int64_t num_groups, int64_t group_len, float eps, int threads);
void abs_sums(const Kernels& kernels, DType dtype, const void* w, float* sums, int64_t num_groups,
              int64_t group_len, int threads);
int64_t pack2(const Kernels& kernels, const int8_t* codes, uint8_t* packed, int64_t rows,
              int64_t cols, int threads);
int64_t unpack2(const Kernels& kernels, const uint8_t* packed, int8_t* codes, int64_t rows,
                int64_t cols, int threads);
void int8_per_token(const Kernels& kernels, DType dtype, const void* x, void* xq, int64_t rows,
                    int64_t cols, int threads);

}  // namespace bitcpm
