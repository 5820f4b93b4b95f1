// Number types of the device (half, bfloat16_t), exact conversions, enums and range-checked
// parameter types. Facts: Cast.md, precision_conversion.md and the high-dimensional slicing page of
// asc-devkit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "hc_error.h"

namespace host_check {

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof to);
  return to;
}

enum class Rounding { kNone, kRint, kFloor, kCeil, kRound, kTrunc, kOdd };

// Rounds to an integral value. kNone means what the device calls "rint where inexact".
inline double round_to_integer(double x, Rounding mode) {
  switch (mode) {
    case Rounding::kFloor: return std::floor(x);
    case Rounding::kCeil: return std::ceil(x);
    case Rounding::kRound: return std::round(x);
    case Rounding::kTrunc: return std::trunc(x);
    case Rounding::kOdd: {
      const double down = std::trunc(x);
      if (down == x || std::fmod(down, 2.0) != 0.0) return down;
      return down + std::copysign(1.0, x);
    }
    default: return std::nearbyint(x);
  }
}

// Rounds a finite float to a binary format with `mantissa` fraction bits and smallest normal
// exponent `min_exponent`; the caller handles overflow. Exact: every step fits a double.
inline double round_to_format(float x, int mantissa, int min_exponent, Rounding mode) {
  if (x == 0.0f) return x;
  int exponent = std::ilogb(x);
  if (exponent < min_exponent) exponent = min_exponent;
  const double scaled = std::ldexp(static_cast<double>(x), mantissa - exponent);
  return std::ldexp(round_to_integer(scaled, mode), exponent - mantissa);
}

inline uint16_t bf16_bits_rint(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float half_bits_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 31u;
  const uint32_t fraction = bits & 0x3ffu;
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0) return bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
  return sign != 0 ? -magnitude : magnitude;
}

// Half-to-even; overflow gives infinity, NaN the canonical NaN.
inline uint16_t half_bits_rint(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7e00;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude >= 0x38800000u) {  // normal half
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
    return static_cast<uint16_t>(sign | (rounded >> 13));
  }
  // Adding 0.5 puts the units of a subnormal half (2^-24) at the last bit of a float.
  const float shifted = bit_cast<float>(magnitude) + 0.5f;
  return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
}

}  // namespace host_check

// Storage type of the device's half. Arithmetic on it is what vector instructions do.
class half {
 public:
  half() = default;
  half(float value) : bits_(host_check::half_bits_rint(value)) {}  // NOLINT: device type converts
  explicit operator float() const { return host_check::half_bits_to_float(bits_); }
  static half from_bits(uint16_t bits) {
    half h;
    h.bits_ = bits;
    return h;
  }
  uint16_t bits() const { return bits_; }

 private:
  uint16_t bits_;
};

// Storage type only: the vector unit of this generation has no bfloat16 arithmetic.
class bfloat16_t {
 public:
  bfloat16_t() = default;
  explicit bfloat16_t(float value) : bits_(host_check::bf16_bits_rint(value)) {}
  explicit operator float() const {
    return host_check::bit_cast<float>(static_cast<uint32_t>(bits_) << 16);
  }
  static bfloat16_t from_bits(uint16_t bits) {
    bfloat16_t b;
    b.bits_ = bits;
    return b;
  }
  uint16_t bits() const { return bits_; }

 private:
  uint16_t bits_;
};

namespace host_check {

template <typename T, typename... Allowed>
inline constexpr bool is_one_of = (std::is_same_v<T, Allowed> || ...);

// A parameter that the device declares uint8_t: a wider argument wraps there without a word.
// Here it keeps its value and is refused.
template <int64_t kMax>
class Ranged {
 public:
  template <typename T, typename = std::enable_if_t<std::is_integral_v<T>>>
  Ranged(T value) {  // NOLINT: stands for an integer parameter
    if constexpr (std::is_unsigned_v<T>) {
      if (value > static_cast<uint64_t>(kMax)) refuse(static_cast<long long>(value));
    } else {
      if (value < 0 || static_cast<int64_t>(value) > kMax) refuse(static_cast<long long>(value));
    }
    value_ = static_cast<uint32_t>(value);
  }
  operator uint32_t() const { return value_; }  // NOLINT

 private:
  [[noreturn]] static void refuse(long long value) {
    if (kMax == 255) fail("repeat-range", "repeat time %lld is outside 0..255", value);
    fail("count-range", "count %lld is outside 0..%lld", value, static_cast<long long>(kMax));
  }
  uint32_t value_;
};

using RepeatTime = Ranged<255>;
using Count = Ranged<std::numeric_limits<int32_t>::max()>;

// For kernels: a narrowing that the host check can see (on the device a plain cast).
template <typename To, typename From>
inline To checked_narrow(From value) {
  const To result = static_cast<To>(value);
  if (static_cast<From>(result) != value || ((result < To{}) != (value < From{}))) {
    fail("repeat-range", "value %lld does not fit a parameter of %d bits",
         static_cast<long long>(value), static_cast<int>(8 * sizeof(To)));
  }
  return result;
}

}  // namespace host_check

