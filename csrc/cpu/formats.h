// The element formats: bit patterns, exact conversions from and to float32, and the 64 lanes of the
// canonical sum. A format reads its elements from 32-bit words; the 16-bit ones hold two in each.
#pragma once

#include "../common/contract.h"
#include "vectors.h"

namespace bitcpm {
namespace {

struct Float32 {
  using Bits = uint32_t;
  using Vec = VecS32;
  static constexpr Bits kSign = 0x80000000u, kInf = kFloat32Inf, kNaN = kFloat32NaN;
  static constexpr int kPerWord = 1;

  // Conversions of magnitudes, i.e. without a sign: nearest, largest not above, exact.
  static Bits round(float magnitude) { return float_to_bits(magnitude); }
  static Bits truncate(float magnitude) { return float_to_bits(magnitude); }
  static float widen(Bits magnitude) { return bits_to_float(magnitude); }

  // Conversions of signed numbers, word by word.
  static void decode(VecU32 words, VecF* values) { values[0] = (VecF)words; }
  static VecU32 encode(const VecF* values) { return (VecU32)values[0]; }

  // Accumulators of the 64 lanes, in order.
  struct Sum {
    static constexpr int kVectors = kLanes / kFloats;
    VecF lanes[kVectors] = {};
    void add_block(const Bits* block) {
      for (int k = 0; k < kVectors; ++k)
        lanes[k] += (VecF)(load<VecU32>(block + k * kFloats) & 0x7fffffffu);
    }
    float reduce() { return reduce_pairs<kVectors>(lanes); }
  };
};

// The 16-bit types take even lanes from the low halves of words, odd lanes from the high ones.
// Adding the two halves then is the first level of the tree, without shuffles.
template <class Format>
struct Sum16 {
  static constexpr int kVectors = kLanes / 2 / kFloats;
  VecF even[kVectors] = {}, odd[kVectors] = {};
  void add_block(const uint16_t* block) {
    for (int k = 0; k < kVectors; ++k) {
      const VecU32 words = load<VecU32>(block + 2 * k * kFloats);
      even[k] += Format::decode_low_abs(words);
      odd[k] += Format::decode_high_abs(words);
    }
  }
  float reduce() {
    VecF pairs[kVectors];
    for (int k = 0; k < kVectors; ++k) pairs[k] = even[k] + odd[k];
    return reduce_pairs<kVectors>(pairs);
  }
};

struct BFloat16 {
  using Bits = uint16_t;
  using Vec = VecS16;
  using Sum = Sum16<BFloat16>;
  static constexpr Bits kSign = 0x8000u, kInf = 0x7f80u, kNaN = 0x7fc0u;
  static constexpr int kPerWord = 2;

  static Bits round(float magnitude) { return round_to_bfloat16(magnitude); }
  static Bits truncate(float magnitude) {
    return static_cast<Bits>(float_to_bits(magnitude) >> 16);
  }
  static float widen(Bits magnitude) {
    return bits_to_float(static_cast<uint32_t>(magnitude) << 16);
  }

  static VecF decode_low_abs(VecU32 words) { return (VecF)((words << 16) & 0x7fffffffu); }
  static VecF decode_high_abs(VecU32 words) { return (VecF)(words & 0x7fff0000u); }
  static void decode(VecU32 words, VecF* values) {
    values[0] = (VecF)(words << 16);
    values[1] = (VecF)(words & 0xffff0000u);
  }
  static VecU32 encode(const VecF* values) {
    return (round_to_high(values[0]) >> 16) | (round_to_high(values[1]) & 0xffff0000u);
  }

 private:
  // Nearest even, in the high half of each word; for finite values.
  static VecU32 round_to_high(VecF value) {
    const VecU32 bits = (VecU32)value;
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }
};

struct Float16 {
  using Bits = uint16_t;
  using Vec = VecS16;
  using Sum = Sum16<Float16>;
  static constexpr Bits kSign = 0x8000u, kInf = 0x7c00u, kNaN = 0x7e00u;
  static constexpr int kPerWord = 2;

  static Bits round(float magnitude) { return round_to_float16(magnitude); }
  static Bits truncate(float magnitude) { return truncate_to_float16(magnitude); }
  static float widen(Bits magnitude) { return widen_float16(magnitude); }

  static VecF decode_low_abs(VecU32 words) { return decode_magnitude(words & 0x7fffu); }
  static VecF decode_high_abs(VecU32 words) { return decode_magnitude((words >> 16) & 0x7fffu); }
  static void decode(VecU32 words, VecF* values) {
    values[0] = (VecF)((VecU32)decode_low_abs(words) | ((words & 0x8000u) << 16));
    values[1] = (VecF)((VecU32)decode_high_abs(words) | (words & 0x80000000u));
  }
  static VecU32 encode(const VecF* values) {
    return round_value(values[0]) | (round_value(values[1]) << 16);
  }

 private:
  // Exact also when the caller flushes subnormals: those are converted as integers.
  static VecF decode_magnitude(VecU32 half) {
    const VecS32 bits = (VecS32)half;
    VecS32 normal = (bits << 13) + (112 << 23);
    normal |= (bits >= 0x7c00) & static_cast<int32_t>(kFloat32Inf);
    const VecF subnormal = __builtin_convertvector(bits, VecF) * 0x1p-24f;
    return (VecF)select<VecS32>(bits < 0x400, (VecS32)subnormal, normal);
  }
  // Nearest even, in the low half of each word; for finite values.
  static VecU32 round_value(VecF value) {
    const VecS32 bits = (VecS32)value & 0x7fffffff;
    const VecS32 rebased = bits - (112 << 23);
    const VecS32 normal = (rebased + 0xfff + ((rebased >> 13) & 1)) >> 13;
    // Below 2^-14 the result counts steps of 2^-24, and those are the spacing of floats at 0.5.
    const VecS32 subnormal = (VecS32)((VecF)bits + 0.5f) - (126 << 23);
    VecS32 half = select<VecS32>(bits < (113 << 23), subnormal, normal);
    half = select<VecS32>(bits >= (143 << 23), broadcast<VecS32>(0x7c00), half);
    return (VecU32)half | (((VecU32)value >> 16) & 0x8000u);
  }
};

}  // namespace
}  // namespace bitcpm
