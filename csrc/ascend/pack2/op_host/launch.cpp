#include <ATen/ops/empty.h>

#include "checks.h"
#include "launchers.h"
#include "pack2/op_host/pack2_launch.h"
#include "pack2/op_host/pack2_tiling.h"
#include "platform.h"
#include "queue.h"

namespace bitcpm::ascend {

at::Tensor pack2(const at::Tensor& codes) {
  check_matrix(codes, "codes");
  TORCH_CHECK(codes.scalar_type() == at::kChar, "codes.dtype must be int8");
  const int64_t rows = codes.size(0), cols = codes.size(1);
  const int64_t row_bytes = count_pack_blocks(cols) * kPackBytes;
  const at::Tensor packed = at::empty({rows, row_bytes}, codes.options().dtype(at::kByte));
  if (codes.numel() == 0) return packed;
  Pack2Tiling tiling;
  check_tiling(make_pack2_tiling(rows, cols, get_device(), &tiling));
  enqueue("bitcpm_pack2", codes, [codes, packed, tiling](void* stream) {
    launch_pack2(stream, codes.data_ptr(), packed.data_ptr(), tiling);
  });
  return packed;
}

}  // namespace bitcpm::ascend
