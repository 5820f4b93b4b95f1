// fake_quantize and quantize in the ternary grid, from the weights to levels, codes and scales.
//
// Every element is read from global memory once, unless its group does not fit the unified buffer.
// Two steps over a tile: the canonical sums of the magnitudes, then a comparison of bit patterns
// with the words of the group. docs/quantizer.md defines the numbers.

#include "../../common/copies.h"
#include "../../common/group_words.h"
#include "../../common/magnitudes.h"
#include "../op_host/fake_quantize_launch.h"

namespace bitcpm::ascend {

template <class Format>
class FakeQuantize {
  using Word = typename Format::Word;
  static constexpr uint32_t kElements = kBlockBytes / sizeof(Word);  // of a data block

 public:
  __aicore__ inline FakeQuantize() {}

  __aicore__ inline void Init(AscendC::TPipe* pipe, GM_ADDR w, GM_ADDR wq, GM_ADDR codes,
                              GM_ADDR scales, const FakeQuantizeTiling& tiling) {
    tiling_ = tiling.groups;
    one_over_n_ = tiling.one_over_n;
    eps_ = tiling.eps;
    has_wq_ = wq != nullptr;
    has_codes_ = codes != nullptr;
    has_scales_ = scales != nullptr;
    many_ = tiling_.plan == GroupPlan::kManyGroups;
    const uint64_t total = static_cast<uint64_t>(tiling_.num_groups * tiling_.group_len);
    w_.SetGlobalBuffer(reinterpret_cast<__gm__ Word*>(w), total);
    const uint32_t piece = tiling_.piece, tile_groups = tiling_.tile_groups;
    pipe->InitBuffer(in_, 2, (many_ ? piece : tiling_.stride) * sizeof(Word));
    if (has_wq_) {
      wq_.SetGlobalBuffer(reinterpret_cast<__gm__ Word*>(wq), total);
      pipe->InitBuffer(out_, 2, piece * sizeof(Word));
    }
    const uint32_t code_len = many_ ? tile_groups * tiling_.code_stride : piece;
    if (has_codes_) {
      codes_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(codes), total);
      pipe->InitBuffer(codes_out_, 2, code_len);
    }
    const uint32_t padded = blocks_up(tile_groups, 16) * 16;
    if (has_scales_) {
      scales_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(scales),
                              static_cast<uint64_t>(tiling_.num_groups));
      pipe->InitBuffer(scales_out_, 2, padded * sizeof(float));
    }
    InitScratch(pipe, piece, has_codes_ ? code_len : 0);
    pipe->InitBuffer(group_buffer_, padded * (GroupWords<Format>::kVectors * sizeof(float) +
                                              5 * sizeof(Word) + 4 * kBlockBytes));
    words_.Init(group_buffer_.Get<float>(), tile_groups);
    pipe->InitBuffer(partial_buffer_, padded * kBlockBytes);
    partial_ = partial_buffer_.Get<float>();
    AscendC::Duplicate(partial_, 0.0f, static_cast<int32_t>(padded * kBlockFloats));
    then();
  }

  __aicore__ inline void Process() {
    const GroupRange mine = take_share(AscendC::GetBlockIdx(), tiling_.groups_per_core,
                                       tiling_.extra_groups);
    if (many_) {
      for (int64_t group = mine.begin; group < mine.end; group += tiling_.tile_groups) {
        const int64_t left = mine.end - group;
        const uint32_t groups = left < tiling_.tile_groups ? static_cast<uint32_t>(left)
                                                           : tiling_.tile_groups;
        ProcessTile(group, groups);
      }
    } else {
      for (int64_t group = mine.begin; group < mine.end; ++group) ProcessLongGroup(group);
    }
  }

 private:
  // Scratch of a piece: the magnitudes, and beside them their float32 copy or the codes on the way.
  __aicore__ inline void InitScratch(AscendC::TPipe* pipe, uint32_t piece, uint32_t code_len) {
    // An upper bound of what the plan leaves: codes as 16-bit words may outgrow the weights.
    const uint32_t code_bytes = code_len * static_cast<uint32_t>(sizeof(int16_t));
    uint32_t first = piece * static_cast<uint32_t>(sizeof(Word)), second = 0;
    if constexpr (Format::kIs16Bit) {
      second = piece * static_cast<uint32_t>(sizeof(float));
      const uint32_t with_codes = piece * static_cast<uint32_t>(sizeof(Word)) + code_bytes;
      if (code_len && with_codes > second) second = with_codes;
    } else if (code_len) {
      if (code_bytes > first) first = code_bytes;
      second = first;
    }
    pipe->InitBuffer(magnitude_buffer_, first);
    if (second) pipe->InitBuffer(second_buffer_, second);
    pipe->InitBuffer(constants_, 2 * kBlockBytes + kSumLanes * sizeof(float));
    const LocalTensor<Word> constants = constants_.Get<Word>();
    mask_block_ = constants;
    one_block_ = constants[kElements];
    lanes_ = view<float>(constants[2 * kElements]);
    AscendC::Duplicate(mask_block_, static_cast<Word>(Format::kMagnitude),
                       static_cast<int32_t>(kElements));
    AscendC::Duplicate(one_block_, static_cast<Word>(1), static_cast<int32_t>(kElements));
    then();
  }

  __aicore__ inline LocalTensor<Word> Magnitudes() {
    return magnitude_buffer_.template Get<Word>();
  }

  __aicore__ inline LocalTensor<float> FloatScratch() {
    if constexpr (Format::kIs16Bit)
      return second_buffer_.template Get<float>();
    else
      return magnitude_buffer_.template Get<float>();
  }

  // ---- many groups at a time --------------------------------------------------------------------

  __aicore__ inline void ProcessTile(int64_t group, uint32_t groups) {
    CopyIn(group * tiling_.group_len, groups, static_cast<uint32_t>(tiling_.group_len));
    Compute(groups);
    CopyOut(group * tiling_.group_len, groups, static_cast<uint32_t>(tiling_.group_len));
    CopyScalesOut(group, groups);
  }

  __aicore__ inline void CopyIn(int64_t at, uint32_t rows, uint32_t len) {
    const LocalTensor<Word> w = in_.template AllocTensor<Word>();
    copy_in(w, w_[static_cast<uint64_t>(at)], rows, len);
    in_.EnQue(w);
  }

  __aicore__ inline void Compute(uint32_t groups) {
    LocalTensor<Word> w = in_.template DeQue<Word>();
    const uint32_t count = groups * tiling_.stride;
    take_magnitudes<Format>(Magnitudes(), w, mask_block_, count);
    sum_groups(words_.sums(), partial_,
               decode_magnitudes<Format>(Magnitudes(), FloatScratch(), count), groups,
               tiling_.stride);
    MakeGroupWords(groups);
    // The sum of float32 groups was taken in place.
    if constexpr (!Format::kIs16Bit) take_magnitudes<Format>(Magnitudes(), w, mask_block_, count);
    WriteLevels(w, groups, tiling_.stride);
    in_.FreeTensor(w);
  }

  // ---- one long group ---------------------------------------------------------------------------

  __aicore__ inline void ProcessLongGroup(int64_t group) {
    const int64_t at = group * tiling_.group_len;
    const bool whole = tiling_.plan == GroupPlan::kWholeGroup;
    LocalTensor<Word> tile;
    if (whole) {
      CopyIn(at, 1, static_cast<uint32_t>(tiling_.group_len));
      tile = in_.template DeQue<Word>();
    }
    AscendC::Duplicate(lanes_, 0.0f, static_cast<int32_t>(kSumLanes));
    for (int64_t start = 0; start < tiling_.group_len; start += tiling_.piece) {
      LocalTensor<Word> w = TakePiece(tile, whole, at, start);
      const uint32_t count = PaddedPiece(start);
      take_magnitudes<Format>(Magnitudes(), w, mask_block_, count);
      add_to_lanes(lanes_, decode_magnitudes<Format>(Magnitudes(), FloatScratch(), count), count, 1,
                   0);
      if (!whole) in_.FreeTensor(w);
    }
    reduce_lanes(words_.sums(), partial_, lanes_, kSumLanes, 1, kSumLanes);
    MakeGroupWords(1);
    for (int64_t start = 0; (has_wq_ || has_codes_) && start < tiling_.group_len;
         start += tiling_.piece) {
      LocalTensor<Word> w = TakePiece(tile, whole, at, start);
      const uint32_t count = PaddedPiece(start);
      take_magnitudes<Format>(Magnitudes(), w, mask_block_, count);
      WriteLevels(w, 1, count);
      if (!whole) in_.FreeTensor(w);
      CopyOut(at + start, 1, PieceLen(start));
    }
    if (whole) in_.FreeTensor(tile);
    CopyScalesOut(group, 1);
  }

  __aicore__ inline uint32_t PieceLen(int64_t start) {
    const int64_t left = tiling_.group_len - start;
    return left < tiling_.piece ? static_cast<uint32_t>(left) : tiling_.piece;
  }

  __aicore__ inline uint32_t PaddedPiece(int64_t start) {
    return blocks_up(PieceLen(start), kElements) * kElements;
  }

  // From the tile in the unified buffer, or else from global memory.
  __aicore__ inline LocalTensor<Word> TakePiece(const LocalTensor<Word>& tile, bool whole,
                                                int64_t at, int64_t start) {
    if (whole) return tile[static_cast<uint32_t>(start)];
    CopyIn(at + start, 1, PieceLen(start));
    return in_.template DeQue<Word>();
  }

  // ---- both -------------------------------------------------------------------------------------

  __aicore__ inline void MakeGroupWords(uint32_t groups) {
    words_.FromSums(groups, one_over_n_, eps_);
    if (has_scales_) {
      const LocalTensor<float> scales = scales_out_.template AllocTensor<float>();
      words_.WriteScales(scales, groups);
      scales_out_.EnQue(scales);
    }
  }

  // Expects the magnitudes of w in the scratch and turns them into masks: ones where the level is
  // taken.
  __aicore__ inline void WriteLevels(const LocalTensor<Word>& w, uint32_t groups, uint32_t stride) {
    const uint32_t count = groups * stride, blocks = stride / kElements;
    const LocalTensor<Word> mask = Magnitudes();
    LocalTensor<Word> wq;
    combine<SubtractFromGroup>(mask, mask, words_.threshold_blocks, groups, blocks);
    if (has_wq_) {
      wq = out_.template AllocTensor<Word>();
      combine<AndGroup>(words(wq), words(w), words(words_.sign_blocks), groups, blocks);
    }
    then();
    AscendC::ShiftRight(mask, mask, static_cast<Word>(8 * sizeof(Word) - 1),
                        static_cast<int32_t>(count));
    if (has_wq_) {
      combine<OrGroup>(words(wq), words(wq), words(words_.level_blocks), groups, blocks);
      then();
      AscendC::And(words(wq), words(wq), words(mask),
                   static_cast<int32_t>(count * (sizeof(Word) / sizeof(int16_t))));
      out_.EnQue(wq);
    }
    then();
    if (has_codes_) WriteCodes(w, groups, stride);
  }

  // (w < 0 ? -1 : 1) under the mask, 0 in bad groups, and narrowed step by step to int8.
  __aicore__ inline void WriteCodes(const LocalTensor<Word>& w, uint32_t groups, uint32_t stride) {
    const uint32_t count = groups * stride, blocks = stride / kElements;
    const LocalTensor<Word> mask = Magnitudes(), code = second_buffer_.template Get<Word>();
    AscendC::ShiftRight(code, w, static_cast<Word>(8 * sizeof(Word) - 1),
                        static_cast<int32_t>(count));
    then();
    combine<OrGroup>(words(code), words(code), words(one_block_), 1, count / kElements);
    then();
    AscendC::And(words(code), words(code), words(mask),
                 static_cast<int32_t>(count * (sizeof(Word) / sizeof(int16_t))));
    then();
    combine<AndGroup>(words(code), words(code), words(words_.good_blocks), groups, blocks);
    then();
    const uint32_t code_stride = groups > 1 ? tiling_.code_stride : blocks_up(stride, 32) * 32;
    const uint32_t code_count = groups * code_stride;
    LocalTensor<half> halves;
    if constexpr (Format::kIs16Bit) {
      halves = view<half>(second_buffer_.template Get<Word>()[tiling_.piece]);
      Spread(halves, code, groups, stride, code_stride);
    } else {
      const LocalTensor<int16_t> narrow = magnitude_buffer_.template Get<int16_t>();
      Spread(narrow, code, groups, stride, code_stride);
      halves = second_buffer_.template Get<half>();
      AscendC::Cast(halves, narrow, AscendC::RoundMode::CAST_NONE, code_count);
      then();
    }
    const LocalTensor<int8_t> codes = codes_out_.template AllocTensor<int8_t>();
    AscendC::Cast(codes, halves, AscendC::RoundMode::CAST_NONE, code_count);
    codes_out_.EnQue(codes);
  }

  // Cast, from groups `stride` elements apart to groups `code_stride` apart, with zeros between.
  template <class To, class From>
  __aicore__ inline void Spread(const LocalTensor<To>& dst, const LocalTensor<From>& src,
                                uint32_t groups, uint32_t stride, uint32_t code_stride) {
    if (stride == code_stride) {
      AscendC::Cast(dst, src, AscendC::RoundMode::CAST_NONE, groups * stride);
      then();
      return;
    }
    AscendC::Duplicate(view<int16_t>(dst), static_cast<int16_t>(0),
                       static_cast<int32_t>(groups * code_stride));
    then();
    constexpr uint32_t kLanes = kBlocksPerRepeat * kBlockBytes / sizeof(From);
    constexpr uint32_t kFrom = kBlockBytes / sizeof(From), kTo = kBlockBytes / sizeof(To);
    if (code_stride / kTo <= kMaxStride && stride / kFrom <= kMaxStride && groups > 1) {
      const AscendC::UnaryRepeatParams strides(1, 1, to_uint8(code_stride / kTo),
                                               to_uint8(stride / kFrom));
      for (uint32_t g = 0; g < groups; g += kMaxRepeats)
        for (uint32_t at = 0; at < stride; at += kLanes)
          AscendC::Cast(dst[g * code_stride + at], src[g * stride + at],
                        AscendC::RoundMode::CAST_NONE,
                        static_cast<uint64_t>(least(kLanes, stride - at)),
                        to_uint8(least(kMaxRepeats, groups - g)), strides);
    } else {
      for (uint32_t g = 0; g < groups; ++g)
        AscendC::Cast(dst[g * code_stride], src[g * stride], AscendC::RoundMode::CAST_NONE, stride);
    }
    then();
  }

  __aicore__ inline void CopyOut(int64_t at, uint32_t rows, uint32_t len) {
    if (has_wq_) {
      LocalTensor<Word> wq = out_.template DeQue<Word>();
      copy_out(wq_[static_cast<uint64_t>(at)], wq, rows, len);
      out_.FreeTensor(wq);
    }
    if (has_codes_) {
      LocalTensor<int8_t> codes = codes_out_.template DeQue<int8_t>();
      copy_out(codes_[static_cast<uint64_t>(at)], codes, rows, len);
      codes_out_.FreeTensor(codes);
    }
  }

  __aicore__ inline void CopyScalesOut(int64_t group, uint32_t groups) {
    if (!has_scales_) return;
    LocalTensor<float> scales = scales_out_.template DeQue<float>();
    copy_out(scales_[static_cast<uint64_t>(group)], scales, 1, groups);
    scales_out_.FreeTensor(scales);
  }

  GroupTiling tiling_;
  float one_over_n_, eps_;
  bool has_wq_, has_codes_, has_scales_, many_;
  AscendC::GlobalTensor<Word> w_, wq_;
  AscendC::GlobalTensor<int8_t> codes_;
  AscendC::GlobalTensor<float> scales_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> in_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> out_, codes_out_, scales_out_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> magnitude_buffer_, second_buffer_, group_buffer_,
      partial_buffer_, constants_;
  LocalTensor<Word> mask_block_, one_block_;
  LocalTensor<float> lanes_, partial_;
  GroupWords<Format> words_;
};

