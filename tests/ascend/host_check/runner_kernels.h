// The kernels, compiled for the host check, each behind a function that makes its tiling and runs
// it on every core.
#pragma once

#include <stdexcept>
#include <string>

#include "host_check.h"
// The device code itself, unchanged.
#include "../../../csrc/ascend/abs_sums/op_kernel/abs_sums.cpp"
#include "../../../csrc/ascend/fake_quantize/op_kernel/fake_quantize.cpp"
#include "../../../csrc/ascend/fake_quantize_with_scales/op_kernel/fake_quantize_with_scales.cpp"
#include "../../../csrc/ascend/pack2/op_kernel/pack2.cpp"

namespace bitcpm::ascend {

// On what machine.
struct Run {
  Device device{48, static_cast<uint32_t>(kMaxUbBytes)};
  uint32_t seed = 0;
  host_check::NanMax nan_max = host_check::NanMax::kPropagate;
  bool saturate = true;  // casts to 16 bits: infinity becomes the largest number
};

struct Result {
  host_check::Meter meter;
  uint32_t blocks = 0;
};

inline void check_status(TilingStatus status) {
  if (status != TilingStatus::kOk) throw std::runtime_error(describe(status));
}

// Nothing to do is no launch: the launchers return at once.
inline Result launch(host_check::Machine& machine, const Run& run, uint32_t blocks,
                     const std::function<void()>& kernel) {
  if (blocks == 0) return {};
  host_check::Config config;
  config.block_dim = blocks;
  config.seed = run.seed;
  // No more than the tiling was told of, so that a kernel cannot take what it did not ask for.
  config.ub_bytes = static_cast<uint32_t>(usable_ub(run.device));
  config.nan_max = run.nan_max;
  config.saturate = run.saturate;
  return {machine.run(config, kernel), blocks};
}

inline Result run_fake_quantize_kernel(host_check::Machine& machine, const Run& run, DType dtype,
                                       int64_t rows, int64_t cols, int64_t group_len, float eps,
                                       uint8_t* w, uint8_t* wq, uint8_t* codes, uint8_t* scales) {
  FakeQuantizeTiling tiling;
  const FakeQuantizeOutputs outputs{wq != nullptr, codes != nullptr, scales != nullptr};
  check_status(make_fake_quantize_tiling(dtype, rows, cols, group_len, eps, outputs, run.device,
                                         &tiling));
  return launch(machine, run, tiling.groups.blocks, [&] {
    switch (dtype) {
      case DType::kFloat32: return bitcpm_fake_quantize_f32(w, wq, codes, scales, tiling);
      case DType::kBFloat16: return bitcpm_fake_quantize_bf16(w, wq, codes, scales, tiling);
      case DType::kFloat16: return bitcpm_fake_quantize_f16(w, wq, codes, scales, tiling);
    }
  });
}

inline Result run_abs_sums_kernel(host_check::Machine& machine, const Run& run, DType dtype,
                                  int64_t rows, int64_t cols, int64_t group_len, uint8_t* w,
                                  uint8_t* sums) {
  GroupTiling tiling;
  check_status(make_abs_sums_tiling(dtype, rows, cols, group_len, run.device, &tiling));
  return launch(machine, run, tiling.blocks, [&] {
    switch (dtype) {
      case DType::kFloat32: return bitcpm_abs_sums_f32(w, sums, tiling);
      case DType::kBFloat16: return bitcpm_abs_sums_bf16(w, sums, tiling);
      case DType::kFloat16: return bitcpm_abs_sums_f16(w, sums, tiling);
    }
  });
}

inline Result run_with_scales_kernel(host_check::Machine& machine, const Run& run, DType dtype,
                                     int64_t rows, int64_t cols, int64_t group_len, uint8_t* w,
                                     uint8_t* scales, uint8_t* wq) {
  GroupTiling tiling;
  check_status(
      make_fake_quantize_with_scales_tiling(dtype, rows, cols, group_len, run.device, &tiling));
  return launch(machine, run, tiling.blocks, [&] {
    switch (dtype) {
      case DType::kFloat32: return bitcpm_fake_quantize_with_scales_f32(w, scales, wq, tiling);
      case DType::kBFloat16: return bitcpm_fake_quantize_with_scales_bf16(w, scales, wq, tiling);
      case DType::kFloat16: return bitcpm_fake_quantize_with_scales_f16(w, scales, wq, tiling);
    }
  });
}

inline Result run_pack2_kernel(host_check::Machine& machine, const Run& run, int64_t rows,
                               int64_t cols, uint8_t* codes, uint8_t* packed) {
  Pack2Tiling tiling;
  check_status(make_pack2_tiling(rows, cols, run.device, &tiling));
  return launch(machine, run, tiling.blocks, [&] { bitcpm_pack2(codes, packed, tiling); });
}

}  // namespace bitcpm::ascend
