// Compare, CompareScalar (newer name Compares) and Select. Result bits are packed little-endian:
// bit i of the row belongs to element i. Facts: Compare.md, Compares.md, Select.md.
#pragma once

#include "hc_vector.h"

namespace host_check {

// Comparison of one lane; NaN is unordered.
template <typename T>
inline bool compare_lane(T a, T b, AscendC::CMPMODE mode) {
  const auto test = [mode](auto x, auto y) {
    switch (mode) {
      case AscendC::CMPMODE::LT: return x < y;
      case AscendC::CMPMODE::GT: return x > y;
      case AscendC::CMPMODE::EQ: return x == y;
      case AscendC::CMPMODE::LE: return x <= y;
      case AscendC::CMPMODE::GE: return x >= y;
      default: return x != y;
    }
  };
  if constexpr (is_float_type<T>) {
    return test(widen(a), widen(b));
  } else {
    return test(a, b);
  }
}

template <typename T>
inline void check_compare(const char* what, AscendC::CMPMODE mode, uint32_t count) {
  static_assert(is_one_of<T, half, float, int32_t>,
                "unsupported-type: Compare takes half, float, int32_t");
  if (std::is_same_v<T, int32_t> && mode != AscendC::CMPMODE::EQ) {
    fail("compare-mode", "%s of int32_t allows CMPMODE::EQ only", what);
  }
  if (uint64_t{count} * sizeof(T) % kRepeatBytes != 0) {
    fail("compare-count", "%s of %u elements of %d bytes, must fill whole 256 bytes", what, count,
         static_cast<int>(sizeof(T)));
  }
}

// `other(i)` gives the right-hand lane i.
template <typename T, typename Other, typename... Sources>
inline void compare(const char* what, const AscendC::LocalTensor<uint8_t>& dst,
                    AscendC::CMPMODE mode, uint32_t count, const Other& other,
                    const AscendC::LocalTensor<T>& src0, const Sources&... more) {
  check_compare<T>(what, mode, count);
  if (count == 0) return;
  Core& now = core();
  now.next_instruction();
  count_instruction(count / lanes_of<T>);
  const uint64_t bytes = uint64_t{count} * sizeof(T);
  const Run a = run_of(src0.view(), bytes, kBlock, "src0", what);
  const Run out = run_of(dst.view(), count / 8, kBlock, "dst", what);
  check_apart(out, a, what);
  check_read(PIPE_V, a, what);
  ((void)(check_apart(out, run_of(more.view(), bytes, kBlock, "src1", what), what),
          check_read(PIPE_V, run_of(more.view(), bytes, kBlock, "src1", what), what)), ...);
  check_write(PIPE_V, out, what);
  note_read(PIPE_V, a);
  (note_read(PIPE_V, run_of(more.view(), bytes, kBlock, "src1", what)), ...);
  note_write(PIPE_V, out);
  const T* left = reinterpret_cast<const T*>(now.ub + a.begin);
  for (uint32_t i = 0; i < count; i += 8) {
    unsigned bits = 0;
    for (uint32_t j = 0; j < 8; ++j) {
      bits |= static_cast<unsigned>(compare_lane(left[i + j], other(i + j), mode)) << j;
    }
    now.ub[out.begin + i / 8] = static_cast<uint8_t>(bits);
  }
}

// Modes 1 and 2 of Select keep 8 KiB of the unified buffer for themselves.
constexpr uint32_t kSelectReserve = 8192;

// `whole_row`: bits run on over the repeats (modes 1 and 2), else each repeat uses the first ones.
template <typename T, typename Other>
inline void select(const AscendC::LocalTensor<T>& dst, const Run& bits, bool whole_row,
                   const AscendC::LocalTensor<T>& src0, const Other& other, Operand* second,
                   const Shape& shape, const AscendC::BinaryRepeatParams& p) {
  static_assert(is_float_type<T>, "unsupported-type: Select takes half, float");
  Core& now = core();
  if (whole_row && now.config.ub_bytes > kPhysicalUb - kSelectReserve) {
    fail("ub-overflow", "Select needs 8 KiB of the unified buffer, the budget leaves %u bytes",
         kPhysicalUb - now.config.ub_bytes);
  }
  Operand d = operand("dst", dst, p.dstBlkStride, p.dstRepStride);
  Operand a = operand("src0", src0, p.src0BlkStride, p.src0RepStride);
  check_read(PIPE_V, bits, "Select");
  if (second != nullptr) {
    check_vector("Select", shape, false, d, a, *second);
  } else {
    check_vector("Select", shape, false, d, a);
  }
  const Run out{d.first_block * kBlock, (last_block(d, shape) + 1) * kBlock};
  check_apart(out, bits, "Select");
  note_read(PIPE_V, bits);
  for (uint32_t r = 0; r < shape.repeats; ++r) {
    const Lanes& lanes = r + 1 == shape.repeats ? shape.last : shape.mask;
    for (uint32_t l = 0; l < shape.lanes; ++l) {
      if (!lanes.has(l)) continue;
      const uint32_t bit = (whole_row ? r * shape.lanes : 0) + l;
      const bool first = ((now.ub[bits.begin + bit / 8] >> (bit % 8)) & 1) != 0;
      T* to = reinterpret_cast<T*>(now.ub + d.address(r, l));
      *to = first ? *reinterpret_cast<const T*>(now.ub + a.address(r, l)) : other(r, l);
    }
  }
}

template <typename T, typename U>
inline Run select_bits(const AscendC::LocalTensor<U>& mask, AscendC::SELMODE mode,
                       const Shape& shape) {
  static_assert(is_one_of<U, uint8_t, uint16_t, uint32_t, uint64_t>,
                "unsupported-type: the bits of Select are unsigned integers");
  const uint32_t rows = mode == AscendC::SELMODE::VSEL_CMPMASK_SPR ? 1 : shape.repeats;
  const uint32_t last = shape.repeats == 1 || rows > 1 ? shape.last.first_n : shape.lanes;
  const uint32_t used = (rows - 1) * shape.lanes + (last == 0 ? shape.lanes : last);
  return run_of(mask.view(), (used + 7) / 8, kBlock, "selMask", "Select");
}

template <typename T, typename U>
inline void select_tensors(const AscendC::LocalTensor<T>& dst,
                           const AscendC::LocalTensor<U>& mask,
                           const AscendC::LocalTensor<T>& src0,
                           const AscendC::LocalTensor<T>& src1, AscendC::SELMODE mode,
                           const Shape& shape, const AscendC::BinaryRepeatParams& p) {
  if (mode == AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE) {
    fail("select-mode", "VSEL_TENSOR_SCALAR_MODE takes a scalar src1");
  }
  if (shape.repeats == 0) return;
  Operand b = operand("src1", src1, p.src1BlkStride, p.src1RepStride);
  const Core& now = core();
  select(dst, select_bits<T>(mask, mode, shape),
         mode != AscendC::SELMODE::VSEL_CMPMASK_SPR, src0,
         [&](uint32_t r, uint32_t l) {
           return *reinterpret_cast<const T*>(now.ub + b.address(r, l));
         },
         &b, shape, p);
}

template <typename T, typename U>
inline void select_scalar(const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<U>& mask,
                          const AscendC::LocalTensor<T>& src0, T src1, AscendC::SELMODE mode,
                          const Shape& shape, const AscendC::BinaryRepeatParams& p) {
  if (mode != AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE) {
    fail("select-mode", "a scalar src1 needs VSEL_TENSOR_SCALAR_MODE");
  }
  if (shape.repeats == 0) return;
  select(dst, select_bits<T>(mask, mode, shape), true, src0,
         [src1](uint32_t, uint32_t) { return src1; }, nullptr, shape, p);
}

}  // namespace host_check

