// abs_sums: the canonical sum of the magnitudes of each group, in float32.

#include "../../common/copies.h"
#include "../../common/magnitudes.h"
#include "../op_host/abs_sums_launch.h"

namespace bitcpm::ascend {

template <class Format>
class AbsSums {
  using Word = typename Format::Word;
  static constexpr uint32_t kElements = kBlockBytes / sizeof(Word);  // of a data block

 public:
  __aicore__ inline AbsSums() {}

  __aicore__ inline void Init(AscendC::TPipe* pipe, GM_ADDR w, GM_ADDR sums,
                              const GroupTiling& tiling) {
    tiling_ = tiling;
    w_.SetGlobalBuffer(reinterpret_cast<__gm__ Word*>(w),
                       static_cast<uint64_t>(tiling_.num_groups * tiling_.group_len));
    sums_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(sums),
                          static_cast<uint64_t>(tiling_.num_groups));
    pipe->InitBuffer(in_, 2, tiling_.piece * sizeof(Word));
    const uint32_t padded = blocks_up(tiling_.tile_groups, 16) * 16;
    pipe->InitBuffer(out_, 2, padded * sizeof(float));
    pipe->InitBuffer(magnitude_buffer_, tiling_.piece * sizeof(Word));
    if constexpr (Format::kIs16Bit)
      pipe->InitBuffer(float_buffer_, tiling_.piece * sizeof(float));
    pipe->InitBuffer(vectors_, kBlockBytes + kSumLanes * sizeof(float) +
                                    padded * (3 * sizeof(float) + kBlockBytes));
    const LocalTensor<float> vectors = vectors_.Get<float>();
    mask_block_ = view<Word>(vectors);
    lanes_ = vectors[kBlockFloats];
    raw_ = vectors[kBlockFloats + kSumLanes];
    finite_ = view<int32_t>(raw_[padded]);
    nan_ = view<int32_t>(raw_[padded * 2]);
    partial_ = raw_[padded * 3];
    AscendC::Duplicate(mask_block_, static_cast<Word>(Format::kMagnitude),
                       static_cast<int32_t>(kElements));
    // Entries between the last group and the end of a vector are computed with, and never used.
    AscendC::Duplicate(raw_, 0.0f, static_cast<int32_t>(padded));
    AscendC::Duplicate(partial_, 0.0f, static_cast<int32_t>(padded * kBlockFloats));
    then();
  }

  __aicore__ inline void Process() {
    const GroupRange mine = take_share(AscendC::GetBlockIdx(), tiling_.groups_per_core,
                                       tiling_.extra_groups);
    const uint32_t step = tiling_.tile_groups;  // 1 for groups in pieces
    for (int64_t group = mine.begin; group < mine.end; group += step) {
      const int64_t left = mine.end - group;
      const uint32_t groups = left < step ? static_cast<uint32_t>(left) : step;
      if (tiling_.plan == GroupPlan::kManyGroups) {
        CopyIn(group * tiling_.group_len, groups, static_cast<uint32_t>(tiling_.group_len));
        Compute(groups);
      } else {
        ComputeInPieces(group * tiling_.group_len);
      }
      Finish(groups);
      CopyOut(group, groups);
    }
  }

 private:
  __aicore__ inline void CopyIn(int64_t at, uint32_t rows, uint32_t len) {
    const LocalTensor<Word> w = in_.template AllocTensor<Word>();
    copy_in(w, w_[static_cast<uint64_t>(at)], rows, len);
    in_.EnQue(w);
  }

  // The magnitudes of the piece that came in, `count` elements, ready to be summed.
  __aicore__ inline LocalTensor<float> TakeMagnitudes(uint32_t count) {
    LocalTensor<Word> w = in_.template DeQue<Word>();
    const LocalTensor<Word> magnitudes = magnitude_buffer_.template Get<Word>();
    take_magnitudes<Format>(magnitudes, w, mask_block_, count);
    in_.FreeTensor(w);
    LocalTensor<float> scratch;
    if constexpr (Format::kIs16Bit) scratch = float_buffer_.template Get<float>();
    return decode_magnitudes<Format>(magnitudes, scratch, count);
  }

  __aicore__ inline void Compute(uint32_t groups) {
    sum_groups(raw_, partial_, TakeMagnitudes(groups * tiling_.stride), groups, tiling_.stride);
  }

