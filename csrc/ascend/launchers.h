// The operators on NPU tensors, one folder each: <op>/op_host/launch.cpp. They return as soon as the
// work is queued; nothing here waits for the device.
//
// Callers pass what supports() accepts: two-dimensional, contiguous tensors in a plain format on one
// device, whole groups. A violation raises c10::Error.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace bitcpm::ascend {

using Tensors = std::vector<at::Tensor>;

// group_len: inputs per scale, at least 1 (never -1); eps: smallest scale.
at::Tensor fake_quantize(const at::Tensor& w, int64_t group_len, double eps);
std::tuple<at::Tensor, at::Tensor> quantize(const at::Tensor& w, int64_t group_len, double eps);
at::Tensor abs_sums(const at::Tensor& w, int64_t group_len);
at::Tensor fake_quantize_with_scales(const at::Tensor& w, const at::Tensor& scales);
at::Tensor pack2(const at::Tensor& codes);

// In place over a list: one task in the queue, however many tensors; group_lens: one per tensor.
void fake_quantize_list(const Tensors& ws, const std::vector<int64_t>& group_lens, double eps);
void fake_quantize_with_scales_list(const Tensors& ws, const Tensors& scales);

}  // namespace bitcpm::ascend
