// What a launcher relies on before it passes addresses on. Python has checked the user's input and
// names the argument there; these catch a caller that did not.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "../common/contract.h"
#include "common/device.h"
#include "queue.h"

namespace bitcpm::ascend {

inline void check_matrix(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(is_on_device(tensor), name, " must be on an NPU, not ", tensor.device());
  TORCH_CHECK(tensor.dim() == 2, name, " must have two dimensions, not ", tensor.dim());
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  TORCH_CHECK(has_plain_format(tensor), name, " must be in a plain (ND) format");
  // To a kernel no address means that an output is not wanted. The storage is asked, because a view
  // into one without memory has an address all the same: its offset.
  TORCH_CHECK(tensor.numel() == 0 || tensor.storage().data() != nullptr, name, " has no memory");
}

inline void check_same_device(const at::Tensor& tensor, const at::Tensor& other) {
  TORCH_CHECK(tensor.device() == other.device(), "one call works on one device, not on ",
              tensor.device(), " and ", other.device());
}

inline void check_group_len(const at::Tensor& w, int64_t group_len) {
  TORCH_CHECK(group_len >= 1 && w.size(1) % group_len == 0, "groups of ", group_len,
              " do not divide rows of ", w.size(1));
}

inline void check_tiling(TilingStatus status) {
  TORCH_CHECK(status == TilingStatus::kOk, "no tiling: ", describe(status));
}

inline DType dtype_of(const at::Tensor& w) {
  switch (w.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK(false, "w.dtype must be float32, bfloat16 or float16, not ", w.scalar_type());
  }
}

}  // namespace bitcpm::ascend
