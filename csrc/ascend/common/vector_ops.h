// Vector instructions over groups, split to the limits of the hardware: 255 repeats per call,
// strides of 8 bits in 32-byte data blocks, and masks.
#pragma once

#include "kernel_operator.h"

namespace bitcpm::ascend {

using AscendC::LocalTensor;

constexpr uint32_t kMaxRepeats = 255;
constexpr uint32_t kMaxStride = 255;      // data blocks
constexpr uint32_t kBlockBytes = 32;
constexpr uint32_t kBlocksPerRepeat = 8;  // a repeat is 256 bytes
constexpr uint32_t kSumLanes = 64;        // float32 lanes of a repeat, and of the canonical sum
constexpr uint32_t kBlockFloats = kSumLanes / kBlocksPerRepeat;  // floats in a data block

__aicore__ inline uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }
__aicore__ inline uint32_t blocks_up(uint32_t number, uint32_t by) {
  return (number + by - 1) / by;
}

// Repeats and strides are 8 bits wide, numbers of copied rows 16; the host check sees one that does
// not fit.
template <class To>
__aicore__ inline To narrow_to(uint32_t number) {
#ifdef BITCPM_HOST_CHECK
  return host_check::checked_narrow<To>(number);
#else
  return static_cast<To>(number);
#endif
}
__aicore__ inline uint8_t to_uint8(uint32_t number) { return narrow_to<uint8_t>(number); }
__aicore__ inline uint16_t to_uint16(uint32_t number) { return narrow_to<uint16_t>(number); }

// The next vector call reads what the last one wrote.
__aicore__ inline void then() { AscendC::PipeBarrier<PIPE_V>(); }

template <class To, class From>
__aicore__ inline LocalTensor<To> view(const LocalTensor<From>& tensor) {
  return tensor.template ReinterpretCast<To>();
}

__aicore__ inline LocalTensor<int16_t> words(const LocalTensor<int16_t>& tensor) { return tensor; }

template <class T>
__aicore__ inline LocalTensor<int16_t> words(const LocalTensor<T>& tensor) {
  return view<int16_t>(tensor);
}

// Strides of one call, in data blocks: within a repeat and from repeat to repeat, of the elements
// and of the groups' blocks.
struct GroupStrides {
  uint8_t data_block, data_repeat, group_block, group_repeat;
};

// dst = src op group, and dst = group - src: how a group's word meets its elements.
struct AndGroup {
  template <class T>
  static __aicore__ inline void run(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                                    const LocalTensor<T>& group, uint64_t mask, uint8_t repeats,
                                    const GroupStrides& by) {
    AscendC::And(dst, src, group, mask, repeats,
                 AscendC::BinaryRepeatParams(by.data_block, by.data_block, by.group_block,
                                             by.data_repeat, by.data_repeat, by.group_repeat));
  }
};

struct OrGroup {
  template <class T>
  static __aicore__ inline void run(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                                    const LocalTensor<T>& group, uint64_t mask, uint8_t repeats,
                                    const GroupStrides& by) {
    AscendC::Or(dst, src, group, mask, repeats,
                AscendC::BinaryRepeatParams(by.data_block, by.data_block, by.group_block,
                                            by.data_repeat, by.data_repeat, by.group_repeat));
  }
};

struct SubtractFromGroup {
  template <class T>
  static __aicore__ inline void run(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                                    const LocalTensor<T>& group, uint64_t mask, uint8_t repeats,
                                    const GroupStrides& by) {
    AscendC::Sub(dst, group, src, mask, repeats,
                 AscendC::BinaryRepeatParams(by.data_block, by.group_block, by.data_block,
                                             by.data_repeat, by.group_repeat, by.data_repeat));
  }
};

// Groups of up to so many data blocks are woven: a repeat takes one block of each of eight groups.
// From four blocks on, the eight would share bank groups of the unified buffer, and nothing is won.
constexpr uint32_t kMaxWovenBlocks = 3;

