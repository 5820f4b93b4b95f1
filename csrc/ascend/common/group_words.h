// What a group contributes to each of its elements, computed for many groups at once.
//
// With h the largest number for which 2h <= s, an element takes the level s where its magnitude
// exceeds h: a comparison of bit patterns as integers, in the width of the type. A group whose
// scale is not usable selects every element, has no sign, and its level is the canonical NaN. So
// the elements need neither floating-point arithmetic nor a test for bad groups. Nothing depends
// on what maximum instructions do with NaN: whether a number is finite is read off its bits.
#pragma once

#include "formats.h"
#include "vector_ops.h"

namespace bitcpm::ascend {

// 32-bit vectors with an entry per group, and the data blocks broadcast from them.
template <class Format>
class GroupWords {
  using Word = typename Format::Word;

 public:
  static constexpr uint32_t kVectors = 6;

  __aicore__ inline GroupWords() {}

  // `groups` of a tile at most; the scratch has space for kVectors 32-bit vectors, three more
  // vectors of words, and four data blocks per group, in this order, all padded to 16 groups.
  __aicore__ inline void Init(const LocalTensor<float>& scratch, uint32_t groups) {
    const uint32_t padded = blocks_up(groups, 16) * 16;
    sums_ = scratch;
    scales_ = scratch[padded];
    good_ = view<int32_t>(scratch[padded * 2]);
    bad_ = view<int32_t>(scratch[padded * 3]);
    half_ = view<int32_t>(scratch[padded * 4]);
    temp_ = view<int32_t>(scratch[padded * 5]);
    const LocalTensor<Word> rest = view<Word>(scratch[padded * kVectors]);
    threshold_ = rest;
    level_ = rest[padded];
    good_word_ = rest[padded * 2];
    bad_word_ = rest[padded * 3];
    temp_word_ = rest[padded * 4];
    const LocalTensor<Word> blocks = rest[padded * 5];
    const uint32_t size = padded * (kBlockBytes / sizeof(Word));
    threshold_blocks = blocks;
    level_blocks = blocks[size];
    sign_blocks = blocks[size * 2];
    good_blocks = blocks[size * 3];
    // Entries between the last group and the end of a vector are computed with, and never used.
    AscendC::Duplicate(sums_, 0.0f, static_cast<int32_t>(padded));
    then();
  }

  __aicore__ inline LocalTensor<float> sums() const { return sums_; }

  // scales = max(sums / n, eps), NaN where a sum is not finite, then the words of each group.
  __aicore__ inline void FromSums(uint32_t groups, float one_over_n, float eps) {
    const int32_t count = Count(groups);
    const LocalTensor<uint32_t> bits = view<uint32_t>(sums_), temp = view<uint32_t>(temp_);
    AscendC::ShiftLeft(temp, bits, static_cast<uint32_t>(1), count);  // away with the sign of a NaN
    AscendC::Muls(scales_, sums_, one_over_n, count);
    then();
    AscendC::ShiftRight(temp, temp, static_cast<uint32_t>(1), count);
    AscendC::Maxs(scales_, scales_, eps, count);
    then();
    AscendC::Adds(temp_, temp_, -kInfBits, count);
    then();
    AscendC::ShiftRight(good_, temp_, static_cast<int32_t>(31), count);
    then();
    Finish(count);
  }

  // The words of groups whose scales are given; usable are those that are positive and finite.
  __aicore__ inline void FromScales(const LocalTensor<float>& scales, uint32_t groups) {
    const int32_t count = Count(groups);
    AscendC::Maxs(half_, view<int32_t>(scales), static_cast<int32_t>(0), count);  // negative: 0
    AscendC::Or(words(scales_), words(scales), words(scales), 2 * count);  // a copy
    then();
    AscendC::Adds(good_, half_, -kInfBits, count);
    AscendC::Adds(bad_, half_, static_cast<int32_t>(-1), count);
    then();
    AscendC::ShiftRight(good_, good_, static_cast<int32_t>(31), count);  // below infinity
    AscendC::ShiftRight(bad_, bad_, static_cast<int32_t>(31), count);    // zero
    then();
    AscendC::Not(words(bad_), words(bad_), 2 * count);
    then();
    AscendC::And(words(good_), words(good_), words(bad_), 2 * count);
    then();
    Finish(count);
  }

  // The scales of FromSums as they leave: the canonical NaN for bad groups.
  __aicore__ inline void WriteScales(const LocalTensor<float>& dst, uint32_t groups) {
    const int32_t count = Count(groups);
    const LocalTensor<uint32_t> temp = view<uint32_t>(temp_);
    AscendC::ShiftRight(temp, view<uint32_t>(bad_), static_cast<uint32_t>(23), count);
    then();
    AscendC::ShiftLeft(temp, temp, static_cast<uint32_t>(22), count);
    then();
    AscendC::Or(words(dst), words(scales_), words(temp_), 2 * count);
  }

