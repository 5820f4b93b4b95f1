// fake_quantize_with_scales in the ternary grid: the levels of weights under given scales.
//
// A scale that was handed in says nothing about the elements, so each is looked at: where w is not
// finite the result is NaN.

#include "../../common/copies.h"
#include "../../common/group_words.h"
#include "../../common/magnitudes.h"
#include "../op_host/fake_quantize_with_scales_launch.h"

namespace bitcpm::ascend {

template <class Format>
class FakeQuantizeWithScales {
  using Word = typename Format::Word;
  static constexpr uint32_t kElements = kBlockBytes / sizeof(Word);  // of a data block

 public:
  __aicore__ inline FakeQuantizeWithScales() {}

  __aicore__ inline void Init(AscendC::TPipe* pipe, GM_ADDR w, GM_ADDR scales, GM_ADDR wq,
                              const GroupTiling& tiling) {
    tiling_ = tiling;
    const uint64_t total = static_cast<uint64_t>(tiling_.num_groups * tiling_.group_len);
    w_.SetGlobalBuffer(reinterpret_cast<__gm__ Word*>(w), total);
    wq_.SetGlobalBuffer(reinterpret_cast<__gm__ Word*>(wq), total);
    scales_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(scales),
                            static_cast<uint64_t>(tiling_.num_groups));
    const uint32_t bytes = tiling_.piece * static_cast<uint32_t>(sizeof(Word));
    const uint32_t padded = blocks_up(tiling_.tile_groups, 16) * 16;
    pipe->InitBuffer(in_, 2, bytes);
    pipe->InitBuffer(scales_in_, 2, padded * sizeof(float));
    pipe->InitBuffer(out_, 2, bytes);
    pipe->InitBuffer(magnitude_buffer_, bytes);
    pipe->InitBuffer(infinite_buffer_, bytes);
    pipe->InitBuffer(constants_, 3 * kBlockBytes);
    const LocalTensor<Word> constants = constants_.Get<Word>();
    mask_block_ = constants;
    largest_block_ = constants[kElements];
    nan_block_ = constants[2 * kElements];
    AscendC::Duplicate(mask_block_, static_cast<Word>(Format::kMagnitude),
                       static_cast<int32_t>(kElements));
    AscendC::Duplicate(largest_block_, static_cast<Word>(Format::kLargest),
                       static_cast<int32_t>(kElements));
    AscendC::Duplicate(nan_block_, static_cast<Word>(Format::kNaNBits),
                       static_cast<int32_t>(kElements));
    then();
    pipe->InitBuffer(group_buffer_, padded * (GroupWords<Format>::kVectors * sizeof(float) +
                                              5 * sizeof(Word) + 4 * kBlockBytes));
    words_.Init(group_buffer_.Get<float>(), tiling_.tile_groups);
  }

  __aicore__ inline void Process() {
    const GroupRange mine = take_share(AscendC::GetBlockIdx(), tiling_.groups_per_core,
                                       tiling_.extra_groups);
    const bool many = tiling_.plan == GroupPlan::kManyGroups;
    for (int64_t group = mine.begin; group < mine.end; group += tiling_.tile_groups) {
      const int64_t left = mine.end - group;
      const uint32_t groups =
          left < tiling_.tile_groups ? static_cast<uint32_t>(left) : tiling_.tile_groups;
      CopyScalesIn(group, groups);
      TakeScales(groups);
      const int64_t at = group * tiling_.group_len;
      if (many) {
        const uint32_t len = static_cast<uint32_t>(tiling_.group_len);
        CopyIn(at, groups, len);
        Compute(groups, tiling_.stride);
        CopyOut(at, groups, len);
        continue;
      }
      for (int64_t start = 0; start < tiling_.group_len; start += tiling_.piece) {
        const int64_t rest = tiling_.group_len - start;
        const uint32_t len = rest < tiling_.piece ? static_cast<uint32_t>(rest) : tiling_.piece;
        CopyIn(at + start, 1, len);
        Compute(1, blocks_up(len, kElements) * kElements);
        CopyOut(at + start, 1, len);
      }
    }
  }

 private:
  __aicore__ inline void CopyScalesIn(int64_t group, uint32_t groups) {
    const LocalTensor<float> scales = scales_in_.template AllocTensor<float>();
    copy_in(scales, scales_[static_cast<uint64_t>(group)], 1, groups);
    scales_in_.EnQue(scales);
  }

  __aicore__ inline void TakeScales(uint32_t groups) {
    LocalTensor<float> scales = scales_in_.template DeQue<float>();
    words_.FromScales(scales, groups);
    scales_in_.FreeTensor(scales);
  }

  __aicore__ inline void CopyIn(int64_t at, uint32_t rows, uint32_t len) {
    const LocalTensor<Word> w = in_.template AllocTensor<Word>();
    copy_in(w, w_[static_cast<uint64_t>(at)], rows, len);
    in_.EnQue(w);
  }

