// Starts the kernel; defined beside it and compiled by bisheng.
#pragma once

#include "fake_quantize_tiling.h"

namespace bitcpm::ascend {

// Outputs may be null: wq in the type of w, codes int8, scales float32. `stream` is an aclrtStream.
// wq may be w. The outputs must be those that the tiling was made for.
void launch_fake_quantize(DType dtype, void* stream, const void* w, void* wq, void* codes,
                          void* scales, const FakeQuantizeTiling& tiling);

}  // namespace bitcpm::ascend