  // One data block per group, full of: the threshold; the level; the sign bit, which a bad group
  // does not have; ones, or zeros in a bad group.
  LocalTensor<Word> threshold_blocks, level_blocks, sign_blocks, good_blocks;

 private:
  static __aicore__ inline int32_t Count(uint32_t groups) {
    return static_cast<int32_t>(blocks_up(groups, 8) * 8);
  }

  // From scales_ and good_ (ones where a scale is usable, else zeros) to the data blocks.
  __aicore__ inline void Finish(int32_t count) {
    AscendC::Not(words(bad_), words(good_), 2 * count);
    AscendC::And(words(scales_), words(scales_), words(good_), 2 * count);  // 0 where bad
    then();
    // Bits of the largest h with 2h <= s: one less in the exponent, or shifted where h is
    // subnormal. The larger of the two is the right one throughout.
    const LocalTensor<int32_t> bits = view<int32_t>(scales_);
    AscendC::Adds(half_, bits, static_cast<int32_t>(-(1 << 23)), count);
    AscendC::ShiftRight(temp_, bits, static_cast<int32_t>(1), count);
    then();
    AscendC::Max(half_, half_, temp_, count);
    then();
    if constexpr (Format::kIs16Bit)
      Narrow(count);
    else
      Keep(count);
    const uint8_t repeats = to_uint8(static_cast<uint32_t>(count) / 8);
    const AscendC::BrcbRepeatParams dense(1, 8);
    AscendC::Brcb(threshold_blocks, threshold_, repeats, dense);
    AscendC::Brcb(level_blocks, level_, repeats, dense);
    AscendC::Brcb(sign_blocks, temp_word_, repeats, dense);
    AscendC::Brcb(good_blocks, good_word_, repeats, dense);
    then();
  }

  __aicore__ inline void Narrow(int32_t count) {
    using Native = typename Format::Native;
    const uint32_t size = static_cast<uint32_t>(count);
    // A threshold beyond the type's range may become its largest number or infinity: no finite
    // magnitude exceeds either.
    AscendC::Cast(view<Native>(threshold_), view<float>(half_), AscendC::RoundMode::CAST_TRUNC,
                  size);
    AscendC::Cast(view<Native>(level_), scales_, AscendC::RoundMode::CAST_RINT, size);
    AscendC::Cast(good_word_, good_, AscendC::RoundMode::CAST_NONE, size);
    AscendC::Cast(bad_word_, bad_, AscendC::RoundMode::CAST_NONE, size);
    AscendC::Adds(temp_, view<int32_t>(scales_), -Format::kOverflow, count);
    then();
    // A cast saturates or not, as bit CTRL[48] of the core stands, which not every CANN lets a kernel
    // set. So where the level overflows, infinity is put in: the larger word.
    const LocalTensor<uint16_t> temp = view<uint16_t>(temp_word_);
    AscendC::ShiftRight(temp_, temp_, static_cast<int32_t>(31), count);  // ones below overflow
    then();
    AscendC::Not(words(temp_), words(temp_), 2 * count);
    then();
    AscendC::Cast(temp_word_, temp_, AscendC::RoundMode::CAST_NONE, size);
    then();
    AscendC::ShiftRight(temp, temp, static_cast<uint16_t>(Format::kInfRight), count);
    then();
    AscendC::ShiftLeft(temp, temp, static_cast<uint16_t>(Format::kInfLeft), count);
    then();
    AscendC::Max(level_, level_, temp_word_, count);
    then();
    AscendC::Or(threshold_, threshold_, bad_word_, count);
    AscendC::ShiftRight(temp, view<uint16_t>(bad_word_),
                        static_cast<uint16_t>(Format::kNaNRight), count);
    then();
    AscendC::ShiftLeft(temp, temp, static_cast<uint16_t>(Format::kNaNLeft), count);
    then();
    AscendC::Or(level_, level_, temp_word_, count);
    then();
    AscendC::ShiftLeft(temp, view<uint16_t>(good_word_), static_cast<uint16_t>(15), count);
    then();
  }

  __aicore__ inline void Keep(int32_t count) {
    const LocalTensor<uint32_t> temp = view<uint32_t>(temp_word_);
    AscendC::Or(words(threshold_), words(half_), words(bad_), 2 * count);
    AscendC::ShiftRight(temp, view<uint32_t>(bad_), static_cast<uint32_t>(23), count);
    then();
    AscendC::ShiftLeft(temp, temp, static_cast<uint32_t>(22), count);
    then();
    AscendC::Or(words(level_), words(scales_), words(temp_word_), 2 * count);
    AscendC::Or(words(good_word_), words(good_), words(good_), 2 * count);
    then();
    AscendC::ShiftLeft(temp, view<uint32_t>(good_), static_cast<uint32_t>(31), count);
    then();
  }

  LocalTensor<float> sums_, scales_;
  LocalTensor<int32_t> good_, bad_, half_, temp_;
  LocalTensor<Word> threshold_, level_, good_word_, bad_word_, temp_word_;
};

}  // namespace bitcpm::ascend
