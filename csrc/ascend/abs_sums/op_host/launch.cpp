#include <ATen/ops/empty.h>

#include "abs_sums/op_host/abs_sums_launch.h"
#include "abs_sums/op_host/abs_sums_tiling.h"
#include "checks.h"
#include "launchers.h"
#include "platform.h"
#include "queue.h"

namespace bitcpm::ascend {

at::Tensor abs_sums(const at::Tensor& w, int64_t group_len) {
  check_matrix(w, "w");
  check_group_len(w, group_len);
  const at::Tensor sums =
      at::empty({w.size(0), w.size(1) / group_len}, w.options().dtype(at::kFloat));
  if (w.numel() == 0) return sums;
  const DType dtype = dtype_of(w);
  GroupTiling tiling;
  check_tiling(
      make_abs_sums_tiling(dtype, w.size(0), w.size(1), group_len, get_device(), &tiling));
  enqueue("bitcpm_abs_sums", w, [w, sums, dtype, tiling](void* stream) {
    launch_abs_sums(dtype, stream, w.data_ptr(), sums.data_ptr(), tiling);
  });
  return sums;
}

}  // namespace bitcpm::ascend
