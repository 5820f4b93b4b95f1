// Starts the kernel; defined beside it and compiled by bisheng.
#pragma once

#include "fake_quantize_with_scales_tiling.h"

namespace bitcpm::ascend {

// `scales` is float32, one per group; wq may be w; `stream` is an aclrtStream.
void launch_fake_quantize_with_scales(DType dtype, void* stream, const void* w, const void* scales,
                                      void* wq, const GroupTiling& tiling);

}  // namespace bitcpm::ascend
