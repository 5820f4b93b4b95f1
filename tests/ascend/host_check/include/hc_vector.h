// Element-wise vector instructions: unary, binary, tensor with scalar, Duplicate, Copy, Brcb.
// Facts: the memory vector compute pages of asc-devkit (types on A2), kernel_operator_vec_*.h.
#pragma once

#include "hc_operand.h"

namespace host_check {

template <typename T>
inline constexpr bool is_float_type = is_one_of<T, half, float>;
template <typename T>
inline constexpr bool is_arithmetic_type = is_one_of<T, half, float, int16_t, int32_t>;

template <typename T>
inline float widen(T value) {
  return static_cast<float>(value);
}

// Saturation mode of half and bfloat16_t: infinity to the largest value, NaN to 0.
inline half saturated(half x) {
  const uint32_t magnitude = x.bits() & 0x7fffu;
  if (magnitude < 0x7c00u) return x;
  if (magnitude > 0x7c00u) return half::from_bits(0);
  return half::from_bits(static_cast<uint16_t>((x.bits() & 0x8000u) | 0x7bffu));
}
inline bfloat16_t saturated(bfloat16_t x) {
  const uint32_t magnitude = x.bits() & 0x7fffu;
  if (magnitude < 0x7f80u) return x;
  if (magnitude > 0x7f80u) return bfloat16_t::from_bits(0);
  return bfloat16_t::from_bits(static_cast<uint16_t>((x.bits() & 0x8000u) | 0x7f7fu));
}

template <typename T>
[[noreturn]] __attribute__((cold, noinline)) inline void fail_overflow(const char* what) {
  fail("integer-overflow", "%s of %d-bit integers leaves the range, where modes and pages differ",
       what, static_cast<int>(8 * sizeof(T)));
}

// The device's scalar operation on one lane. Float as IEEE, half rounded once from float (exact:
// 24 bits hold any rounding of two 11-bit numbers), integers without overflow.
template <typename T, typename Float, typename Int>
inline T arithmetic(T a, T b, const Float& in_float, const Int& in_int, const char* what) {
  if constexpr (std::is_same_v<T, float>) {
    return in_float(a, b);
  } else if constexpr (std::is_same_v<T, half>) {
    const half result(in_float(widen(a), widen(b)));
    return core().config.saturate ? saturated(result) : result;
  } else {
    const int64_t wide = in_int(int64_t{a}, int64_t{b});
    if (wide < std::numeric_limits<T>::min() || wide > std::numeric_limits<T>::max()) {
      fail_overflow<T>(what);
    }
    return static_cast<T>(wide);
  }
}

struct AddOp {
  static constexpr const char* kName = "Add";
  template <typename T>
  T operator()(T a, T b) const {
    return arithmetic(a, b, [](float x, float y) { return x + y; },
                      [](int64_t x, int64_t y) { return x + y; }, kName);
  }
};
struct SubOp {
  static constexpr const char* kName = "Sub";
  template <typename T>
  T operator()(T a, T b) const {
    return arithmetic(a, b, [](float x, float y) { return x - y; },
                      [](int64_t x, int64_t y) { return x - y; }, kName);
  }
};
struct MulOp {
  static constexpr const char* kName = "Mul";
  template <typename T>
  T operator()(T a, T b) const {
    return arithmetic(a, b, [](float x, float y) { return x * y; },
                      [](int64_t x, int64_t y) { return x * y; }, kName);
  }
};

// asc-devkit's appendix of boundary values of the memory vector compute interfaces (tables 13 and 17)
// says that NaN survives in float. Kernels are not to rely on it, so the other answer is modelled
// too.
template <bool kMax>
struct ExtremeOp {
  static constexpr const char* kName = kMax ? "Max" : "Min";
  bool propagate = core().config.nan_max == NanMax::kPropagate;
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (is_float_type<T>) {
      const float x = widen(a);
      const float y = widen(b);
      if (std::isnan(x)) return propagate ? a : b;
      if (std::isnan(y)) return propagate ? b : a;
      return (kMax ? x < y : y < x) ? b : a;
    } else {
      return (kMax ? a < b : b < a) ? b : a;
    }
  }
};

