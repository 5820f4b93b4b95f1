// Ternary quantisation of contiguous groups; one source, compiled once per instruction set.
//
// Two passes over a group: the canonical sum, then the codes from cache. Only the sum is
// floating-point work. With h the largest float for which 2h <= s, the test 2|w| > s compares the
// bit patterns of |w| and h as integers, in the width of the input type, and the three possible
// results are bit patterns too. So the second pass has no conversion and no rounding per element.
//
// The build sets BITCPM_GET_KERNELS to the name of the getter, and -ffp-contract=off. Everything
// else has internal linkage, lest the linker keep one set's code for all.

#include "kernels.h"

#include <cstring>

#include "../common/float_bits.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "The 16-bit sums read two elements from one little-endian 32-bit word."
#endif

namespace bitcpm {
namespace {

#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif

constexpr int kFloats = kVectorBytes / 4;
typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecS32 __attribute__((vector_size(kVectorBytes)));
typedef int16_t VecS16 __attribute__((vector_size(kVectorBytes)));

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// ---- sum of absolute values -------------------------------------------------------------------

// {a0 + a1, a2 + a3, ..., b0 + b1, ...}: one level of the adjacent-pair tree.
inline VecF add_pairs(VecF a, VecF b) {
#if defined(__AVX512BW__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// Reduce Count vectors, lanes in order, to one number.
template <int Count>
inline float reduce_pairs(VecF* v) {
  for (int count = Count; count > 1; count /= 2)
    for (int k = 0; k < count / 2; ++k) v[k] = add_pairs(v[2 * k], v[2 * k + 1]);
  VecF rest = v[0];
  for (int lanes = kFloats; lanes > 1; lanes /= 2) rest = add_pairs(rest, rest);
  return rest[0];
}

struct Float32 {
  using Bits = uint32_t;
  using Vec = VecS32;
  static constexpr Bits kSign = 0x80000000u, kInf = kFloat32Inf, kNaN = kFloat32NaN;
  static Bits round_scale(float scale) { return float_to_bits(scale); }
  static Bits threshold(float scale) { return halve_to_threshold(scale); }

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

// The 16-bit types read two elements per 32-bit word: even lanes from the low halves, odd lanes
// from the high ones. Adding the two halves then is the first level of the tree, without shuffles.
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
  static Bits round_scale(float scale) { return round_to_bfloat16(scale); }
  static Bits threshold(float scale) { return static_cast<Bits>(halve_to_threshold(scale) >> 16); }
  static VecF decode_low_abs(VecU32 words) { return (VecF)((words << 16) & 0x7fffffffu); }
  static VecF decode_high_abs(VecU32 words) { return (VecF)(words & 0x7fff0000u); }
};

struct Float16 {
  using Bits = uint16_t;
  using Vec = VecS16;
  using Sum = Sum16<Float16>;
  static constexpr Bits kSign = 0x8000u, kInf = 0x7c00u, kNaN = 0x7e00u;
  static Bits round_scale(float scale) { return round_to_float16(scale); }
  static Bits threshold(float scale) {
    return truncate_to_float16(bits_to_float(halve_to_threshold(scale)));
  }
  static VecF decode_low_abs(VecU32 words) { return decode(words & 0x7fffu); }
  static VecF decode_high_abs(VecU32 words) { return decode((words >> 16) & 0x7fffu); }
  // Exact also when the caller flushes subnormals: those are converted as integers.
  static VecF decode(VecU32 half) {
    const VecS32 bits = (VecS32)half;
    VecS32 normal = (bits << 13) + (112 << 23);
    normal |= (bits >= 0x7c00) & static_cast<int32_t>(kFloat32Inf);
    const VecF subnormal = __builtin_convertvector(bits, VecF) * 0x1p-24f;
    const VecS32 small = bits < 0x400;
    return (VecF)((small & (VecS32)subnormal) | (~small & normal));
  }
};

template <class Type>
inline float sum_abs(const typename Type::Bits* w, int64_t group_len) {
  typename Type::Sum sum;
  int64_t i = 0;
  for (; i + kLanes <= group_len; i += kLanes) sum.add_block(w + i);
  if (i < group_len) {
    typename Type::Bits last[kLanes] = {};  // a missing element adds 0
    std::memcpy(last, w + i, static_cast<size_t>(group_len - i) * sizeof *w);
    sum.add_block(last);
  }
  return sum.reduce();
}

// NaN unless the sum is finite: comparisons would drop it, and a diverging run must be seen.
inline float scale_from_sum(float sum, float one_over_n, float eps) {
  if (!is_finite(sum)) return bits_to_float(kFloat32NaN);
  const float mean = sum * one_over_n;
  return mean < eps ? eps : mean;
}

inline float invert_length(int64_t group_len) {
  return static_cast<float>(1.0 / static_cast<double>(group_len));
}

// ---- codes ------------------------------------------------------------------------------------

// Bit patterns that decide a group: |w| > threshold takes the level, with the sign of w.
template <class Type>
struct Levels {
  using Bits = typename Type::Bits;
  Bits threshold, level;
  explicit Levels(float scale)
      : threshold(Type::threshold(scale)), level(Type::round_scale(scale)) {}
};

template <class Type>
inline void fill_nan(typename Type::Bits* wq, int64_t group_len) {
  for (int64_t i = 0; i < group_len; ++i) wq[i] = Type::kNaN;
}

// CheckElements: a scale that was handed in says nothing about the elements, so look at each.
template <class Type, bool CheckElements>
inline void write_levels(const typename Type::Bits* w, typename Type::Bits* wq, int64_t group_len,
                         float scale) {
  using Bits = typename Type::Bits;
  using Vec = typename Type::Vec;
  constexpr int kStep = kVectorBytes / sizeof(Bits);
  const Levels<Type> levels(scale);
  const Vec magnitude = Vec{} + static_cast<Bits>(~Type::kSign), sign = ~magnitude;
  const Vec threshold = Vec{} + levels.threshold, level = Vec{} + levels.level;
  const Vec infinity = Vec{} + Type::kInf, nan = Vec{} + Type::kNaN;
  const auto quantize_vector = [&](Vec x) {
    const Vec absolute = x & magnitude;
    Vec result = (absolute > threshold) & (level | (x & sign));
    if (CheckElements) {
      const Vec bad = absolute >= infinity;
      result = (bad & nan) | (~bad & result);
    }
    return result;
  };
  int64_t i = 0;
  for (; i + kStep <= group_len; i += kStep) {
    const Vec result = quantize_vector(load<Vec>(w + i));
    std::memcpy(wq + i, &result, sizeof result);
  }
  if (i < group_len) {
    const size_t bytes = static_cast<size_t>(group_len - i) * sizeof(Bits);
    Vec last = {};
    std::memcpy(&last, w + i, bytes);
    last = quantize_vector(last);
    std::memcpy(wq + i, &last, bytes);
  }
}

template <class Type>
inline void write_codes(const typename Type::Bits* w, int8_t* codes, int64_t group_len,
                        float scale) {
  using Bits = typename Type::Bits;
  const Bits threshold = Levels<Type>(scale).threshold;
  for (int64_t i = 0; i < group_len; ++i) {
    const Bits absolute = w[i] & static_cast<Bits>(~Type::kSign);
    const int8_t sign = static_cast<int8_t>(w[i] >= Type::kSign ? -1 : 1);
    codes[i] = absolute > threshold ? sign : int8_t{0};
  }
}

// ---- one function per operator and type -------------------------------------------------------

template <class Type>
struct Operators {
  using Bits = typename Type::Bits;

  static void fake_quantize(const Bits* w, Bits* wq, int64_t num_groups, int64_t group_len,
                            float eps) {
    const float one_over_n = invert_length(group_len);
    for (int64_t g = 0; g < num_groups; ++g, w += group_len, wq += group_len) {
      const float scale = scale_from_sum(sum_abs<Type>(w, group_len), one_over_n, eps);
      if (is_finite(scale))
        write_levels<Type, false>(w, wq, group_len, scale);
      else
        fill_nan<Type>(wq, group_len);
    }
  }

  static void quantize(const Bits* w, int8_t* codes, float* scales, int64_t num_groups,
                       int64_t group_len, float eps) {
    const float one_over_n = invert_length(group_len);
    for (int64_t g = 0; g < num_groups; ++g, w += group_len, codes += group_len) {
      scales[g] = scale_from_sum(sum_abs<Type>(w, group_len), one_over_n, eps);
      if (is_finite(scales[g]))
        write_codes<Type>(w, codes, group_len, scales[g]);
      else
        std::memset(codes, 0, static_cast<size_t>(group_len));
    }
  }

  static void abs_sums(const Bits* w, float* sums, int64_t num_groups, int64_t group_len) {
    for (int64_t g = 0; g < num_groups; ++g, w += group_len) {
      const float sum = sum_abs<Type>(w, group_len);
      // Processors differ in the payload bits of NaN; here there is one NaN.
      sums[g] = sum == sum ? sum : bits_to_float(kFloat32NaN);
    }
  }

  static void fake_quantize_with_scales(const Bits* w, const float* scales, Bits* wq,
                                        int64_t num_groups, int64_t group_len) {
    for (int64_t g = 0; g < num_groups; ++g, w += group_len, wq += group_len) {
      if (is_finite(scales[g]) && scales[g] > 0)
        write_levels<Type, true>(w, wq, group_len, scales[g]);
      else
        fill_nan<Type>(wq, group_len);
    }
  }
};

// Call `body` with the Operators of a type; the only place that lists the types.
template <class Body>
inline void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32: return body(Operators<Float32>{});
    case DType::kBFloat16: return body(Operators<BFloat16>{});
    case DType::kFloat16: return body(Operators<Float16>{});
  }
}

void fake_quantize(DType dtype, const void* w, void* wq, int64_t num_groups, int64_t group_len,
                   float eps) {
  with_type(dtype, [&](auto ops) {
    using Bits = typename decltype(ops)::Bits;
    ops.fake_quantize(static_cast<const Bits*>(w), static_cast<Bits*>(wq), num_groups, group_len,
                      eps);
  });
}

void quantize(DType dtype, const void* w, int8_t* codes, float* scales, int64_t num_groups,
              int64_t group_len, float eps) {
  with_type(dtype, [&](auto ops) {
    using Bits = typename decltype(ops)::Bits;
    ops.quantize(static_cast<const Bits*>(w), codes, scales, num_groups, group_len, eps);
  });
}

void abs_sums(DType dtype, const void* w, float* sums, int64_t num_groups, int64_t group_len) {
  with_type(dtype, [&](auto ops) {
    using Bits = typename decltype(ops)::Bits;
    ops.abs_sums(static_cast<const Bits*>(w), sums, num_groups, group_len);
  });
}

void fake_quantize_with_scales(DType dtype, const void* w, const float* scales, void* wq,
                               int64_t num_groups, int64_t group_len) {
  with_type(dtype, [&](auto ops) {
    using Bits = typename decltype(ops)::Bits;
    ops.fake_quantize_with_scales(static_cast<const Bits*>(w), scales, static_cast<Bits*>(wq),
                                  num_groups, group_len);
  });
}

}  // namespace

Kernels BITCPM_GET_KERNELS() {
  return {fake_quantize, quantize, abs_sums, fake_quantize_with_scales};
}

}  // namespace bitcpm
