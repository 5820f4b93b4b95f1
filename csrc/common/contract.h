// The constants every kernel of the ternary quantiser shares; docs/quantizer.md says what they mean.
#pragma once

#include <cstdint>

namespace bitcpm {

// Float32 accumulators of one group sum; lane j adds elements j, j + kLanes, j + 2 * kLanes, ...
constexpr int kLanes = 64;

// Element types, as megatron_bitcpm/ops/_cpu.py passes them.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace bitcpm