struct AndOp {
  static constexpr const char* kName = "And";
  template <typename T>
  T operator()(T a, T b) const { return static_cast<T>(a & b); }
};
struct OrOp {
  static constexpr const char* kName = "Or";
  template <typename T>
  T operator()(T a, T b) const { return static_cast<T>(a | b); }
};
struct NotOp {
  static constexpr const char* kName = "Not";
  template <typename T>
  T operator()(T a) const { return static_cast<T>(~a); }
};
struct AbsOp {
  static constexpr const char* kName = "Abs";
  float operator()(float a) const { return bit_cast<float>(bit_cast<uint32_t>(a) & 0x7fffffffu); }
  half operator()(half a) const {
    return half::from_bits(static_cast<uint16_t>(a.bits() & 0x7fffu));
  }
};
struct CopyOp {
  template <typename T>
  T operator()(T a) const { return a; }
};

struct ShiftRightOp {
  static constexpr const char* kName = "ShiftRight";
  uint32_t amount;
  template <typename T>
  T operator()(T a) const {
    if (amount >= 8 * sizeof(T)) return static_cast<T>(std::is_signed_v<T> && a < 0 ? -1 : 0);
    return static_cast<T>(a >> amount);  // arithmetic for signed, logical for unsigned
  }
};
struct ShiftLeftOp {
  static constexpr const char* kName = "ShiftLeft";
  uint32_t amount;
  template <typename T>
  T operator()(T a) const {
    using U = std::make_unsigned_t<T>;
    const U shifted = amount >= 8 * sizeof(T) ? U{0}
                                              : static_cast<U>(static_cast<U>(a) << amount);
    if constexpr (std::is_signed_v<T>) {
      // The page keeps the sign bit and drops the one below it; a plain shift drops the sign.
      // Where they differ the result is in doubt: use the unsigned type.
      const int64_t exact = amount > 40 ? (a == 0 ? 0 : INT64_MAX)
                                        : static_cast<int64_t>(a) * (int64_t{1} << amount);
      if (exact != static_cast<T>(shifted)) fail_overflow<T>(kName);
    }
    return static_cast<T>(shifted);
  }
};

template <typename Op, typename T>
inline auto with_scalar(Op op, T value) {
  return [op, value](T a) { return op(a, value); };
}

template <typename T>
inline uint32_t shift_amount(T amount) {
  if (amount < 0 || static_cast<uint64_t>(amount) > 8 * sizeof(T)) {
    fail("shift-range", "a shift by %lld, must be 0..%d", static_cast<long long>(amount),
         static_cast<int>(8 * sizeof(T)));
  }
  return static_cast<uint32_t>(amount);
}

template <typename T>
inline constexpr uint32_t lanes_of = kRepeatBytes / sizeof(T);

template <typename T>
inline Shape shape_of(uint64_t mask, RepeatTime repeats, const char* what) {
  return shape_of_mask(lanes_of_count(mask, lanes_of<T>, what), repeats, lanes_of<T>);
}
template <typename T>
inline Shape shape_of(const uint64_t mask[2], RepeatTime repeats, const char* what) {
  return shape_of_mask(lanes_of_bits(mask, lanes_of<T>, what), repeats, lanes_of<T>);
}

template <typename T, typename F>
inline void binary(const char* what, const Shape& shape, const F& f,
                   const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src0,
                   const AscendC::LocalTensor<T>& src1, const AscendC::BinaryRepeatParams& p,
                   bool may_accumulate) {
  if (shape.repeats == 0) return;
  Operand d = operand("dst", dst, p.dstBlkStride, p.dstRepStride);
  Operand a = operand("src0", src0, p.src0BlkStride, p.src0RepStride);
  Operand b = operand("src1", src1, p.src1BlkStride, p.src1RepStride);
  const bool accumulates = may_accumulate && shape.repeats > 1 && p.dstRepStride == 0 &&
                           p.src1RepStride == 0 && d.view.address == b.view.address &&
                           p.dstBlkStride == p.src1BlkStride;
  check_vector(what, shape, accumulates, d, a, b);
  each_lane<T, T, T>(shape, f, d, a, b);
}

template <typename T, typename F>
inline void unary(const char* what, const Shape& shape, const F& f,
                  const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src,
                  uint32_t dst_block, uint32_t src_block, uint32_t dst_repeat,
                  uint32_t src_repeat) {
  if (shape.repeats == 0) return;
  Operand d = operand("dst", dst, dst_block, dst_repeat);
  Operand a = operand("src", src, src_block, src_repeat);
  check_vector(what, shape, false, d, a);
  each_lane<T, T>(shape, f, d, a);
}

template <typename T, typename F>
inline void unary(const char* what, const Shape& shape, const F& f,
                  const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src,
                  const AscendC::UnaryRepeatParams& p) {
  unary(what, shape, f, dst, src, p.dstBlkStride, p.srcBlkStride, p.dstRepStride, p.srcRepStride);
}

}  // namespace host_check

