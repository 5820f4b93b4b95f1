// Where torch_npu is met: its task queue, and what it alone knows of a tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

namespace bitcpm::ascend {

bool is_on_device(const at::Tensor& tensor);

// False in torch_npu's private formats (FRACTAL_NZ and others), whose memory is not row by row, and
// off the device.
bool has_plain_format(const at::Tensor& tensor);

// Queue one task on the current stream of the tensor's device; `launch` gets that stream. It runs
// later, on torch_npu's own thread, so everything it uses must be captured by value.
void enqueue(const char* name, const at::Tensor& tensor, std::function<void(void*)> launch);

}  // namespace bitcpm::ascend
