#pragma once

#include "common/device.h"

namespace bitcpm::ascend {

// The device kind of this process, as its platform reports it. Throws std::runtime_error where CANN
// does not know the device, or the kernels are not built for it.
const Device& get_device();

}  // namespace bitcpm::ascend
