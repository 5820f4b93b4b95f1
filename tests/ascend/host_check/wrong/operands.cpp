// Operands of vector instructions: address, extent, repeats, mask, strides, overlap, values.
#include "cases.h"

using namespace AscendC;
using wrong_kernels::Scratch;

KERNEL(misaligned_operand, "ub-misaligned") {
  Scratch s(128);
  Adds(s.x[256], s.x[wrong ? 1 : 8], 1.0f, 64);
}

KERNEL(misaligned_reduce_result, "ub-misaligned") {
  Scratch s(64);
  BlockReduceSum(s.x[wrong ? 68 : 72], s.x, 1, 64, 1, 1, 8);
}

KERNEL(extent_of_count, "ub-out-of-bounds") {
  Scratch s(128, 512);
  Adds(s.x, s.x, 1.0f, wrong ? 129 : 128);
}

KERNEL(extent_of_strides, "ub-out-of-bounds") {
  Scratch s(256, 1024);
  const uint8_t repeat_stride = wrong ? 9 : 8;
  Adds(s.x, s.x, 1.0f, 64, 4, {1, 1, repeat_stride, repeat_stride});
}

KERNEL(offset_past_the_buffer, "ub-out-of-bounds") {
  Scratch s(64, 512);
  Adds(s.x[wrong ? 136 : 64], s.x, 1.0f, 8);
}

KERNEL(repeat_over_255, "repeat-range") {
  Scratch s(64);
  const int repeats = wrong ? 300 : 44;  // 300 wraps to 44 in the device's uint8_t
  Adds(s.x[64], s.x, 1.0f, 64, repeats, {1, 1, 8, 0});
}

KERNEL(repeat_of_reduce, "repeat-range") {
  Scratch s(8192);
  WholeReduceSum(s.x[8192], s.x, 8, wrong ? 256 : 255, 1, 1, 1);
}

KERNEL(narrowed_stride, "repeat-range") {
  Scratch s(64);
  const uint8_t stride = host_check::checked_narrow<uint8_t>(wrong ? 264 : 8);
  Adds(s.x[64], s.x, 1.0f, 64, 2, {1, 1, stride, 0});
}

KERNEL(narrowed_block_count, "repeat-range") {
  Scratch s(64);
  const uint16_t blocks = host_check::checked_narrow<uint16_t>(wrong ? 65544 : 8);
  Adds(s.x[64], s.x, 1.0f, blocks);
}

KERNEL(mask_over_64, "mask-range") {
  Scratch s(128);
  Adds(s.x, s.x, 1.0f, wrong ? 65 : 64, 1, {1, 1, 8, 8});
}

KERNEL(mask_bits_over_64, "mask-range") {
  Scratch s(128);
  uint64_t mask[2] = {0xff, wrong ? 1u : 0u};
  Adds(s.x, s.x, 1.0f, mask, 1, {1, 1, 8, 8});
}

KERNEL(mask_zero, "mask-range") {
  Scratch s(128);
  Adds(s.x, s.x, 1.0f, wrong ? 0 : 1, 1, {1, 1, 8, 8});
}

KERNEL(zero_block_stride, "zero-dst-stride") {
  Scratch s(128);
  const uint16_t block_stride = wrong ? 0 : 1;
  Adds(s.x[64], s.x, 1.0f, 64, 1, {block_stride, 1, 8, 8});
}

KERNEL(zero_repeat_stride, "zero-dst-stride") {
  Scratch s(128);
  const uint8_t repeat_stride = wrong ? 0 : 8;
  Adds(s.x[128], s.x, 1.0f, 64, 2, {1, 1, repeat_stride, 8});
}

KERNEL(accumulation_into_src0, "zero-dst-stride") {
  // Documented only where dst is the second source.
  Scratch s(256);
  if (wrong) {
    Add(s.x, s.x, s.x[64], 64, 3, {1, 1, 1, 0, 0, 8});
  } else {
    Add(s.x, s.x[64], s.x, 64, 3, {1, 1, 1, 0, 8, 0});
  }
}

KERNEL(overlap_in_part, "partial-overlap") {
  Scratch s(256);
  Adds(s.x[wrong ? 8 : 0], s.x, 1.0f, 64);
}

