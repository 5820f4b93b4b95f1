// Starts the kernel; defined beside it and compiled by bisheng.
#pragma once

#include "abs_sums_tiling.h"

namespace bitcpm::ascend {

// `sums` is float32, one per group; `stream` is an aclrtStream.
void launch_abs_sums(DType dtype, void* stream, const void* w, void* sums,
                     const GroupTiling& tiling);

}  // namespace bitcpm::ascend