// `combine` for short groups: eight groups in a repeat, one of their data blocks at a time.
template <class Op, class T>
__aicore__ inline void combine_woven(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                                     const LocalTensor<T>& broadcast, uint32_t groups,
                                     uint32_t group_blocks) {
  constexpr uint32_t kElements = kBlockBytes / sizeof(T);  // of a data block
  const uint32_t full = groups / kBlocksPerRepeat, rest = groups % kBlocksPerRepeat;
  const GroupStrides by{to_uint8(group_blocks), to_uint8(group_blocks * kBlocksPerRepeat), 1,
                        to_uint8(kBlocksPerRepeat)};
  for (uint32_t b = 0; b < group_blocks; ++b) {
    for (uint32_t r = 0; r < full; r += kMaxRepeats) {
      const uint32_t group = r * kBlocksPerRepeat, at = (group * group_blocks + b) * kElements;
      Op::run(dst[at], src[at], broadcast[group * kElements], kBlocksPerRepeat * kElements,
              to_uint8(least(kMaxRepeats, full - r)), by);
    }
    if (rest) {
      const uint32_t group = full * kBlocksPerRepeat, at = (group * group_blocks + b) * kElements;
      Op::run(dst[at], src[at], broadcast[group * kElements], rest * kElements, to_uint8(1), by);
    }
  }
}

// Combine each of `groups` groups, `group_blocks` data blocks long and one behind the other, with
// its own data block of `broadcast` (all of whose elements are the group's word). dst may be src.
// Walks across the groups or along each one, whichever takes fewer instructions.
template <class Op, class T>
__aicore__ inline void combine(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                               const LocalTensor<T>& broadcast, uint32_t groups,
                               uint32_t group_blocks) {
  constexpr uint32_t kElements = kBlockBytes / sizeof(T);  // of a data block
  if (group_blocks <= kMaxWovenBlocks && groups >= kBlocksPerRepeat) {
    combine_woven<Op>(dst, src, broadcast, groups, group_blocks);
    return;
  }
  const uint32_t across =
      blocks_up(group_blocks, kBlocksPerRepeat) * blocks_up(groups, kMaxRepeats);
  const uint32_t full = group_blocks / kBlocksPerRepeat, rest = group_blocks % kBlocksPerRepeat;
  const uint32_t along = groups * (blocks_up(full, kMaxRepeats) + (rest ? 1 : 0));
  if (group_blocks <= kMaxStride && across <= along) {
    const GroupStrides by{1, to_uint8(group_blocks), 0, 1};
    for (uint32_t g = 0; g < groups; g += kMaxRepeats) {
      const uint8_t repeats = to_uint8(least(kMaxRepeats, groups - g));
      for (uint32_t b = 0; b < group_blocks; b += kBlocksPerRepeat) {
        const uint32_t at = (g * group_blocks + b) * kElements;
        Op::run(dst[at], src[at], broadcast[g * kElements],
                least(kBlocksPerRepeat, group_blocks - b) * kElements, repeats, by);
      }
    }
    return;
  }
  const GroupStrides by{1, to_uint8(kBlocksPerRepeat), 0, 0};
  for (uint32_t g = 0; g < groups; ++g) {
    const uint32_t start = g * group_blocks * kElements;
    for (uint32_t r = 0; r < full; r += kMaxRepeats) {
      const uint32_t at = start + r * kBlocksPerRepeat * kElements;
      Op::run(dst[at], src[at], broadcast[g * kElements], kBlocksPerRepeat * kElements,
              to_uint8(least(kMaxRepeats, full - r)), by);
    }
    if (rest) {
      const uint32_t at = start + full * kBlocksPerRepeat * kElements;
      Op::run(dst[at], src[at], broadcast[g * kElements], rest * kElements, to_uint8(1), by);
    }
  }
}

// For each of `groups` groups, `stride` floats apart: lanes[j] += from[j], from[j + 64], ..., over
// `count` floats, a multiple of 8. The sums of one repeat are the second source of the next: Add
// supports that overlap where that source does not move from repeat to repeat.
__aicore__ inline void add_to_lanes(const LocalTensor<float>& lanes, const LocalTensor<float>& from,
                                    uint32_t count, uint32_t groups, uint32_t stride) {
  const uint32_t full = count / kSumLanes, rest = count % kSumLanes;
  const AscendC::BinaryRepeatParams strides(1, 1, 1, 0, kBlocksPerRepeat, 0);
  for (uint32_t r = 0; r < full; r += kMaxRepeats) {
    const uint8_t repeats = to_uint8(least(kMaxRepeats, full - r));
    for (uint32_t g = 0; g < groups; ++g)
      AscendC::Add(lanes[g * stride], from[g * stride + r * kSumLanes], lanes[g * stride],
                   static_cast<uint64_t>(kSumLanes), repeats, strides);
    then();
  }
  if (rest) {
    for (uint32_t g = 0; g < groups; ++g)
      AscendC::Add(lanes[g * stride], from[g * stride + full * kSumLanes], lanes[g * stride],
                   static_cast<uint64_t>(rest), to_uint8(1), strides);
    then();
  }
}

