// Tiling of abs_sums: pure C++, no CANN.
#pragma once

#include "../../common/group_tiling.h"

namespace bitcpm::ascend {

constexpr TilingStatus make_abs_sums_tiling(DType dtype, int64_t rows, int64_t cols,
                                            int64_t group_len, const Device& device,
                                            GroupTiling* tiling) {
  int64_t num_groups = 0;
  if (!count_matrix_groups(rows, cols, group_len, &num_groups)) return TilingStatus::kBadShape;
  const int64_t size = size_of(dtype);
  GroupCosts costs = {};
  costs.element_size = size;
  costs.whole_in = 2 * size;
  costs.rest = size == 2 ? 6 : 4;
  costs.per_group = 2 * 4 + 3 * 4 + kDataBlock;
  costs.fixed = 1024;
  costs.keeps_group_whole = false;
  return cut_groups(num_groups, group_len, costs, device, tiling);
}

}  // namespace bitcpm::ascend
