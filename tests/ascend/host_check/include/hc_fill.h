// Duplicate, Copy and Brcb. Facts: Duplicate.md, Brcb.md, the UB to UB Copy page of asc-devkit.
#pragma once

#include "hc_vector.h"

namespace host_check {

template <typename T>
inline void duplicate(const AscendC::LocalTensor<T>& dst, T value, const Shape& shape,
                      uint32_t block_stride, uint32_t repeat_stride) {
  static_assert(is_one_of<T, int16_t, uint16_t, half, bfloat16_t, int32_t, uint32_t, float>,
                "unsupported-type: Duplicate takes 16-bit and 32-bit types");
  if (shape.repeats == 0) return;
  Operand d = operand("dst", dst, block_stride, repeat_stride);
  check_vector("Duplicate", shape, false, d);
  each_lane<T>(shape, [value]() { return value; }, d);
}

}  // namespace host_check

namespace AscendC {

template <typename T>
inline void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, host_check::Count count) {
  host_check::duplicate(dst, scalarValue,
                        host_check::shape_of_count(count, host_check::lanes_of<T>), 1, 8);
}
template <typename T, bool isSetMask = true>
inline void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, uint64_t mask,
                      host_check::RepeatTime repeatTime, const uint16_t dstBlockStride,
                      const uint8_t dstRepeatStride) {
  static_assert(isSetMask, "isSetMask = false is outside the subset");
  host_check::duplicate(dst, scalarValue, host_check::shape_of<T>(mask, repeatTime, "Duplicate"),
                        dstBlockStride, dstRepeatStride);
}
template <typename T, bool isSetMask = true>
inline void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, uint64_t mask[],
                      host_check::RepeatTime repeatTime, const uint16_t dstBlockStride,
                      const uint8_t dstRepeatStride) {
  static_assert(isSetMask, "isSetMask = false is outside the subset");
  host_check::duplicate(dst, scalarValue, host_check::shape_of<T>(mask, repeatTime, "Duplicate"),
                        dstBlockStride, dstRepeatStride);
}

// Copy within the unified buffer, vector pipe.
template <typename T, bool isSetMask = true>
inline void Copy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask,
                 host_check::RepeatTime repeatTime, const CopyRepeatParams& p) {
  static_assert(isSetMask, "isSetMask = false is outside the subset");
  static_assert(host_check::is_one_of<T, int16_t, uint16_t, half, bfloat16_t, int32_t, uint32_t,
                                      float>,
                "unsupported-type: Copy takes 16-bit and 32-bit types");
  host_check::unary("Copy", host_check::shape_of<T>(mask, repeatTime, "Copy"),
                    host_check::CopyOp{}, dst, src, p.dstStride, p.srcStride, p.dstRepeatSize,
                    p.srcRepeatSize);
}

// Each of 8 consecutive elements fills one 32-byte block.
template <typename T>
inline void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                 host_check::RepeatTime repeatTime, const BrcbRepeatParams& p) {
  static_assert(host_check::is_one_of<T, int16_t, uint16_t, half, bfloat16_t, int32_t, uint32_t,
                                      float>,
                "unsupported-type: Brcb takes 16-bit and 32-bit types");
  if (repeatTime == 0u) return;
  constexpr uint32_t lanes = host_check::lanes_of<T>;
  const host_check::Shape shape = host_check::shape_of<T>(lanes, repeatTime, "Brcb");
  host_check::Core& core = host_check::core();
  const host_check::Run source =
      host_check::run_of(src.view(), uint64_t{8} * repeatTime * sizeof(T), host_check::kBlock,
                         "src", "Brcb");
  host_check::Operand d = host_check::operand("dst", dst, p.dstBlkStride, p.dstRepStride);
  host_check::prepare(d, shape, "Brcb");
  host_check::check_dst_strides(d, shape, "Brcb", false);
  if (src.view().buffer == dst.view().buffer) {
    const host_check::Run whole{d.first_block * host_check::kBlock,
                                (host_check::last_block(d, shape) + 1) * host_check::kBlock};
    host_check::check_apart(whole, source, "Brcb");
  }
  host_check::check_read(PIPE_V, source, "Brcb");
  host_check::check_vector("Brcb", shape, false, d);
  host_check::note_read(PIPE_V, source);
  for (uint32_t r = 0; r < shape.repeats; ++r) {
    for (uint32_t b = 0; b < 8; ++b) {
      T value;
      std::memcpy(static_cast<void*>(&value), core.ub + source.begin + (r * 8 + b) * sizeof(T),
                  sizeof(T));
      T* out = reinterpret_cast<T*>(core.ub + d.block(r, b) * host_check::kBlock);
      for (uint32_t i = 0; i < host_check::kBlock / sizeof(T); ++i) out[i] = value;
    }
  }
}

}  // namespace AscendC
