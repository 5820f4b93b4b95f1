// Exact conversions between float32 and the 16-bit formats, in integer arithmetic only, so that no
// rounding mode and no flush-to-zero flag of the caller can change a result.
#pragma once

#include <cstdint>
#include <cstring>

namespace bitcpm {

constexpr uint32_t kFloat32Inf = 0x7f800000u;
constexpr uint32_t kFloat32NaN = 0x7fc00000u;

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// False for NaN and the infinities.
static inline bool is_finite(float value) {
  return (float_to_bits(value) & kFloat32Inf) != kFloat32Inf;
}

// True for positive finite values, subnormals included.
static inline bool is_positive_finite(float value) {
  return float_to_bits(value) - 1u < kFloat32Inf - 1u;
}

// Non-negative float32 -> bfloat16, nearest even; may round to infinity. No NaN.
static inline uint16_t round_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Non-negative float32 -> float16, nearest even, with subnormals; may round to infinity. No NaN.
static inline uint16_t round_to_float16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t exponent = bits >> 23;
  if (exponent >= 143) return 0x7c00u;  // 2^16 and above
  if (exponent >= 113) {                // normal in float16; a carry may reach infinity, rightly
    const uint32_t rebased = bits - (112u << 23);
    return static_cast<uint16_t>((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13);
  }
  if (exponent < 102) return 0;  // below half of the smallest subnormal, 2^-25
  // Subnormal: the mantissa with its hidden bit, in units of 2^-24.
  const uint32_t mantissa = (bits & 0x7fffffu) | 0x800000u;
  const uint32_t shift = 126 - exponent;
  const uint32_t half = 1u << (shift - 1);
  const uint32_t floor = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1);
  return static_cast<uint16_t>(floor + (rest > half || (rest == half && (floor & 1u))));
}

// Non-negative float32 -> the largest finite float16 that does not exceed it. No NaN.
static inline uint16_t truncate_to_float16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t exponent = bits >> 23;
  if (exponent >= 143) return 0x7bffu;
  if (exponent >= 113) return static_cast<uint16_t>((bits - (112u << 23)) >> 13);
  if (exponent < 103) return 0;
  return static_cast<uint16_t>(((bits & 0x7fffffu) | 0x800000u) >> (126 - exponent));
}

// Finite non-negative float16 -> float32, exact.
static inline float widen_float16(uint16_t half) {
  const uint32_t bits = half;
  if (bits < 0x400u) return static_cast<float>(bits) * 0x1p-24f;
  return bits_to_float((bits << 13) + (112u << 23));
}

// Bits of the largest float32 h with 2 * h <= scale, for a positive finite scale: for every w,
// 2 * |w| > scale  is the same as  bits(|w|) > bits(h), a comparison of integers.
static inline uint32_t halve_to_threshold(float scale) {
  const uint32_t bits = float_to_bits(scale);
  return bits >= (2u << 23) ? bits - (1u << 23) : bits >> 1;
}

}  // namespace bitcpm