// In each of `repeats` repeats of `lanes` lanes, the sum of each data block by an adjacent-pair tree:
// eight sums a repeat. `step` is in data blocks. CANN 8.5.0 to 9.0.1 know the instruction as
// BlockReduceSum only; 9.1 calls it ReduceDataBlock, mask before repeats, and keeps the old name.
__aicore__ inline void sum_blocks(const LocalTensor<float>& sums, const LocalTensor<float>& from,
                                  uint32_t lanes, uint32_t repeats, uint32_t step) {
  AscendC::BlockReduceSum(sums, from, static_cast<int32_t>(repeats), static_cast<int32_t>(lanes), 1,
                          1, static_cast<int32_t>(step));
}

// One adjacent-pair tree over the first `lanes` floats of each group: first within data blocks,
// then over a group's eight results, two instructions at full rate. `partial` has eight floats per
// group, zeros wherever a group has no lanes. Results beyond the last group stay as they are.
__aicore__ inline void reduce_lanes(const LocalTensor<float>& sums,
                                    const LocalTensor<float>& partial,
                                    const LocalTensor<float>& from, uint32_t lanes, uint32_t groups,
                                    uint32_t stride) {
  for (uint32_t g = 0; g < groups; g += kMaxRepeats)
    sum_blocks(partial[g * kBlockFloats], from[g * stride], lanes, least(kMaxRepeats, groups - g),
               stride / kBlockFloats);
  then();
  const uint32_t full = groups / kBlocksPerRepeat, rest = groups % kBlocksPerRepeat;
  for (uint32_t r = 0; r < full; r += kMaxRepeats)
    sum_blocks(sums[r * kBlocksPerRepeat], partial[r * kSumLanes], kSumLanes,
               least(kMaxRepeats, full - r), kBlocksPerRepeat);
  if (rest)
    sum_blocks(sums[full * kBlocksPerRepeat], partial[full * kSumLanes], rest * kBlockFloats, 1,
               kBlocksPerRepeat);
  then();
}

// The canonical sum of each of `groups` groups of `stride` floats (a multiple of 8); destroys the
// first 64 floats of each.
__aicore__ inline void sum_groups(const LocalTensor<float>& sums, const LocalTensor<float>& partial,
                                  const LocalTensor<float>& from, uint32_t groups,
                                  uint32_t stride) {
  if (stride <= kSumLanes) {
    reduce_lanes(sums, partial, from, stride, groups, stride);
    return;
  }
  const uint32_t stride_blocks = stride / kBlockFloats;
  const uint32_t across = (blocks_up(stride, kSumLanes) - 1) * blocks_up(groups, kMaxRepeats);
  const uint32_t along = groups * blocks_up(stride, kSumLanes * kMaxRepeats);
  if (stride_blocks <= kMaxStride && across <= along) {
    const uint8_t step = to_uint8(stride_blocks);
    for (uint32_t at = kSumLanes; at < stride; at += kSumLanes) {
      const uint64_t lanes = least(kSumLanes, stride - at);
      for (uint32_t g = 0; g < groups; g += kMaxRepeats) {
        const LocalTensor<float> first = from[g * stride];
        AscendC::Add(first, first, from[g * stride + at], lanes,
                     to_uint8(least(kMaxRepeats, groups - g)),
                     AscendC::BinaryRepeatParams(1, 1, 1, step, step, step));
      }
      then();
    }
  } else {
    add_to_lanes(from, from[kSumLanes], stride - kSumLanes, groups, stride);
  }
  reduce_lanes(sums, partial, from, kSumLanes, groups, stride);
}

}  // namespace bitcpm::ascend
