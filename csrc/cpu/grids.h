// The five grids, and how one group is mapped to its levels.
//
// A grid has two or three magnitudes. |w| above `inner` times the scale takes the middle one, above
// `outer` times the scale the high one. Both products are float32; floats of one sign compare as
// integers, so |w| > t is a comparison of the bits of |w| with those of the largest number of w's
// format that does not exceed t. The levels are bit patterns too. So an element needs no conversion
// and no rounding, whatever the grid.
#pragma once

#include "groups.h"

namespace bitcpm {
namespace {

enum class Outer { kNone, kNegative, kBoth };

struct Ternary {
  static constexpr float kLow = 0, kMiddle = 1, kHigh = 0;
  static constexpr float kOuter = 0;
  static constexpr Outer kOuterSide = Outer::kNone;
  static constexpr float kMaxLevel = 0;  // the scale is a mean
  // 2|w| > s, exact also where s / 2 would round.
  static float inner(float scale) { return bits_to_float(halve_to_threshold(scale)); }
};

// The grids below take the scale from the largest magnitude, which kMaxLevel * scale stands for.
struct Asym4 {
  static constexpr float kLow = 0, kMiddle = 1, kHigh = 2;
  static constexpr float kOuter = 1.5f;
  static constexpr Outer kOuterSide = Outer::kNegative;
  static constexpr float kMaxLevel = 1.5f;
  static float inner(float scale) { return 0.5f * scale; }
};

struct HalfSym4 {
  static constexpr float kLow = 0.5f, kMiddle = 1.5f, kHigh = 0;
  static constexpr float kOuter = 0;
  static constexpr Outer kOuterSide = Outer::kNone;
  static constexpr int8_t kLowCode = 1, kMiddleCode = 3;
  static constexpr float kMaxLevel = 1.5f;
  static float inner(float scale) { return scale; }
};

struct IntSym4 {
  static constexpr float kLow = 1, kMiddle = 2, kHigh = 0;
  static constexpr float kOuter = 0;
  static constexpr Outer kOuterSide = Outer::kNone;
  static constexpr int8_t kLowCode = 1, kMiddleCode = 2;
  static constexpr float kMaxLevel = 2;
  static float inner(float scale) { return 1.5f * scale; }
};

struct Five {
  static constexpr float kLow = 0, kMiddle = 1, kHigh = 2;
  static constexpr float kOuter = 1.5f;
  static constexpr Outer kOuterSide = Outer::kBoth;
  static constexpr float kMaxLevel = 2;
  static float inner(float scale) { return 0.5f * scale; }
};

inline float invert_length(int64_t group_len) {
  return static_cast<float>(1.0 / static_cast<double>(group_len));
}

// NaN unless every element (of a mean: also the sum) is finite: comparisons would drop it, and a
// diverging run must be seen.
template <class Type, class GridType>
BITCPM_INLINE float compute_scale(const typename Type::Bits* w, int64_t group_len, float one_over_n,
                           float eps) {
  float scale;
  if constexpr (GridType::kMaxLevel == 0) {
    const float sum = sum_abs<Type>(w, group_len);
    if (!is_finite(sum)) return bits_to_float(kFloat32NaN);
    scale = sum * one_over_n;
  } else {
    const auto largest = max_abs<Type>(w, group_len);
    if (largest >= Type::kInf) return bits_to_float(kFloat32NaN);
    scale = Type::widen(largest) / GridType::kMaxLevel;
  }
  return scale < eps ? eps : scale;
}

// Bit patterns that decide a group.
template <class Type, class GridType>
struct Levels {
  using Bits = typename Type::Bits;
  Bits inner, outer, low, middle, high;
  explicit Levels(float scale)
      : inner(Type::truncate(GridType::inner(scale))),
        outer(Type::truncate(GridType::kOuter * scale)),
        low(Type::round(GridType::kLow * scale)),
        middle(Type::round(GridType::kMiddle * scale)),
        high(Type::round(GridType::kHigh * scale)) {}
};

// CheckElements: a scale that was handed in says nothing about the elements, so look at each.
template <class Type, class GridType, bool CheckElements>
BITCPM_INLINE void write_levels(const typename Type::Bits* w, typename Type::Bits* wq,
                                int64_t group_len, float scale) {
  using Bits = typename Type::Bits;
  using Vec = typename Type::Vec;
  constexpr int kStep = kVectorBytes / sizeof(Bits);
  const Levels<Type, GridType> levels(scale);
  const Vec sign = broadcast<Vec>(Type::kSign), magnitude = ~sign;
  const Vec inner = broadcast<Vec>(levels.inner), outer = broadcast<Vec>(levels.outer);
  const Vec low = broadcast<Vec>(levels.low), middle = broadcast<Vec>(levels.middle);
  // What exclusive-or turns one level into the next.
  const Vec to_middle = low ^ middle, to_high = middle ^ broadcast<Vec>(levels.high);
  const Vec infinity = broadcast<Vec>(Type::kInf), nan = broadcast<Vec>(Type::kNaN);
  const auto quantize_vector = [&](Vec x) {
    const Vec absolute = x & magnitude;
    Vec result;
    if constexpr (GridType::kLow == 0) {
      Vec level = middle;
      if constexpr (GridType::kOuterSide == Outer::kBoth)
        level ^= (absolute > outer) & to_high;
      else if constexpr (GridType::kOuterSide == Outer::kNegative)
        level ^= (absolute > outer) & (x < 0) & to_high;
      result = (absolute > inner) & (level | (x & sign));
    } else {
      // Zero of either sign lies between two equal magnitudes and takes the positive one.
      result = (low ^ ((absolute > inner) & to_middle)) | ((absolute > 0) & x & sign);
    }
    if (CheckElements) result = select<Vec>(absolute >= infinity, nan, result);
    return result;
  };
  int64_t i = 0;
  for (; i + kStep <= group_len; i += kStep) store(wq + i, quantize_vector(load<Vec>(w + i)));
  if (i < group_len) {
    const size_t bytes = static_cast<size_t>(group_len - i) * sizeof(Bits);
    Vec last = {};
    std::memcpy(&last, w + i, bytes);
    last = quantize_vector(last);
    std::memcpy(wq + i, &last, bytes);
  }
}

// Of a grid with 0 the codes are the levels, and neighbours differ by 1.
template <class Type, class GridType>
BITCPM_INLINE void write_codes(const typename Type::Bits* w, int8_t* codes, int64_t group_len,
                        float scale) {
  using Bits = typename Type::Bits;
  using Vec = typename Type::Vec;
  constexpr int kStep = kVectorBytes / sizeof(Bits);
  typedef int8_t Codes __attribute__((vector_size(kStep)));
  const Levels<Type, GridType> levels(scale);
  const Vec magnitude = ~broadcast<Vec>(Type::kSign);
  const Vec inner = broadcast<Vec>(levels.inner), outer = broadcast<Vec>(levels.outer);
  const auto quantize_vector = [&](Vec x) {
    const Vec absolute = x & magnitude;
    Vec negative = x >> (8 * sizeof(Bits) - 1);  // -1 or 0
    Vec code;
    if constexpr (GridType::kLow == 0) {
      const Vec one = negative | 1;  // with the sign of x
      code = (absolute > inner) & one;
      if constexpr (GridType::kOuterSide == Outer::kBoth)
        code += (absolute > outer) & one;
      else if constexpr (GridType::kOuterSide == Outer::kNegative)
        code += (absolute > outer) & negative;
    } else {
      constexpr int kMore = GridType::kMiddleCode - GridType::kLowCode;
      code = ((absolute > inner) & kMore) + GridType::kLowCode;
      negative &= absolute > 0;
      code = (code ^ negative) - negative;
    }
    return __builtin_convertvector(code, Codes);
  };
  int64_t i = 0;
  for (; i + kStep <= group_len; i += kStep) store(codes + i, quantize_vector(load<Vec>(w + i)));
  if (i < group_len) {
    Vec last = {};
    std::memcpy(&last, w + i, static_cast<size_t>(group_len - i) * sizeof(Bits));
    const Codes result = quantize_vector(last);
    std::memcpy(codes + i, &result, static_cast<size_t>(group_len - i));
  }
}

}  // namespace
}  // namespace bitcpm