enum pipe_t { PIPE_S = 0, PIPE_V, PIPE_MTE2, PIPE_MTE3, PIPE_ALL };
enum event_t {
  EVENT_ID0 = 0, EVENT_ID1, EVENT_ID2, EVENT_ID3, EVENT_ID4, EVENT_ID5, EVENT_ID6, EVENT_ID7
};

namespace AscendC {

enum class RoundMode {
  CAST_NONE = 0, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC, CAST_ODD
};
enum class TPosition : uint8_t { GM = 0, VECIN = 9, VECOUT = 10, VECCALC = 11 };
using QuePosition = TPosition;
enum class CMPMODE : uint8_t { LT = 0, GT, EQ, LE, GE, NE };
enum class SELMODE : uint8_t {
  VSEL_CMPMASK_SPR = 0, VSEL_TENSOR_SCALAR_MODE, VSEL_TENSOR_TENSOR_MODE
};
enum class ReduceType { SUM, MAX, MIN };
enum class CacheMode {
  CACHE_MODE_DISABLE = 0, CACHE_MODE_NORMAL = 1, CACHE_MODE_LAST = 2, CACHE_MODE_PERSISTENT = 4
};
enum class CacheRwMode { READ = 1, WRITE = 2, RW = 3 };
enum class HardEvent : uint8_t {
  MTE2_V, V_MTE2, MTE3_V, V_MTE3, V_S, S_V, MTE2_S, S_MTE2, MTE3_S, S_MTE3, MTE2_MTE3, MTE3_MTE2
};

// Strides count 32-byte blocks. Field types are the device's: a brace list that narrows does not
// compile, an assignment that narrows is found by -Wconversion.
struct UnaryRepeatParams {
  UnaryRepeatParams() = default;
  UnaryRepeatParams(const uint16_t dst_block, const uint16_t src_block, const uint8_t dst_repeat,
                    const uint8_t src_repeat)
      : dstBlkStride(dst_block), srcBlkStride(src_block), dstRepStride(dst_repeat),
        srcRepStride(src_repeat) {}
  uint16_t dstBlkStride = 1;
  uint16_t srcBlkStride = 1;
  uint8_t dstRepStride = 8;
  uint8_t srcRepStride = 8;
};

struct BinaryRepeatParams {
  BinaryRepeatParams() = default;
  BinaryRepeatParams(const uint8_t dst_block, const uint8_t src0_block, const uint8_t src1_block,
                     const uint8_t dst_repeat, const uint8_t src0_repeat,
                     const uint8_t src1_repeat)
      : dstBlkStride(dst_block), src0BlkStride(src0_block), src1BlkStride(src1_block),
        dstRepStride(dst_repeat), src0RepStride(src0_repeat), src1RepStride(src1_repeat) {}
  uint8_t dstBlkStride = 1;
  uint8_t src0BlkStride = 1;
  uint8_t src1BlkStride = 1;
  uint8_t dstRepStride = 8;
  uint8_t src0RepStride = 8;
  uint8_t src1RepStride = 8;
};

struct BrcbRepeatParams {
  BrcbRepeatParams() = default;
  BrcbRepeatParams(const uint16_t dst_block, const uint16_t dst_repeat)
      : dstRepStride(dst_repeat), dstBlkStride(dst_block) {}
  uint16_t dstRepStride = 8;
  uint16_t dstBlkStride = 1;
};

struct CopyRepeatParams {
  CopyRepeatParams() = default;
  CopyRepeatParams(const uint16_t dst_stride, const uint16_t src_stride,
                   const uint16_t dst_repeat, const uint16_t src_repeat)
      : dstStride(dst_stride), srcStride(src_stride), dstRepeatSize(dst_repeat),
        srcRepeatSize(src_repeat) {}
  uint16_t dstStride = 0;
  uint16_t srcStride = 0;
  uint16_t dstRepeatSize = 8;
  uint16_t srcRepeatSize = 8;
};

struct DataCopyParams {
  DataCopyParams() = default;
  DataCopyParams(const uint16_t count, const uint16_t len, const uint16_t src_gap,
                 const uint16_t dst_gap)
      : blockCount(count), blockLen(len), srcGap(src_gap), dstGap(dst_gap) {}
  uint16_t blockCount = 1;
  uint16_t blockLen = 0;
  uint16_t srcGap = 0;
  uint16_t dstGap = 0;
};

struct DataCopyExtParams {
  DataCopyExtParams() = default;
  DataCopyExtParams(const uint16_t count, const uint32_t len, const uint32_t src_stride,
                    const uint32_t dst_stride, const uint32_t reserved)
      : blockCount(count), blockLen(len), srcStride(src_stride), dstStride(dst_stride),
        rsv(reserved) {}
  uint16_t blockCount = 1;
  uint32_t blockLen = 0;
  uint32_t srcStride = 0;
  uint32_t dstStride = 0;
  uint32_t rsv = 0;
};

template <typename T>
struct DataCopyPadExtParams {
  DataCopyPadExtParams() = default;
  DataCopyPadExtParams(const bool pad, const uint8_t left, const uint8_t right, T value)
      : isPad(pad), leftPadding(left), rightPadding(right), paddingValue(value) {}
  bool isPad = false;
  uint8_t leftPadding = 0;
  uint8_t rightPadding = 0;
  T paddingValue = T(0.0f);
};

}  // namespace AscendC