template <class Format>
__aicore__ inline void run_fake_quantize(GM_ADDR w, GM_ADDR wq, GM_ADDR codes, GM_ADDR scales,
                                         const FakeQuantizeTiling& tiling) {
  AscendC::TPipe pipe;
  FakeQuantize<Format> op;
  op.Init(&pipe, w, wq, codes, scales, tiling);
  op.Process();
}

}  // namespace bitcpm::ascend

extern "C" __global__ __vector__ void bitcpm_fake_quantize_f32(
    GM_ADDR w, GM_ADDR wq, GM_ADDR codes, GM_ADDR scales,
    bitcpm::ascend::FakeQuantizeTiling tiling) {
  bitcpm::ascend::run_fake_quantize<bitcpm::ascend::Float32>(w, wq, codes, scales, tiling);
}

extern "C" __global__ __vector__ void bitcpm_fake_quantize_bf16(
    GM_ADDR w, GM_ADDR wq, GM_ADDR codes, GM_ADDR scales,
    bitcpm::ascend::FakeQuantizeTiling tiling) {
  bitcpm::ascend::run_fake_quantize<bitcpm::ascend::BFloat16>(w, wq, codes, scales, tiling);
}

extern "C" __global__ __vector__ void bitcpm_fake_quantize_f16(
    GM_ADDR w, GM_ADDR wq, GM_ADDR codes, GM_ADDR scales,
    bitcpm::ascend::FakeQuantizeTiling tiling) {
  bitcpm::ascend::run_fake_quantize<bitcpm::ascend::Float16>(w, wq, codes, scales, tiling);
}

#ifndef BITCPM_HOST_CHECK
namespace bitcpm::ascend {

void launch_fake_quantize(DType dtype, void* stream, const void* w, void* wq, void* codes,
                          void* scales, const FakeQuantizeTiling& tiling) {
  const uint32_t blocks = tiling.groups.blocks;
  if (blocks == 0) return;
  const auto from = (GM_ADDR) const_cast<void*>(w);
  const auto to = (GM_ADDR)wq, to_codes = (GM_ADDR)codes, to_scales = (GM_ADDR)scales;
  switch (dtype) {
    case DType::kFloat32:
      bitcpm_fake_quantize_f32<<<blocks, nullptr, stream>>>(from, to, to_codes, to_scales, tiling);
      break;
    case DType::kBFloat16:
      bitcpm_fake_quantize_bf16<<<blocks, nullptr, stream>>>(from, to, to_codes, to_scales, tiling);
      break;
    case DType::kFloat16:
      bitcpm_fake_quantize_f16<<<blocks, nullptr, stream>>>(from, to, to_codes, to_scales, tiling);
      break;
  }
}

}  // namespace bitcpm::ascend
#endif
