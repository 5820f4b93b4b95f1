// Tiling of fake_quantize, which also serves quantize: pure C++, no CANN.
#pragma once

#include "../../common/group_tiling.h"

namespace bitcpm::ascend {

// Passed to the kernel by value.
struct FakeQuantizeTiling {
  GroupTiling groups;
  float one_over_n;
  float eps;
};

// Which of the three outputs are wanted.
struct FakeQuantizeOutputs {
  bool wq, codes, scales;
};

constexpr TilingStatus make_fake_quantize_tiling(DType dtype, int64_t rows, int64_t cols,
                                                 int64_t group_len, float eps,
                                                 const FakeQuantizeOutputs& outputs,
                                                 const Device& device, FakeQuantizeTiling* tiling) {
  int64_t num_groups = 0;
  if (!count_matrix_groups(rows, cols, group_len, &num_groups)) return TilingStatus::kBadShape;
  const int64_t size = size_of(dtype);
  GroupCosts costs = {};
  costs.element_size = size;
  costs.whole_in = 2 * size;
  // 16-bit: the magnitudes beside their float32 copy; float32: the magnitudes alone.
  costs.rest = (outputs.wq ? 2 * size : 0) + (size == 2 ? 6 : 4);
  if (outputs.codes) {
    // Scratch of the codes takes the place of the float32 copy where that is large enough.
    costs.code_rest = 2 + (size == 2 ? 0 : 2);
    costs.rest += size == 2 ? 0 : 4;
    // Codes of short groups are padded further than the weights.
    const int64_t stride = align_up(group_len, kDataBlock / size);
    if (align_up(group_len, kDataBlock) != stride) costs.code_rest += 2;
  }
  // Six 32-bit vectors and five of words, the sums of data blocks, four broadcast blocks, and the
  // scales that leave.
  costs.per_group = 6 * 4 + 5 * size + 5 * kDataBlock + (outputs.scales ? 2 * 4 : 0);
  costs.fixed = 1024;
  costs.keeps_group_whole = true;
  *tiling = FakeQuantizeTiling{};
  tiling->one_over_n = invert_length(group_len);
  tiling->eps = eps;
  return cut_groups(num_groups, group_len, costs, device, &tiling->groups);
}

}  // namespace bitcpm::ascend
