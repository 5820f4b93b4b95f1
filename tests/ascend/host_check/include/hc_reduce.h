// WholeReduceSum, BlockReduceSum, PairReduceSum.
// A sum is a tree of adjacent pairs; masked lanes take no part, and BlockReduceSum leaves the result
// of a wholly masked block as it was.
// Facts: ReduceRepeat.md, ReduceDataBlock.md, ReducePairElem.md and kernel_operator_vec_reduce.
#pragma once

#include "hc_vector.h"

namespace host_check {

// Adjacent-pair tree. `active[i]` false: the lane contributes nothing.
template <typename T>
inline bool tree_sum(const T* values, const bool* active, uint32_t n, T* result) {
  T level[128];
  bool used[128];
  for (uint32_t i = 0; i < n; ++i) {
    level[i] = values[i];
    used[i] = active[i];
  }
  const AddOp add{};
  for (uint32_t width = n; width > 1; width /= 2) {
    for (uint32_t i = 0; i < width / 2; ++i) {
      const bool left = used[2 * i];
      const bool right = used[2 * i + 1];
      if (left && right) {
        level[i] = add(level[2 * i], level[2 * i + 1]);
      } else {
        level[i] = left ? level[2 * i] : level[2 * i + 1];
      }
      used[i] = left || right;
    }
  }
  *result = level[0];
  return used[0];
}

// Every repeat reads `lanes` lanes in `pieces` runs; each run gives one value.
template <typename T>
inline void reduce_sum(const char* what, const AscendC::LocalTensor<T>& dst,
                       const AscendC::LocalTensor<T>& src, const Shape& shape, uint32_t pieces,
                       uint64_t dst_repeat_bytes, uint32_t dst_align, uint32_t cycles,
                       uint32_t src_block, uint32_t src_repeat) {
  static_assert(is_float_type<T>, "unsupported-type: sums take half, float");
  if (shape.repeats == 0) return;
  Core& now = core();
  now.next_instruction();
  count_instruction(shape.repeats, cycles);
  if (dst_repeat_bytes == 0 && shape.repeats > 1) {
    fail("zero-dst-stride", "%s: dstRepStride is 0 with %u repeats", what, shape.repeats);
  }
  Operand s = operand("src", src, src_block, src_repeat);
  prepare(s, shape, what);
  const uint32_t width = shape.lanes / pieces;
  const auto active_piece = [&](uint32_t piece) {
    for (uint32_t l = 0; l < width; ++l) {
      if (shape.mask.has(piece * width + l)) return true;
    }
    return false;
  };
  uint32_t reach = 0;
  for (uint32_t piece = 0; piece < pieces; ++piece) {
    if (active_piece(piece)) reach = piece + 1;
  }
  const Run whole = run_of(dst.view(),
                           (shape.repeats - 1) * dst_repeat_bytes + uint64_t{reach} * sizeof(T),
                           dst_align, "dst", what);
  if (dst.view().buffer == src.view().buffer) {
    const Run read{s.first_block * kBlock, (last_block(s, shape) + 1) * kBlock};
    check_apart(whole, read, what);
  }
  each_block(s, shape, [&](uint32_t i, uint32_t bytes) { now.check_read(PIPE_V, i, bytes, what); });
  const auto result_run = [&](uint32_t repeat, uint32_t piece) {
    const uint32_t at = whole.begin + static_cast<uint32_t>(repeat * dst_repeat_bytes) +
                        piece * static_cast<uint32_t>(sizeof(T));
    return Run{at, at + static_cast<uint32_t>(sizeof(T))};
  };
  for (uint32_t r = 0; r < shape.repeats; ++r) {
    for (uint32_t piece = 0; piece < pieces; ++piece) {
      if (active_piece(piece)) check_write(PIPE_V, result_run(r, piece), what);
    }
  }
  each_block(s, shape, [&](uint32_t i, uint32_t bytes) { now.note_read(PIPE_V, i, bytes); });
  T values[128];
  bool active[128];
  for (uint32_t l = 0; l < shape.lanes; ++l) active[l] = shape.mask.has(l);
  for (uint32_t r = 0; r < shape.repeats; ++r) {
    for (uint32_t l = 0; l < shape.lanes; ++l) {
      if (active[l]) {
        std::memcpy(static_cast<void*>(&values[l]), now.ub + s.address(r, l), sizeof(T));
      }
    }
    for (uint32_t piece = 0; piece < pieces; ++piece) {
      T sum;
      if (!tree_sum(values + piece * width, active + piece * width, width, &sum)) continue;
      const Run out = result_run(r, piece);
      note_write(PIPE_V, out);
      std::memcpy(now.ub + out.begin, static_cast<const void*>(&sum), sizeof(T));
    }
  }
}

inline uint32_t stride16(int32_t stride, const char* what) {
  if (stride < 0 || stride > 65535) {
    fail("stride-range", "%s: stride %d, must be 0..65535", what, stride);
  }
  return static_cast<uint32_t>(stride);
}

template <typename T>
inline Shape reduce_shape(int32_t mask, RepeatTime repeats, const char* what) {
  return shape_of<T>(mask < 0 ? UINT64_MAX : static_cast<uint64_t>(mask), repeats, what);
}

template <typename T>
inline void whole_reduce_sum(const AscendC::LocalTensor<T>& dst,
                             const AscendC::LocalTensor<T>& src, const Shape& shape,
                             int32_t dst_stride, int32_t src_block, int32_t src_repeat) {
  const char* what = "WholeReduceSum";
  reduce_sum(what, dst, src, shape, 1, uint64_t{stride16(dst_stride, what)} * sizeof(T), sizeof(T),
             kSlowSum, stride16(src_block, what), stride16(src_repeat, what));
}
template <typename T>
inline void block_reduce_sum(const AscendC::LocalTensor<T>& dst,
                             const AscendC::LocalTensor<T>& src, const Shape& shape,
                             int32_t dst_stride, int32_t src_block, int32_t src_repeat) {
  const char* what = "BlockReduceSum";
  reduce_sum(what, dst, src, shape, 8, uint64_t{stride16(dst_stride, what)} * 8 * sizeof(T),
             8 * sizeof(T), std::is_same_v<T, half> ? kSlowSum : kFullRate,
             stride16(src_block, what), stride16(src_repeat, what));
}
template <typename T>
inline void pair_reduce_sum(const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src,
                            const Shape& shape, int32_t dst_stride, int32_t src_block,
                            int32_t src_repeat) {
  const char* what = "PairReduceSum";
  reduce_sum(what, dst, src, shape, lanes_of<T> / 2, uint64_t{stride16(dst_stride, what)} * 128,
             kBlock, kFullRate, stride16(src_block, what), stride16(src_repeat, what));
}

}  // namespace host_check