namespace AscendC {

// Binary instructions: count form, contiguous mask, bit mask.
#define HOST_CHECK_BINARY(NAME, OP, ACCUMULATES, MESSAGE, ...)                                     \
  template <typename T>                                                                           \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0,                         \
                   const LocalTensor<T>& src1, host_check::Count count) {                         \
    static_assert(host_check::is_one_of<T, __VA_ARGS__>, MESSAGE);                                \
    host_check::binary(#NAME, host_check::shape_of_count(count, host_check::lanes_of<T>), OP, dst, \
                       src0, src1, BinaryRepeatParams(), false);                                  \
  }                                                                                               \
  template <typename T, bool isSetMask = true>                                                    \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0,                         \
                   const LocalTensor<T>& src1, uint64_t mask, host_check::RepeatTime repeatTime,  \
                   const BinaryRepeatParams& repeatParams) {                                      \
    static_assert(isSetMask, "isSetMask = false is outside the subset");                          \
    static_assert(host_check::is_one_of<T, __VA_ARGS__>, MESSAGE);                                \
    host_check::binary(#NAME, host_check::shape_of<T>(mask, repeatTime, #NAME), OP, dst, src0,    \
                       src1, repeatParams, (ACCUMULATES) && !std::is_same_v<T, int16_t>);         \
  }                                                                                               \
  template <typename T, bool isSetMask = true>                                                    \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0,                         \
                   const LocalTensor<T>& src1, uint64_t mask[],                                   \
                   host_check::RepeatTime repeatTime, const BinaryRepeatParams& repeatParams) {   \
    static_assert(isSetMask, "isSetMask = false is outside the subset");                          \
    static_assert(host_check::is_one_of<T, __VA_ARGS__>, MESSAGE);                                \
    host_check::binary(#NAME, host_check::shape_of<T>(mask, repeatTime, #NAME), OP, dst, src0,    \
                       src1, repeatParams, (ACCUMULATES) && !std::is_same_v<T, int16_t>);         \
  }

HOST_CHECK_BINARY(Add, host_check::AddOp{}, true,
                  "unsupported-type: Add takes half, float, int16_t, int32_t", half, float,
                  int16_t, int32_t)
HOST_CHECK_BINARY(Sub, host_check::SubOp{}, true,
                  "unsupported-type: Sub takes half, float, int16_t, int32_t", half, float,
                  int16_t, int32_t)
HOST_CHECK_BINARY(Mul, host_check::MulOp{}, true,
                  "unsupported-type: Mul takes half, float, int16_t, int32_t", half, float,
                  int16_t, int32_t)
HOST_CHECK_BINARY(Max, host_check::ExtremeOp<true>{}, true,
                  "unsupported-type: Max takes half, float, int16_t, int32_t", half, float,
                  int16_t, int32_t)
HOST_CHECK_BINARY(Min, host_check::ExtremeOp<false>{}, true,
                  "unsupported-type: Min takes half, float, int16_t, int32_t", half, float,
                  int16_t, int32_t)
HOST_CHECK_BINARY(And, host_check::AndOp{}, false,
                  "unsupported-type: And takes int16_t, uint16_t", int16_t, uint16_t)
HOST_CHECK_BINARY(Or, host_check::OrOp{}, false,
                  "unsupported-type: Or takes int16_t, uint16_t", int16_t, uint16_t)
#undef HOST_CHECK_BINARY

#define HOST_CHECK_UNARY(NAME, OP, MESSAGE, ...)                                                   \
  template <typename T>                                                                           \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src,                          \
                   host_check::Count count) {                                                     \
    static_assert(host_check::is_one_of<T, __VA_ARGS__>, MESSAGE);                                \
    host_check::unary(#NAME, host_check::shape_of_count(count, host_check::lanes_of<T>), OP, dst,  \
                      src, UnaryRepeatParams());                                                  \
  }                                                                                               \
  template <typename T, bool isSetMask = true>                                                    \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask,           \
                   host_check::RepeatTime repeatTime, const UnaryRepeatParams& repeatParams) {    \
    static_assert(isSetMask, "isSetMask = false is outside the subset");                          \
    static_assert(host_check::is_one_of<T, __VA_ARGS__>, MESSAGE);                                \
    host_check::unary(#NAME, host_check::shape_of<T>(mask, repeatTime, #NAME), OP, dst, src,      \
                      repeatParams);                                                              \
  }                                                                                               \
  template <typename T, bool isSetMask = true>                                                    \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask[],         \
                   host_check::RepeatTime repeatTime, const UnaryRepeatParams& repeatParams) {    \
    static_assert(isSetMask, "isSetMask = false is outside the subset");                          \
    static_assert(host_check::is_one_of<T, __VA_ARGS__>, MESSAGE);                                \
    host_check::unary(#NAME, host_check::shape_of<T>(mask, repeatTime, #NAME), OP, dst, src,      \
                      repeatParams);                                                              \
  }

