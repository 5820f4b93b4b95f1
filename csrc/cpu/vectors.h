// Vectors of the width the instruction set has, and the few operations that need a name.
//
// Included by kernels.cpp only, once per instruction set: everything has internal linkage, lest the
// linker keep one set's code for all.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/float_bits.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "The 16-bit formats read two elements from one little-endian 32-bit word."
#endif

namespace bitcpm {
namespace {

// For what runs once per group: a group may be as short as two vectors.
#define BITCPM_INLINE inline __attribute__((always_inline))

#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON; scalar code where there is neither
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

template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// The value in every lane, as a number of the lane's type.
template <class V, class T>
inline V broadcast(T value) {
  V v = {};
  return v + static_cast<std::decay_t<decltype(v[0])>>(value);
}

// `yes` where the mask is all ones, `no` where it is 0.
template <class V>
inline V select(V mask, V yes, V no) {
  return (mask & yes) | (~mask & no);
}

// GCC has __builtin_shufflevector from version 12 on, and __builtin_shuffle always.
#if defined(__clang__) || __GNUC__ >= 12
#define BITCPM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define BITCPM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecS32{__VA_ARGS__})
#endif

// {a0 + a1, a2 + a3, ..., b0 + b1, ...}: one level of the adjacent-pair tree.
inline VecF add_pairs(VecF a, VecF b) {
#if defined(__AVX512BW__)
  return BITCPM_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         BITCPM_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  return BITCPM_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         BITCPM_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return BITCPM_SHUFFLE(a, b, 0, 2, 4, 6) + BITCPM_SHUFFLE(a, b, 1, 3, 5, 7);
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

}  // namespace
}  // namespace bitcpm