namespace AscendC {

template <typename T, bool isSetMask = true>
inline void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                           const int32_t mask, host_check::RepeatTime repeatTime,
                           const int32_t dstRepStride, const int32_t srcBlkStride,
                           const int32_t srcRepStride) {
  static_assert(isSetMask, "isSetMask = false is outside the subset");
  host_check::whole_reduce_sum(dst, src,
                               host_check::reduce_shape<T>(mask, repeatTime, "WholeReduceSum"),
                               dstRepStride, srcBlkStride, srcRepStride);
}
template <typename T, bool isSetMask = true>
inline void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                           const uint64_t mask[], host_check::RepeatTime repeatTime,
                           const int32_t dstRepStride, const int32_t srcBlkStride,
                           const int32_t srcRepStride) {
  static_assert(isSetMask, "isSetMask = false is outside the subset");
  host_check::whole_reduce_sum(dst, src,
                               host_check::shape_of<T>(mask, repeatTime, "WholeReduceSum"),
                               dstRepStride, srcBlkStride, srcRepStride);
}
// The order of these two differs from WholeReduceSum: repeatTime before mask.
template <typename T, bool isSetMask = true>
inline void BlockReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                           host_check::RepeatTime repeatTime, const int32_t mask,
                           const int32_t dstRepStride, const int32_t srcBlkStride,
                           const int32_t srcRepStride) {
  static_assert(isSetMask, "isSetMask = false is outside the subset");
  host_check::block_reduce_sum(dst, src,
                               host_check::reduce_shape<T>(mask, repeatTime, "BlockReduceSum"),
                               dstRepStride, srcBlkStride, srcRepStride);
}
template <typename T, bool isSetMask = true>
inline void PairReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                          host_check::RepeatTime repeatTime, const int32_t mask,
                          const int32_t dstRepStride, const int32_t srcBlkStride,
                          const int32_t srcRepStride) {
  static_assert(isSetMask, "isSetMask = false is outside the subset");
  host_check::pair_reduce_sum(dst, src,
                              host_check::reduce_shape<T>(mask, repeatTime, "PairReduceSum"),
                              dstRepStride, srcBlkStride, srcRepStride);
}

}  // namespace AscendC
