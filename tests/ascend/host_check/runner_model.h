// A model, not a measurement: what the counted bytes and vector passes would take on a 910B2.
//
// The kernel runs on one core's share of the rows; bytes, passes and instructions per element come
// from the host check's meter, the rest is arithmetic with the constants below.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "runner_kernels.h"

namespace bitcpm::ascend {

constexpr uint32_t kModelCores = 48;           // vector cores of a 910B2
constexpr double kClockHz = 1.8e9;             // of a vector core
constexpr double kLanes32 = 64;                // float32 lanes of a full-rate pass
constexpr double kMemoryBytesPerSecond = 1.6e12;  // published peak
constexpr double kReachedShare = 0.81;         // of that peak, by the vendor's tuned Add
// Assumed, not documented: start-up and drain of one vector instruction behind a barrier.
constexpr double kInstructionCycles = 20;
constexpr int64_t kMaxModelRows = 24;          // simulated of one core's share

struct ModelCase {
  const char* name;
  const char* type;
  DType dtype;
  int64_t rows, cols, group_len;  // group_len 0: no groups
};

struct Counted {
  double bytes, passes, instructions;  // per element
  int64_t share_rows;
};

inline Counted count_work(const ModelCase& model_case) {
  const int64_t share = divide_up(model_case.rows, kModelCores);
  const int64_t rows = lesser(share, kMaxModelRows), cols = model_case.cols;
  const int64_t groups = model_case.group_len ? rows * (cols / model_case.group_len) : 0;
  const auto make = [](int64_t bytes, uint8_t fill) {
    return std::vector<uint8_t>(static_cast<size_t>(bytes), fill);
  };
  // 0x3c3c... is an ordinary positive number in every type.
  std::vector<uint8_t> w = make(rows * cols * size_of(model_case.dtype), 0x3c), wq = w;
  std::vector<uint8_t> codes = make(rows * cols, 1), scales = make(groups * 4, 0x3c);
  std::vector<uint8_t> packed = make(rows * count_pack_blocks(cols) * kPackBytes, 0);
  host_check::Machine machine;
  const auto know = [&](std::vector<uint8_t>& array, host_check::Access access, const char* what) {
    machine.add_buffer(array.data(), array.size(), access, what);
  };
  using host_check::Access;
  Run run;
  run.device.vector_cores = 1;
  Result result;
  const std::string name = model_case.name;
  if (name == "pack2") {
    know(codes, Access::kIn, "codes");
    know(packed, Access::kOut, "packed");
    result = run_pack2_kernel(machine, run, rows, cols, codes.data(), packed.data());
  } else {
    know(w, Access::kIn, "w");
    const bool to_levels = name.rfind("fake_quantize", 0) == 0;
    if (to_levels) know(wq, Access::kOut, "wq");
    if (name == "quantize") know(codes, Access::kOut, "codes");
    if (name != "fake_quantize")
      know(scales, to_levels ? Access::kIn : Access::kOut, "scales");
    const auto fake_quantize = [&](uint8_t* to_wq, uint8_t* to_codes, uint8_t* to_scales) {
      return run_fake_quantize_kernel(machine, run, model_case.dtype, rows, cols,
                                      model_case.group_len, 1e-5f, w.data(), to_wq, to_codes,
                                      to_scales);
    };
    if (name == "abs_sums")
      result = run_abs_sums_kernel(machine, run, model_case.dtype, rows, cols,
                                   model_case.group_len, w.data(), scales.data());
    else if (name == "fake_quantize_with_scales")
      result = run_with_scales_kernel(machine, run, model_case.dtype, rows, cols,
                                      model_case.group_len, w.data(), scales.data(), wq.data());
    else if (name == "quantize")
      result = fake_quantize(nullptr, codes.data(), scales.data());
    else
      result = fake_quantize(wq.data(), nullptr, nullptr);
  }
  const double elements = static_cast<double>(rows * cols);
  const host_check::Meter& meter = result.meter;
  return {static_cast<double>(meter.bytes_read + meter.bytes_written) / elements,
          meter.passes(static_cast<uint64_t>(elements)),
          static_cast<double>(meter.vector_instructions) / elements, share};
}

inline void print_case(const ModelCase& model_case) {
  const Counted counted = count_work(model_case);
  const double elements = static_cast<double>(model_case.rows * model_case.cols);
  const double share = static_cast<double>(counted.share_rows * model_case.cols);
  const double memory =
      elements * counted.bytes / (kMemoryBytesPerSecond * kReachedShare) * 1e6;
  const double vector = share * counted.passes / (kLanes32 * kClockHz) * 1e6;
  const double overhead = share * counted.instructions * kInstructionCycles / kClockHz * 1e6;
  const double compute = vector + overhead;
  std::string group = std::to_string(model_case.group_len);
  if (model_case.group_len == 0) group = "-";
  if (model_case.group_len == model_case.cols) group = "row";
  std::printf("| %s | %s | %s | %lld x %lld | %.2f | %.2f | %.1f | %.1f | %.1f | %.1f | %s |\n",
              model_case.name, model_case.type, group.c_str(),
              static_cast<long long>(model_case.rows), static_cast<long long>(model_case.cols),
              counted.bytes, counted.passes, memory, vector, overhead,
              memory > compute ? memory : compute, memory > compute ? "memory" : "vector");
}

// Prints the table; returns the exit status.
inline int print_model() {
  std::printf(
      "A model, not a measurement: 910B2, %u vector cores x %.0f lanes x %.1f GHz, memory at "
      "%.0f %% of %.1f TB/s,\n%.0f cycles assumed per vector instruction. Times in microseconds; "
      "the modelled one is the larger of memory\nand vector + instructions, for data that is not "
      "in L2.\n\n",
      kModelCores, kLanes32, kClockHz / 1e9, kReachedShare * 100, kMemoryBytesPerSecond / 1e12,
      kInstructionCycles);
  std::printf("| operator | type | g | shape | bytes/element | passes/element | memory | vector | "
              "instructions | modelled | bound by |\n"
              "|---|---|---|---|---|---|---|---|---|---|---|\n");
  const int64_t sizes[][2] = {{1024, 4096}, {2048, 6144}, {2560, 10240}, {4096, 16384}};
  try {
    for (const auto& [hidden, ffn] : sizes) {
      const int64_t shapes[][2] = {{hidden, hidden}, {ffn, hidden}, {hidden, ffn}};
      for (const auto& [rows, cols] : shapes)
        for (const int64_t group : {int64_t{64}, cols})
          print_case({"fake_quantize", "bf16", DType::kBFloat16, rows, cols, group});
    }
    for (const int64_t group : {32, 128, 256})
      print_case({"fake_quantize", "bf16", DType::kBFloat16, 4096, 16384, group});
    for (const int64_t group : {64, 16384}) {
      print_case({"fake_quantize", "f16", DType::kFloat16, 4096, 16384, group});
      print_case({"fake_quantize", "f32", DType::kFloat32, 4096, 16384, group});
      print_case({"quantize", "bf16", DType::kBFloat16, 4096, 16384, group});
      print_case({"abs_sums", "bf16", DType::kBFloat16, 4096, 16384, group});
      print_case({"fake_quantize_with_scales", "bf16", DType::kBFloat16, 4096, 16384, group});
    }
    print_case({"pack2", "int8", DType::kFloat32, 4096, 16384, 0});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace bitcpm::ascend
