// The element types as the kernels see them: bit patterns in words of the same width.
#pragma once

#include "kernel_operator.h"

namespace bitcpm::ascend {

constexpr int32_t kInfBits = 0x7f800000;  // of float32

struct Float32 {
  using Word = int32_t;
  static constexpr bool kIs16Bit = false;
  static constexpr int32_t kMagnitude = 0x7fffffff;
  static constexpr int32_t kNaNBits = 0x7fc00000;
  static constexpr int32_t kLargest = 0x7f7fffff;
};

struct BFloat16 {
  using Word = int16_t;
  using Native = bfloat16_t;
  static constexpr bool kIs16Bit = true;
  static constexpr int16_t kMagnitude = 0x7fff;
  static constexpr int16_t kNaNBits = 0x7fc0;
  static constexpr int16_t kLargest = 0x7f7f;
  // Shifts that turn a word of ones into kNaNBits, and into infinity: first right, then left.
  static constexpr uint16_t kNaNRight = 7, kNaNLeft = 6, kInfRight = 8, kInfLeft = 7;
  // Bits of the least float32 that is rounded to infinity.
  static constexpr int32_t kOverflow = 0x7f7f8000;
};

struct Float16 {
  using Word = int16_t;
  using Native = half;
  static constexpr bool kIs16Bit = true;
  static constexpr int16_t kMagnitude = 0x7fff;
  static constexpr int16_t kNaNBits = 0x7e00;
  static constexpr int16_t kLargest = 0x7bff;
  static constexpr uint16_t kNaNRight = 10, kNaNLeft = 9, kInfRight = 11, kInfLeft = 10;
  static constexpr int32_t kOverflow = 0x477ff000;  // 65520
};

}  // namespace bitcpm::ascend
