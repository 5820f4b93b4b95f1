// Cast: the pairs and rounding modes of A2 (Cast.md), exact values, saturation to integers.
#pragma once

#include "hc_operand.h"
#include "hc_vector.h"

namespace host_check {

constexpr unsigned mode_bit(AscendC::RoundMode mode) { return 1u << static_cast<unsigned>(mode); }
constexpr unsigned kModeNone = mode_bit(AscendC::RoundMode::CAST_NONE);
constexpr unsigned kModesInexact =
    mode_bit(AscendC::RoundMode::CAST_RINT) | mode_bit(AscendC::RoundMode::CAST_FLOOR) |
    mode_bit(AscendC::RoundMode::CAST_CEIL) | mode_bit(AscendC::RoundMode::CAST_ROUND) |
    mode_bit(AscendC::RoundMode::CAST_TRUNC);
constexpr unsigned kModeOdd = mode_bit(AscendC::RoundMode::CAST_ODD);

// Allowed modes of a pair; 0 = the pair does not exist on this device.
template <typename D, typename S>
constexpr unsigned cast_modes() {
  if constexpr (std::is_same_v<S, float>) {
    if (std::is_same_v<D, half>) return kModesInexact | kModeNone | kModeOdd;
    if (is_one_of<D, bfloat16_t, float, int32_t, int16_t>) return kModesInexact;
  } else if constexpr (std::is_same_v<S, half>) {
    if (std::is_same_v<D, float>) return kModeNone;
    if (is_one_of<D, int8_t, uint8_t>) return kModesInexact | kModeNone;
    if (is_one_of<D, int16_t, int32_t>) return kModesInexact;
  } else if constexpr (std::is_same_v<S, bfloat16_t>) {
    if (std::is_same_v<D, float>) return kModeNone;
    if (std::is_same_v<D, int32_t>) return kModesInexact;
  } else if constexpr (is_one_of<S, int8_t, uint8_t>) {
    if (std::is_same_v<D, half>) return kModeNone;
  } else if constexpr (std::is_same_v<S, int16_t>) {
    if (std::is_same_v<D, half>) return kModesInexact | kModeNone;
    if (std::is_same_v<D, float>) return kModeNone;
  } else if constexpr (std::is_same_v<S, int32_t>) {
    if (std::is_same_v<D, float>) return kModesInexact | kModeNone;
    if (std::is_same_v<D, int16_t>) return kModeNone;
  }
  return 0;
}

// Overflow of a rounding to a smaller float: to infinity unless the mode points inward.
inline bool overflows_to_infinity(bool negative, Rounding mode) {
  switch (mode) {
    case Rounding::kTrunc:
    case Rounding::kOdd: return false;
    case Rounding::kFloor: return negative;
    case Rounding::kCeil: return !negative;
    default: return true;
  }
}

inline uint16_t half_bits(float x, Rounding mode) {
  if (mode == Rounding::kNone || mode == Rounding::kRint || !std::isfinite(x)) {
    return half_bits_rint(x);
  }
  const double rounded = round_to_format(x, 10, -14, mode);
  if (std::fabs(rounded) > 65504.0 && !overflows_to_infinity(x < 0, mode)) {
    return x < 0 ? 0xfbff : 0x7bff;
  }
  const uint16_t bits = half_bits_rint(static_cast<float>(rounded));
  return static_cast<uint16_t>(bits | (std::signbit(x) ? 0x8000u : 0u));
}

inline uint16_t bf16_bits(float x, Rounding mode) {
  if (mode == Rounding::kRint || !std::isfinite(x)) return bf16_bits_rint(x);
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool negative = (bits >> 31) != 0;
  const uint32_t rest = bits & 0xffffu;
  uint32_t kept = bits >> 16;  // magnitude rounded toward zero
  const bool up = mode == Rounding::kRound   ? rest >= 0x8000u
                  : mode == Rounding::kFloor ? negative && rest != 0
                  : mode == Rounding::kCeil  ? !negative && rest != 0
                                             : false;
  if (up) ++kept;  // a carry runs into the exponent and ends in infinity
  return static_cast<uint16_t>(kept);
}

template <typename D>
inline D to_integer(float x, Rounding mode) {
  if (std::isnan(x)) return 0;
  const double rounded = round_to_integer(static_cast<double>(x), mode);
  if (rounded <= static_cast<double>(std::numeric_limits<D>::min())) {
    return std::numeric_limits<D>::min();
  }
  if (rounded >= static_cast<double>(std::numeric_limits<D>::max())) {
    return std::numeric_limits<D>::max();
  }
  return static_cast<D>(rounded);
}

// Rounds a double that holds an integer to float by mode.
inline float integer_to_float(int64_t value, Rounding mode) {
  const double wide = static_cast<double>(value);
  if (value == 0) return 0.0f;
  const int exponent = std::ilogb(wide);
  if (exponent <= 23) return static_cast<float>(wide);
  const double rounded = round_to_integer(std::ldexp(wide, 23 - exponent), mode);
  return static_cast<float>(std::ldexp(rounded, exponent - 23));
}

template <typename D, typename S>
inline D convert(S x, Rounding mode, bool saturate) {
  if constexpr (std::is_same_v<D, half>) {
    const half result = half::from_bits(half_bits(static_cast<float>(x), mode));
    return saturate ? saturated(result) : result;
  } else if constexpr (std::is_same_v<D, bfloat16_t>) {
    const bfloat16_t result = bfloat16_t::from_bits(bf16_bits(x, mode));
    return saturate ? saturated(result) : result;
  } else if constexpr (std::is_same_v<D, float>) {
    if constexpr (std::is_same_v<S, float>) {
      return std::isfinite(x) ? static_cast<float>(round_to_integer(x, mode)) : x;
    } else if constexpr (std::is_integral_v<S>) {
      return integer_to_float(x, mode);
    } else {
      return static_cast<float>(x);
    }
  } else if constexpr (std::is_same_v<S, int32_t>) {  // to int16
    if (x < -32768 || x > 32767) fail_overflow<D>("Cast");
    return static_cast<D>(x);
  } else {
    return to_integer<D>(static_cast<float>(x), mode);
  }
}

template <typename D, typename S>
inline void cast(const AscendC::LocalTensor<D>& dst, const AscendC::LocalTensor<S>& src,
                 AscendC::RoundMode mode, const Shape& shape, uint32_t dst_block,
                 uint32_t src_block, uint32_t dst_repeat, uint32_t src_repeat) {
  constexpr unsigned allowed = cast_modes<D, S>();
  static_assert(allowed != 0, "cast-pair: this Cast does not exist on A2");
  if ((allowed & mode_bit(mode)) == 0) {
    fail("cast-mode", "RoundMode %d is not available for this pair of types",
         static_cast<int>(mode));
  }
  if (shape.repeats == 0) return;
  Operand d = operand("dst", dst, dst_block, dst_repeat);
  Operand a = operand("src", src, src_block, src_repeat);
  check_vector("Cast", shape, false, d, a);
  const bool sat = core().config.saturate;
  switch (static_cast<Rounding>(mode)) {
    case Rounding::kRint:
      each_lane<D, S>(shape, [sat](S x) { return convert<D>(x, Rounding::kRint, sat); }, d, a);
      break;
    case Rounding::kNone:
      each_lane<D, S>(shape, [sat](S x) { return convert<D>(x, Rounding::kNone, sat); }, d, a);
      break;
    default: {
      const Rounding rounding = static_cast<Rounding>(mode);
      each_lane<D, S>(shape, [rounding, sat](S x) { return convert<D>(x, rounding, sat); }, d, a);
    }
  }
}

template <typename D, typename S>
inline constexpr uint32_t cast_lanes =
    kRepeatBytes / (sizeof(D) > sizeof(S) ? sizeof(D) : sizeof(S));

}  // namespace host_check

