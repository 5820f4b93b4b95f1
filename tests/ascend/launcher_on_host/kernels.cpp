// Stands in for what bisheng makes of the kernels' files: the launch_ functions, on the host check.
// The tilings are those of the launchers; buffers are exactly as large as the tiling says.
#include "../host_check/runner_kernels.h"

namespace bitcpm::ascend {
namespace {

using host_check::Access;
using host_check::Machine;

uint8_t* add(Machine& machine, const void* address, int64_t bytes, Access access,
             const char* name) {
  if (address == nullptr) return nullptr;
  auto* start = static_cast<uint8_t*>(const_cast<void*>(address));
  machine.add_buffer(start, static_cast<size_t>(bytes), access, name);
  return start;
}

int64_t elements(const GroupTiling& groups) { return groups.num_groups * groups.group_len; }

}  // namespace

void launch_fake_quantize(DType dtype, void*, const void* w, void* wq, void* codes, void* scales,
                          const FakeQuantizeTiling& tiling) {
  Machine machine;
  const int64_t count = elements(tiling.groups), bytes = count * size_of(dtype);
  uint8_t* w_ = add(machine, w, bytes, wq == w ? Access::kInOut : Access::kIn, "w");
  uint8_t* wq_ = wq == w ? w_ : add(machine, wq, bytes, Access::kOut, "wq");
  uint8_t* codes_ = add(machine, codes, count, Access::kOut, "codes");
  uint8_t* scales_ = add(machine, scales, tiling.groups.num_groups * 4, Access::kOut, "scales");
  launch(machine, Run{}, tiling.groups.blocks, [&] {
    switch (dtype) {
      case DType::kFloat32: return bitcpm_fake_quantize_f32(w_, wq_, codes_, scales_, tiling);
      case DType::kBFloat16: return bitcpm_fake_quantize_bf16(w_, wq_, codes_, scales_, tiling);
      case DType::kFloat16: return bitcpm_fake_quantize_f16(w_, wq_, codes_, scales_, tiling);
    }
  });
}

void launch_abs_sums(DType dtype, void*, const void* w, void* sums, const GroupTiling& tiling) {
  Machine machine;
  uint8_t* w_ = add(machine, w, elements(tiling) * size_of(dtype), Access::kIn, "w");
  uint8_t* sums_ = add(machine, sums, tiling.num_groups * 4, Access::kOut, "sums");
  launch(machine, Run{}, tiling.blocks, [&] {
    switch (dtype) {
      case DType::kFloat32: return bitcpm_abs_sums_f32(w_, sums_, tiling);
      case DType::kBFloat16: return bitcpm_abs_sums_bf16(w_, sums_, tiling);
      case DType::kFloat16: return bitcpm_abs_sums_f16(w_, sums_, tiling);
    }
  });
}

void launch_fake_quantize_with_scales(DType dtype, void*, const void* w, const void* scales,
                                      void* wq, const GroupTiling& tiling) {
  Machine machine;
  const int64_t bytes = elements(tiling) * size_of(dtype);
  uint8_t* w_ = add(machine, w, bytes, wq == w ? Access::kInOut : Access::kIn, "w");
  uint8_t* wq_ = wq == w ? w_ : add(machine, wq, bytes, Access::kOut, "wq");
  uint8_t* scales_ = add(machine, scales, tiling.num_groups * 4, Access::kIn, "scales");
  launch(machine, Run{}, tiling.blocks, [&] {
    switch (dtype) {
      case DType::kFloat32: return bitcpm_fake_quantize_with_scales_f32(w_, scales_, wq_, tiling);
      case DType::kBFloat16: return bitcpm_fake_quantize_with_scales_bf16(w_, scales_, wq_, tiling);
      case DType::kFloat16: return bitcpm_fake_quantize_with_scales_f16(w_, scales_, wq_, tiling);
    }
  });
}

void launch_pack2(void*, const void* codes, void* packed, const Pack2Tiling& tiling) {
  Machine machine;
  uint8_t* codes_ = add(machine, codes, tiling.rows * tiling.cols, Access::kIn, "codes");
  const int64_t bytes = tiling.rows * count_pack_blocks(tiling.cols) * kPackBytes;
  uint8_t* packed_ = add(machine, packed, bytes, Access::kOut, "packed");
  launch(machine, Run{}, tiling.blocks, [&] { bitcpm_pack2(codes_, packed_, tiling); });
}

}  // namespace bitcpm::ascend
