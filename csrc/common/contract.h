// The constants every kernel of the quantiser shares; docs/quantizer.md says what they mean.
#pragma once

#include <cstdint>

namespace bitcpm {

// Float32 accumulators of one group sum; lane j adds elements j, j + kLanes, j + 2 * kLanes, ...
constexpr int kLanes = 64;

// Element types, as megatron_bitcpm/ops/_cpu.py passes them.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
constexpr int kNumDTypes = 3;

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Grids, as megatron_bitcpm/ops/_cpu.py passes them; levels and midpoints are in cpu/grids.h.
enum class Grid : int { kTernary = 0, kAsym4 = 1, kHalfSym4 = 2, kIntSym4 = 3, kFive = 4 };
constexpr int kNumGrids = 5;

// Two-bit rows: a block of inputs becomes a quarter as many bytes. Byte j of a block holds inputs
// j, j + 32, j + 64 and j + 96 in bits 0-1, 2-3, 4-5 and 6-7; a field is code + 1.
constexpr int64_t kPackInputs = 128;
constexpr int64_t kPackBytes = 32;

constexpr int64_t count_pack_blocks(int64_t inputs) {
  return (inputs + kPackInputs - 1) / kPackInputs;
}

}  // namespace bitcpm
