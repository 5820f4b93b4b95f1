// Host implementation of the Ascend C API subset that the kernels of this project use (NPU_ARCH
// 2201). Stands in for the device's header of the same name; see ../README.md.
#pragma once

#include <cstdint>

#define BITCPM_HOST_CHECK 1

#define __aicore__
#define __global__
#define __gm__
#define __ubuf__
#define __vector__

using GM_ADDR = uint8_t*;

#define KERNEL_TASK_TYPE_DEFAULT(TYPE) static_assert((TYPE) == KERNEL_TYPE_AIV_ONLY, "vector only")
enum KernelMetaType { KERNEL_TYPE_AIV_ONLY = 0 };

#include "hc_cast.h"
#include "hc_compare.h"
#include "hc_core.h"
#include "hc_dma.h"
#include "hc_fill.h"
#include "hc_reduce.h"
#include "hc_tensor.h"
#include "hc_types.h"
#include "hc_vector.h"
