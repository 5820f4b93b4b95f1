// Starts the kernel; defined beside it and compiled by bisheng.
#pragma once

#include "pack2_tiling.h"

namespace bitcpm::ascend {

// int8 codes to two bits each, as docs/quantizer.md lays them out; `stream` is an aclrtStream.
// A device cannot raise: a code outside {-1, 0, 1} becomes the field (code + 1) mod 4.
void launch_pack2(void* stream, const void* codes, void* packed, const Pack2Tiling& tiling);

}  // namespace bitcpm::ascend