KERNEL(repeat_reads_what_was_written, "partial-overlap") {
  Scratch s(256);
  const uint8_t src_stride = wrong ? 0 : 8;
  Adds(s.x, s.x, 1.0f, 64, 2, {1, 1, 8, src_stride});
}

KERNEL(cast_in_place, "partial-overlap") {
  Scratch s(128);
  Cast(wrong ? s.x.ReinterpretCast<half>() : s.x[128].ReinterpretCast<half>(), s.x,
       RoundMode::CAST_NONE, 128);
}

KERNEL(count_below_zero, "count-range") {
  Scratch s(64);
  Adds(s.x, s.x, 1.0f, wrong ? -1 : 1);
}

KERNEL(compare_tail, "compare-count") {
  Scratch s(128);
  CompareScalar(s.x[128].ReinterpretCast<uint8_t>(), s.x, 0.5f, CMPMODE::GT, wrong ? 96 : 128);
}

KERNEL(compare_int32_greater, "compare-mode") {
  Scratch s(128);
  const LocalTensor<int32_t> ints = s.x.ReinterpretCast<int32_t>();
  CompareScalar(s.x[128].ReinterpretCast<uint8_t>(), ints, int32_t{1},
                wrong ? CMPMODE::GT : CMPMODE::EQ, 128);
}

KERNEL(select_scalar_mode, "select-mode") {
  Scratch s(256);
  Select(s.x[256], s.x.ReinterpretCast<uint8_t>(), s.x[64], s.x[128],
         wrong ? SELMODE::VSEL_TENSOR_SCALAR_MODE : SELMODE::VSEL_TENSOR_TENSOR_MODE, 64);
}

KERNEL(cast_mode_none, "cast-mode") {
  Scratch s(64);
  Cast(s.x[64].ReinterpretCast<bfloat16_t>(), s.x,
       wrong ? RoundMode::CAST_NONE : RoundMode::CAST_RINT, 64);
}

KERNEL(brcb_short_source, "ub-out-of-bounds") {
  TPipe pipe;
  TBuf<TPosition::VECCALC> small, large;
  pipe.InitBuffer(small, 32);
  pipe.InitBuffer(large, 1024);
  Duplicate(small.Get<float>(), 1.0f, 8);
  PipeBarrier<PIPE_V>();
  Brcb(large.Get<float>(), small.Get<float>(), wrong ? 2 : 1, {1, 8});
}

KERNEL(brcb_into_its_source, "partial-overlap") {
  Scratch s(64);
  Brcb(s.x[wrong ? 0 : 64], s.x, 1, {1, 8});
}

KERNEL(brcb_zero_stride, "zero-dst-stride") {
  Scratch s(64);
  const uint16_t block_stride = wrong ? 0 : 1;
  Brcb(s.x[64], s.x, 1, {block_stride, 8});
}

KERNEL(int16_overflow, "integer-overflow") {
  Scratch s(64);
  const LocalTensor<int16_t> words = s.x[64].ReinterpretCast<int16_t>();
  Duplicate(words, int16_t{32000}, 64);
  PipeBarrier<PIPE_V>();
  Adds(words, words, static_cast<int16_t>(wrong ? 1000 : 700), 64);
}

KERNEL(signed_shift_loses_the_sign, "integer-overflow") {
  Scratch s(64);
  const LocalTensor<int16_t> words = s.x[64].ReinterpretCast<int16_t>();
  Duplicate(words, static_cast<int16_t>(wrong ? 0x4000 : 0x2000), 64);
  PipeBarrier<PIPE_V>();
  ShiftLeft(words, words, int16_t{1}, 64);
}

KERNEL(shift_too_far, "shift-range") {
  Scratch s(64);
  const LocalTensor<uint16_t> words = s.x.ReinterpretCast<uint16_t>();
  ShiftRight(words, words, static_cast<uint16_t>(wrong ? 17 : 16), 64);
}

KERNEL(stride_below_zero, "stride-range") {
  Scratch s(128);
  WholeReduceSum(s.x[128], s.x, 64, 2, 1, 1, wrong ? -8 : 8);
}