namespace AscendC {

template <typename T, typename U>
inline void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode,
                 host_check::Count count) {
  constexpr uint32_t lanes = host_check::cast_lanes<T, U>;
  host_check::cast(dst, src, roundMode, host_check::shape_of_count(count, lanes), 1, 1,
                   static_cast<uint32_t>(lanes * sizeof(T) / host_check::kBlock),
                   static_cast<uint32_t>(lanes * sizeof(U) / host_check::kBlock));
}
template <typename T, typename U, bool isSetMask = true>
inline void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode,
                 const uint64_t mask, host_check::RepeatTime repeatTime,
                 const UnaryRepeatParams& p) {
  static_assert(isSetMask, "isSetMask = false is outside the subset");
  constexpr uint32_t lanes = host_check::cast_lanes<T, U>;
  host_check::cast(dst, src, roundMode,
                   host_check::shape_of_mask(host_check::lanes_of_count(mask, lanes, "Cast"),
                                             repeatTime, lanes),
                   p.dstBlkStride, p.srcBlkStride, p.dstRepStride, p.srcRepStride);
}
template <typename T, typename U, bool isSetMask = true>
inline void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode,
                 const uint64_t mask[], host_check::RepeatTime repeatTime,
                 const UnaryRepeatParams& p) {
  static_assert(isSetMask, "isSetMask = false is outside the subset");
  constexpr uint32_t lanes = host_check::cast_lanes<T, U>;
  host_check::cast(dst, src, roundMode,
                   host_check::shape_of_mask(host_check::lanes_of_bits(mask, lanes, "Cast"),
                                             repeatTime, lanes),
                   p.dstBlkStride, p.srcBlkStride, p.dstRepStride, p.srcRepStride);
}

}  // namespace AscendC
