// |w| of a piece of work: as words for the thresholds, as float32 for the sums.
#pragma once

#include "formats.h"
#include "vector_ops.h"

namespace bitcpm::ascend {

// dst = w without its signs; `mask` is a data block of Format::kMagnitude. `count` elements, whole
// data blocks.
template <class Format>
__aicore__ inline void take_magnitudes(const LocalTensor<typename Format::Word>& dst,
                                       const LocalTensor<typename Format::Word>& w,
                                       const LocalTensor<typename Format::Word>& mask,
                                       uint32_t count) {
  constexpr uint32_t kElements = kBlockBytes / sizeof(typename Format::Word);
  combine<AndGroup>(words(dst), words(w), words(mask), 1, count / kElements);
  then();
}

// The magnitudes in float32, to be summed. 16-bit types are converted into `scratch`; float32 is
// summed where it is, which destroys the first 64 of each group.
template <class Format>
__aicore__ inline LocalTensor<float> decode_magnitudes(
    const LocalTensor<typename Format::Word>& magnitudes, const LocalTensor<float>& scratch,
    uint32_t count) {
  if constexpr (Format::kIs16Bit) {
    AscendC::Cast(scratch, view<typename Format::Native>(magnitudes), AscendC::RoundMode::CAST_NONE,
                  count);
    then();
    return scratch;
  } else {
    return view<float>(magnitudes);
  }
}

}  // namespace bitcpm::ascend