  __aicore__ inline void ComputeInPieces(int64_t at) {
    AscendC::Duplicate(lanes_, 0.0f, static_cast<int32_t>(kSumLanes));
    then();
    for (int64_t start = 0; start < tiling_.group_len; start += tiling_.piece) {
      const int64_t left = tiling_.group_len - start;
      const uint32_t len = left < tiling_.piece ? static_cast<uint32_t>(left) : tiling_.piece;
      const uint32_t count = blocks_up(len, kElements) * kElements;
      CopyIn(at + start, 1, len);
      add_to_lanes(lanes_, TakeMagnitudes(count), count, 1, 0);
    }
    reduce_lanes(raw_, partial_, lanes_, kSumLanes, 1, kSumLanes);
  }

  // One NaN: processors differ in its sign and payload.
  __aicore__ inline void Finish(uint32_t groups) {
    const int32_t count = static_cast<int32_t>(blocks_up(groups, 8) * 8);
    const LocalTensor<uint32_t> temp = view<uint32_t>(nan_);
    AscendC::ShiftLeft(temp, view<uint32_t>(raw_), static_cast<uint32_t>(1), count);
    then();
    AscendC::ShiftRight(temp, temp, static_cast<uint32_t>(1), count);
    then();
    AscendC::Adds(nan_, nan_, -kInfBits - 1, count);  // negative up to infinity
    then();
    AscendC::ShiftRight(finite_, nan_, static_cast<int32_t>(31), count);
    then();
    AscendC::Not(words(nan_), words(finite_), 2 * count);
    then();
    AscendC::And(words(finite_), words(finite_), words(raw_), 2 * count);
    AscendC::ShiftRight(temp, temp, static_cast<uint32_t>(23), count);
    then();
    AscendC::ShiftLeft(temp, temp, static_cast<uint32_t>(22), count);
    const LocalTensor<float> sums = out_.template AllocTensor<float>();
    then();
    AscendC::Or(words(sums), words(finite_), words(nan_), 2 * count);
    out_.EnQue(sums);
  }

  __aicore__ inline void CopyOut(int64_t group, uint32_t groups) {
    LocalTensor<float> sums = out_.template DeQue<float>();
    copy_out(sums_[static_cast<uint64_t>(group)], sums, 1, groups);
    out_.FreeTensor(sums);
  }

  GroupTiling tiling_;
  AscendC::GlobalTensor<Word> w_;
  AscendC::GlobalTensor<float> sums_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> in_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> out_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> magnitude_buffer_, float_buffer_, vectors_;
  LocalTensor<Word> mask_block_;
  LocalTensor<float> lanes_, raw_, partial_;
  LocalTensor<int32_t> finite_, nan_;
};

template <class Format>
__aicore__ inline void run_abs_sums(GM_ADDR w, GM_ADDR sums, const GroupTiling& tiling) {
  AscendC::TPipe pipe;
  AbsSums<Format> op;
  op.Init(&pipe, w, sums, tiling);
  op.Process();
}

}  // namespace bitcpm::ascend

extern "C" __global__ __vector__ void bitcpm_abs_sums_f32(GM_ADDR w, GM_ADDR sums,
                                                          bitcpm::ascend::GroupTiling tiling) {
  bitcpm::ascend::run_abs_sums<bitcpm::ascend::Float32>(w, sums, tiling);
}

extern "C" __global__ __vector__ void bitcpm_abs_sums_bf16(GM_ADDR w, GM_ADDR sums,
                                                           bitcpm::ascend::GroupTiling tiling) {
  bitcpm::ascend::run_abs_sums<bitcpm::ascend::BFloat16>(w, sums, tiling);
}

extern "C" __global__ __vector__ void bitcpm_abs_sums_f16(GM_ADDR w, GM_ADDR sums,
                                                          bitcpm::ascend::GroupTiling tiling) {
  bitcpm::ascend::run_abs_sums<bitcpm::ascend::Float16>(w, sums, tiling);
}

#ifndef BITCPM_HOST_CHECK
namespace bitcpm::ascend {

void launch_abs_sums(DType dtype, void* stream, const void* w, void* sums,
                     const GroupTiling& tiling) {
  const uint32_t blocks = tiling.blocks;
  if (blocks == 0) return;
  const auto from = (GM_ADDR) const_cast<void*>(w);
  const auto to = (GM_ADDR)sums;
  switch (dtype) {
    case DType::kFloat32:
      bitcpm_abs_sums_f32<<<blocks, nullptr, stream>>>(from, to, tiling);
      break;
    case DType::kBFloat16:
      bitcpm_abs_sums_bf16<<<blocks, nullptr, stream>>>(from, to, tiling);
      break;
    case DType::kFloat16:
      bitcpm_abs_sums_f16<<<blocks, nullptr, stream>>>(from, to, tiling);
      break;
  }
}

}  // namespace bitcpm::ascend
#endif
