// What a group is reduced to: the canonical sum of its magnitudes, or the largest of them.
#pragma once

#include "formats.h"

namespace bitcpm {
namespace {

template <class Type>
BITCPM_INLINE float sum_abs(const typename Type::Bits* w, int64_t group_len) {
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

// Bits of the largest magnitude. Non-negative floats order as integers, with the infinity and then
// the NaNs on top, so nothing is lost: the result is at least kInf where an element is not finite.
template <class Type>
BITCPM_INLINE typename Type::Bits max_abs(const typename Type::Bits* w, int64_t group_len) {
  using Bits = typename Type::Bits;
  using Vec = typename Type::Vec;
  constexpr int kStep = kVectorBytes / sizeof(Bits);
  constexpr int kUnroll = 4;  // independent maxima hide the latency
  const Vec magnitude = ~broadcast<Vec>(Type::kSign);
  const auto keep_larger = [&](Vec& largest, Vec x) {
    const Vec absolute = x & magnitude;
    largest = absolute > largest ? absolute : largest;
  };
  Vec largest[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kStep <= group_len; i += kUnroll * kStep)
    for (int k = 0; k < kUnroll; ++k) keep_larger(largest[k], load<Vec>(w + i + k * kStep));
  for (; i + kStep <= group_len; i += kStep) keep_larger(largest[0], load<Vec>(w + i));
  if (i < group_len) {
    Vec last = {};
    std::memcpy(&last, w + i, static_cast<size_t>(group_len - i) * sizeof *w);
    keep_larger(largest[1], last);
  }
  for (int k = 1; k < kUnroll; ++k) keep_larger(largest[0], largest[k]);
  Bits lanes[kStep];
  store(lanes, largest[0]);
  for (int count = kStep / 2; count > 0; count /= 2)
    for (int k = 0; k < count; ++k)
      if (lanes[k] < lanes[k + count]) lanes[k] = lanes[k + count];
  return lanes[0];
}

template <class Bits>
inline void fill(Bits* to, Bits value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

}  // namespace
}  // namespace bitcpm
