// Activations on an int8 grid per row, as values: x_q = rint(x * scale) / scale.
//
// scale = 127 * (1 / max(max|x|, 1e-5)), two roundings, because that is how torch evaluates the
// 127 / m of Transformers' AutoBitLinear, with which the results agree bit for bit.
#pragma once

#include "groups.h"

namespace bitcpm {
namespace {

// Multiples of the scale, nearest even, with the sign of x also on zeros. |x * scale| stays below
// 127.5, so the clamp to [-128, 127] of the definition changes nothing, and adding 2^23, where
// floats are integers, rounds. A caller who flushes subnormals gets the same, except that 1 / m is
// subnormal, and the row then NaN, where an element exceeds 2^126.
inline VecF round_to_step(VecF x, VecF scale) {
  const VecF scaled = x * scale;
  const VecU32 sign = (VecU32)scaled & 0x80000000u;
  const VecF absolute = (VecF)((VecU32)scaled & 0x7fffffffu);
  const VecF steps = (absolute + 0x1p23f) - 0x1p23f;
  return (VecF)((VecU32)steps | sign) / scale;
}

template <class Type>
inline void quantize_row_int8(const typename Type::Bits* x, typename Type::Bits* xq, int64_t cols) {
  using Bits = typename Type::Bits;
  const Bits largest = max_abs<Type>(x, cols);
  if (largest >= Type::kInf) return fill(xq, Type::kNaN, cols);
  const float maximum = Type::widen(largest);
  const VecF scale = broadcast<VecF>((1.0f / (maximum < 1e-5f ? 1e-5f : maximum)) * 127.0f);
  const auto quantize_words = [&](VecU32 words) {
    VecF values[Type::kPerWord];
    Type::decode(words, values);
    for (VecF& value : values) value = round_to_step(value, scale);
    return Type::encode(values);
  };
  constexpr int kStep = kVectorBytes / sizeof(Bits);
  int64_t i = 0;
  for (; i + kStep <= cols; i += kStep) store(xq + i, quantize_words(load<VecU32>(x + i)));
  if (i < cols) {
    const size_t bytes = static_cast<size_t>(cols - i) * sizeof(Bits);
    VecU32 last = {};
    std::memcpy(&last, x + i, bytes);
    last = quantize_words(last);
    std::memcpy(xq + i, &last, bytes);
  }
}

}  // namespace
}  // namespace bitcpm
