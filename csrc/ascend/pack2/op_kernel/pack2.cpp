// pack2: int8 codes to two bits each; docs/quantizer.md has the layout.
//
// A block of 128 codes is four data blocks, and byte j of the result combines byte j of each: so
// everything happens within bytes, two at a time in 16-bit words, without any reordering. With c
// the code, its field is ((c & 3) + 1) & 3, which never carries into the next byte. A code outside
// {-1, 0, 1} therefore becomes the field (code + 1) mod 4.

#include "../../common/copies.h"
#include "../op_host/pack2_launch.h"

namespace bitcpm::ascend {

class Pack2 {
  static constexpr uint32_t kCodeWords = 16;    // 16-bit words in a data block of 32 codes
  static constexpr uint32_t kPlanes = 4;        // data blocks of a block of 128 codes
  static constexpr uint32_t kRepeatBlocks = 8;  // blocks of codes packed in one repeat

 public:
  __aicore__ inline Pack2() {}

  __aicore__ inline void Init(AscendC::TPipe* pipe, GM_ADDR codes, GM_ADDR packed,
                              const Pack2Tiling& tiling) {
    tiling_ = tiling;
    row_bytes_ = (tiling.cols + kPackInputs - 1) / kPackInputs * kPackBytes;
    codes_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(codes),
                           static_cast<uint64_t>(tiling.rows * tiling.cols));
    packed_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(packed),
                            static_cast<uint64_t>(tiling.rows * row_bytes_));
    const uint32_t size = tiling.tile_units * tiling.segment;
    pipe->InitBuffer(in_, 2, size);
    pipe->InitBuffer(out_, 2, size / kPlanes);
    pipe->InitBuffer(field_buffer_, size);
    pipe->InitBuffer(shift_buffer_, size / kPlanes);
    pipe->InitBuffer(constants_, kBlockBytes);
    three_block_ = constants_.Get<int16_t>();
    AscendC::Duplicate(three_block_, static_cast<int16_t>(0x0303),
                       static_cast<int32_t>(kCodeWords));
    then();
  }

  __aicore__ inline void Process() {
    const GroupRange mine = take_share(AscendC::GetBlockIdx(), tiling_.units_per_core,
                                       tiling_.extra_units);
    for (int64_t unit = mine.begin; unit < mine.end; unit += tiling_.tile_units) {
      const int64_t row = unit / tiling_.segments, segment = unit % tiling_.segments;
      const int64_t left = mine.end - unit, start = segment * tiling_.segment;
      const uint32_t rows = left < tiling_.tile_units ? static_cast<uint32_t>(left)
                                                      : tiling_.tile_units;
      const int64_t rest = tiling_.cols - start;
      const uint32_t len = rest < tiling_.segment ? static_cast<uint32_t>(rest) : tiling_.segment;
      const uint32_t blocks = blocks_up(len, static_cast<uint32_t>(kPackInputs));
      CopyIn(row * tiling_.cols + start, rows, len, blocks);
      Compute(rows, len, blocks);
      CopyOut(row * row_bytes_ + start / kPlanes, rows, blocks);
    }
  }

 private:
  // Rows of whole 128-code blocks; what the copy does not fill of the last one is left as it was.
  __aicore__ inline void CopyIn(int64_t at, uint32_t rows, uint32_t len, uint32_t blocks) {
    const LocalTensor<int8_t> codes = in_.AllocTensor<int8_t>();
    const uint32_t used = blocks_up(len, kBlockBytes), missing = used * kBlockBytes - len;
    const AscendC::DataCopyExtParams shape{to_uint16(rows), len, 0,
                                           blocks * kPlanes - used, 0};
    const AscendC::DataCopyPadExtParams<int8_t> pad{missing != 0, 0, to_uint8(missing),
                                                    static_cast<int8_t>(0)};
    AscendC::DataCopyPad(codes, codes_[static_cast<uint64_t>(at)], shape, pad);
    in_.EnQue(codes);
  }

  __aicore__ inline void Compute(uint32_t rows, uint32_t len, uint32_t blocks) {
    LocalTensor<int8_t> codes = in_.DeQue<int8_t>();
    const LocalTensor<int16_t> from = words(codes), fields = field_buffer_.Get<int16_t>();
    ClearRowEnds(from, rows, len, blocks);
    const uint32_t total = rows * blocks, planes = total * kPlanes;
    const int32_t count = static_cast<int32_t>(planes * kCodeWords);
    combine<AndGroup>(fields, from, three_block_, 1, planes);
    then();
    in_.FreeTensor(codes);
    AscendC::Adds(fields, fields, static_cast<int16_t>(0x0101), count);
    then();
    combine<AndGroup>(fields, fields, three_block_, 1, planes);
    then();
    const LocalTensor<int16_t> packed = words(out_.AllocTensor<int8_t>());
    CollectPlanes(packed, fields, total);
    out_.EnQue(view<int8_t>(packed));
  }

  // Codes past a row's end are 0: the data blocks that the copy left alone.
  __aicore__ inline void ClearRowEnds(const LocalTensor<int16_t>& codes, uint32_t rows,
                                      uint32_t len, uint32_t blocks) {
    const uint32_t used = blocks_up(len, kBlockBytes), stride = blocks * kPlanes;
    if (used == stride) return;
    for (uint32_t row = 0; row < rows; ++row)
      AscendC::Duplicate(codes[(row * stride + used) * kCodeWords], static_cast<int16_t>(0),
                         static_cast<int32_t>((stride - used) * kCodeWords));
    then();
  }

  // packed = plane 0 | plane 1 << 2 | plane 2 << 4 | plane 3 << 6, eight blocks in a repeat.
  __aicore__ inline void CollectPlanes(const LocalTensor<int16_t>& packed,
                                       const LocalTensor<int16_t>& fields, uint32_t total) {
    const LocalTensor<int16_t> shifted = shift_buffer_.Get<int16_t>();
    const uint32_t full = total / kRepeatBlocks, rest = total % kRepeatBlocks;
    for (uint32_t plane = 1; plane < kPlanes; ++plane) {
      for (uint32_t r = 0; r < full; r += kMaxRepeats)
        ShiftPlane(shifted, fields, plane, r * kRepeatBlocks, kRepeatBlocks,
                   least(kMaxRepeats, full - r));
      if (rest) ShiftPlane(shifted, fields, plane, full * kRepeatBlocks, rest, 1);
      then();
      for (uint32_t r = 0; r < full; r += kMaxRepeats)
        AddPlane(packed, fields, shifted, plane, r * kRepeatBlocks, kRepeatBlocks,
                 least(kMaxRepeats, full - r));
      if (rest) AddPlane(packed, fields, shifted, plane, full * kRepeatBlocks, rest, 1);
      then();
    }
  }

  // One call: `blocks` (at most 8) blocks of codes in each of `repeats` repeats, from `block` on.
  __aicore__ inline void ShiftPlane(const LocalTensor<int16_t>& shifted,
                                    const LocalTensor<int16_t>& fields, uint32_t plane,
                                    uint32_t block, uint32_t blocks, uint32_t repeats) {
    AscendC::ShiftLeft(view<uint16_t>(shifted[block * kCodeWords]),
                       view<uint16_t>(fields[(block * kPlanes + plane) * kCodeWords]),
                       static_cast<uint16_t>(2 * plane), static_cast<uint64_t>(blocks * kCodeWords),
                       to_uint8(repeats),
                       AscendC::UnaryRepeatParams(1, kPlanes, kRepeatBlocks,
                                                  kPlanes * kRepeatBlocks));
  }

  // The first of the shifted planes meets plane 0, the others what has been collected.
  __aicore__ inline void AddPlane(const LocalTensor<int16_t>& packed,
                                  const LocalTensor<int16_t>& fields,
                                  const LocalTensor<int16_t>& shifted, uint32_t plane,
                                  uint32_t block, uint32_t blocks, uint32_t repeats) {
    const bool first = plane == 1;
    const uint32_t stride = first ? kPlanes : 1;
    const LocalTensor<int16_t> with =
        first ? fields[block * kPlanes * kCodeWords] : packed[block * kCodeWords];
    AscendC::Or(packed[block * kCodeWords], with, shifted[block * kCodeWords],
                static_cast<uint64_t>(blocks * kCodeWords), to_uint8(repeats),
                AscendC::BinaryRepeatParams(1, to_uint8(stride), 1, kRepeatBlocks,
                                            to_uint8(stride * kRepeatBlocks), kRepeatBlocks));
  }

  __aicore__ inline void CopyOut(int64_t at, uint32_t rows, uint32_t blocks) {
    LocalTensor<int8_t> packed = out_.DeQue<int8_t>();
    copy_out(packed_[static_cast<uint64_t>(at)], packed, rows,
             blocks * static_cast<uint32_t>(kPackBytes));
    out_.FreeTensor(packed);
  }

  Pack2Tiling tiling_;
  int64_t row_bytes_;
  AscendC::GlobalTensor<int8_t> codes_, packed_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> in_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> out_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> field_buffer_, shift_buffer_, constants_;
  LocalTensor<int16_t> three_block_;
};

}  // namespace bitcpm::ascend

extern "C" __global__ __vector__ void bitcpm_pack2(GM_ADDR codes, GM_ADDR packed,
                                                   bitcpm::ascend::Pack2Tiling tiling) {
  AscendC::TPipe pipe;
  bitcpm::ascend::Pack2 op;
  op.Init(&pipe, codes, packed, tiling);
  op.Process();
}

#ifndef BITCPM_HOST_CHECK
namespace bitcpm::ascend {

void launch_pack2(void* stream, const void* codes, void* packed, const Pack2Tiling& tiling) {
  if (tiling.blocks == 0) return;
  bitcpm_pack2<<<tiling.blocks, nullptr, stream>>>((GM_ADDR) const_cast<void*>(codes),
                                                   (GM_ADDR)packed, tiling);
}

}  // namespace bitcpm::ascend
#endif