HOST_CHECK_UNARY(Abs, host_check::AbsOp{}, "unsupported-type: Abs takes half, float", half, float)
HOST_CHECK_UNARY(Not, host_check::NotOp{}, "unsupported-type: Not takes int16_t, uint16_t",
                 int16_t, uint16_t)
#undef HOST_CHECK_UNARY

// Tensor with scalar. `scalarValue` takes part in the deduction of T, as on the device.
#define HOST_CHECK_SCALAR(NAME, EXPRESSION, MESSAGE, ...)                                          \
  template <typename T, bool isSetMask = true>                                                    \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue,    \
                   host_check::Count count) {                                                     \
    static_assert(isSetMask, "isSetMask = false is outside the subset");                          \
    static_assert(host_check::is_one_of<T, __VA_ARGS__>, MESSAGE);                                \
    host_check::unary(#NAME, host_check::shape_of_count(count, host_check::lanes_of<T>),           \
                      EXPRESSION, dst, src, UnaryRepeatParams());                                 \
  }                                                                                               \
  template <typename T, bool isSetMask = true>                                                    \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue,    \
                   uint64_t mask, host_check::RepeatTime repeatTime,                              \
                   const UnaryRepeatParams& repeatParams) {                                       \
    static_assert(isSetMask, "isSetMask = false is outside the subset");                          \
    static_assert(host_check::is_one_of<T, __VA_ARGS__>, MESSAGE);                                \
    host_check::unary(#NAME, host_check::shape_of<T>(mask, repeatTime, #NAME), EXPRESSION, dst,   \
                      src, repeatParams);                                                         \
  }                                                                                               \
  template <typename T, bool isSetMask = true>                                                    \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue,    \
                   uint64_t mask[], host_check::RepeatTime repeatTime,                            \
                   const UnaryRepeatParams& repeatParams) {                                       \
    static_assert(isSetMask, "isSetMask = false is outside the subset");                          \
    static_assert(host_check::is_one_of<T, __VA_ARGS__>, MESSAGE);                                \
    host_check::unary(#NAME, host_check::shape_of<T>(mask, repeatTime, #NAME), EXPRESSION, dst,   \
                      src, repeatParams);                                                         \
  }

HOST_CHECK_SCALAR(Adds, (host_check::with_scalar(host_check::AddOp{}, scalarValue)),
                  "unsupported-type: Adds takes half, float, int16_t, int32_t", half, float,
                  int16_t, int32_t)
HOST_CHECK_SCALAR(Muls, (host_check::with_scalar(host_check::MulOp{}, scalarValue)),
                  "unsupported-type: Muls takes half, float, int16_t, int32_t", half, float,
                  int16_t, int32_t)
HOST_CHECK_SCALAR(Maxs,
                  (host_check::with_scalar(host_check::ExtremeOp<true>{}, scalarValue)),
                  "unsupported-type: Maxs takes half, float, int16_t, int32_t", half, float,
                  int16_t, int32_t)
HOST_CHECK_SCALAR(Mins,
                  (host_check::with_scalar(host_check::ExtremeOp<false>{}, scalarValue)),
                  "unsupported-type: Mins takes half, float, int16_t, int32_t", half, float,
                  int16_t, int32_t)
HOST_CHECK_SCALAR(ShiftLeft, host_check::ShiftLeftOp{host_check::shift_amount(scalarValue)},
                  "unsupported-type: ShiftLeft takes int16_t, uint16_t, int32_t, uint32_t",
                  int16_t, uint16_t, int32_t, uint32_t)
HOST_CHECK_SCALAR(ShiftRight, host_check::ShiftRightOp{host_check::shift_amount(scalarValue)},
                  "unsupported-type: ShiftRight takes int16_t, uint16_t, int32_t, uint32_t",
                  int16_t, uint16_t, int32_t, uint32_t)
#undef HOST_CHECK_SCALAR

}  // namespace AscendC