  __aicore__ inline void Compute(uint32_t groups, uint32_t stride) {
    const uint32_t blocks = stride / kElements, count = groups * stride;
    const int32_t size = static_cast<int32_t>(count);
    const int32_t size16 = static_cast<int32_t>(count * (sizeof(Word) / sizeof(int16_t)));
    constexpr Word kSignShift = 8 * sizeof(Word) - 1;
    LocalTensor<Word> w = in_.template DeQue<Word>();
    const LocalTensor<Word> wq = out_.template AllocTensor<Word>();
    const LocalTensor<Word> mask = magnitude_buffer_.template Get<Word>();
    const LocalTensor<Word> infinite = infinite_buffer_.template Get<Word>();
    take_magnitudes<Format>(mask, w, mask_block_, count);
    combine<AndGroup>(words(wq), words(w), words(words_.sign_blocks), groups, blocks);
    combine<SubtractFromGroup>(infinite, mask, largest_block_, 1, count / kElements);
    then();
    in_.FreeTensor(w);
    combine<SubtractFromGroup>(mask, mask, words_.threshold_blocks, groups, blocks);
    combine<OrGroup>(words(wq), words(wq), words(words_.level_blocks), groups, blocks);
    AscendC::ShiftRight(infinite, infinite, kSignShift, size);
    then();
    AscendC::ShiftRight(mask, mask, kSignShift, size);
    then();
    AscendC::And(words(wq), words(wq), words(mask), size16);
    then();
    // Where w is not finite: nothing of wq, and NaN.
    AscendC::Not(words(mask), words(infinite), size16);
    then();
    combine<AndGroup>(words(infinite), words(infinite), words(nan_block_), 1, count / kElements);
    AscendC::And(words(wq), words(wq), words(mask), size16);
    then();
    AscendC::Or(words(wq), words(wq), words(infinite), size16);
    out_.EnQue(wq);
  }

  __aicore__ inline void CopyOut(int64_t at, uint32_t rows, uint32_t len) {
    LocalTensor<Word> wq = out_.template DeQue<Word>();
    copy_out(wq_[static_cast<uint64_t>(at)], wq, rows, len);
    out_.FreeTensor(wq);
  }

  GroupTiling tiling_;
  AscendC::GlobalTensor<Word> w_, wq_;
  AscendC::GlobalTensor<float> scales_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> in_, scales_in_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> out_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> magnitude_buffer_, infinite_buffer_, group_buffer_,
      constants_;
  LocalTensor<Word> mask_block_, largest_block_, nan_block_;
  GroupWords<Format> words_;
};

template <class Format>
__aicore__ inline void run_fake_quantize_with_scales(GM_ADDR w, GM_ADDR scales, GM_ADDR wq,
                                                     const GroupTiling& tiling) {
  AscendC::TPipe pipe;
  FakeQuantizeWithScales<Format> op;
  op.Init(&pipe, w, scales, wq, tiling);
  op.Process();
}

}  // namespace bitcpm::ascend

extern "C" __global__ __vector__ void bitcpm_fake_quantize_with_scales_f32(
    GM_ADDR w, GM_ADDR scales, GM_ADDR wq, bitcpm::ascend::GroupTiling tiling) {
  bitcpm::ascend::run_fake_quantize_with_scales<bitcpm::ascend::Float32>(w, scales, wq, tiling);
}

extern "C" __global__ __vector__ void bitcpm_fake_quantize_with_scales_bf16(
    GM_ADDR w, GM_ADDR scales, GM_ADDR wq, bitcpm::ascend::GroupTiling tiling) {
  bitcpm::ascend::run_fake_quantize_with_scales<bitcpm::ascend::BFloat16>(w, scales, wq, tiling);
}

extern "C" __global__ __vector__ void bitcpm_fake_quantize_with_scales_f16(
    GM_ADDR w, GM_ADDR scales, GM_ADDR wq, bitcpm::ascend::GroupTiling tiling) {
  bitcpm::ascend::run_fake_quantize_with_scales<bitcpm::ascend::Float16>(w, scales, wq, tiling);
}

#ifndef BITCPM_HOST_CHECK
namespace bitcpm::ascend {

void launch_fake_quantize_with_scales(DType dtype, void* stream, const void* w, const void* scales,
                                      void* wq, const GroupTiling& tiling) {
  const uint32_t blocks = tiling.blocks;
  if (blocks == 0) return;
  const auto from = (GM_ADDR) const_cast<void*>(w), with = (GM_ADDR) const_cast<void*>(scales);
  const auto to = (GM_ADDR)wq;
  switch (dtype) {
    case DType::kFloat32:
      bitcpm_fake_quantize_with_scales_f32<<<blocks, nullptr, stream>>>(from, with, to, tiling);
      break;
    case DType::kBFloat16:
      bitcpm_fake_quantize_with_scales_bf16<<<blocks, nullptr, stream>>>(from, with, to, tiling);
      break;
    case DType::kFloat16:
      bitcpm_fake_quantize_with_scales_f16<<<blocks, nullptr, stream>>>(from, with, to, tiling);
      break;
  }
}

}  // namespace bitcpm::ascend
#endif