namespace AscendC {

template <typename T, typename U>
inline void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0,
                    const LocalTensor<T>& src1, CMPMODE cmpMode, host_check::Count count) {
  static_assert(std::is_same_v<U, uint8_t>, "unsupported-type: Compare writes uint8_t");
  const host_check::Core& core = host_check::core();
  const T* right = reinterpret_cast<const T*>(core.ub + src1.view().address);
  host_check::compare("Compare", dst, cmpMode, count, [right](uint32_t i) { return right[i]; },
                      src0, src1);
}
template <typename T, typename U>
inline void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src0,
                          const T src1Scalar, CMPMODE cmpMode, host_check::Count count) {
  static_assert(std::is_same_v<U, uint8_t>, "unsupported-type: CompareScalar writes uint8_t");
  host_check::compare("CompareScalar", dst, cmpMode, count,
                      [src1Scalar](uint32_t) { return src1Scalar; }, src0);
}
template <typename T, typename U>
inline void Compares(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T src1Scalar,
                     CMPMODE cmpMode, host_check::Count count) {
  CompareScalar(dst, src0, src1Scalar, cmpMode, count);
}

template <typename T, typename U>
inline void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask,
                   const LocalTensor<T>& src0, const LocalTensor<T>& src1, SELMODE selMode,
                   host_check::Count count) {
  host_check::select_tensors(dst, selMask, src0, src1, selMode,
                             host_check::shape_of_count(count, host_check::lanes_of<T>),
                             BinaryRepeatParams());
}
template <typename T, typename U>
inline void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask,
                   const LocalTensor<T>& src0, T src1, SELMODE selMode, host_check::Count count) {
  host_check::select_scalar(dst, selMask, src0, src1, selMode,
                            host_check::shape_of_count(count, host_check::lanes_of<T>),
                            BinaryRepeatParams());
}
template <typename T, typename U, bool isSetMask = true>
inline void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask,
                   const LocalTensor<T>& src0, const LocalTensor<T>& src1, SELMODE selMode,
                   uint64_t mask, host_check::RepeatTime repeatTime, const BinaryRepeatParams& p) {
  host_check::select_tensors(dst, selMask, src0, src1, selMode,
                             host_check::shape_of<T>(mask, repeatTime, "Select"), p);
}
template <typename T, typename U, bool isSetMask = true>
inline void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask,
                   const LocalTensor<T>& src0, T src1, SELMODE selMode, uint64_t mask,
                   host_check::RepeatTime repeatTime, const BinaryRepeatParams& p) {
  host_check::select_scalar(dst, selMask, src0, src1, selMode,
                            host_check::shape_of<T>(mask, repeatTime, "Select"), p);
}

}  // namespace AscendC
