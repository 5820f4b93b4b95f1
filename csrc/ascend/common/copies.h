// Copies between global memory and the unified buffer.
#pragma once

#include "kernel_operator.h"
#include "vector_ops.h"

namespace bitcpm::ascend {

// Bring `rows` rows of `len` elements, contiguous in global memory, to rows that start at data
// blocks; the rest of a row's last block becomes 0.
template <class T>
__aicore__ inline void copy_in(const LocalTensor<T>& to, const AscendC::GlobalTensor<T>& from,
                               uint32_t rows, uint32_t len) {
  constexpr uint32_t kElements = kBlockBytes / sizeof(T);
  const uint32_t missing = blocks_up(len, kElements) * kElements - len;
  const bool dense = missing == 0;
  const AscendC::DataCopyExtParams shape{
      to_uint16(dense ? 1 : rows),
      static_cast<uint32_t>((dense ? rows : 1) * len * sizeof(T)), 0, 0, 0};
  const AscendC::DataCopyPadExtParams<T> pad{!dense, 0, to_uint8(missing),
                                             static_cast<T>(0)};
  AscendC::DataCopyPad(to, from, shape, pad);
}

// The way back; what fills up a row's last block stays behind.
template <class T>
__aicore__ inline void copy_out(const AscendC::GlobalTensor<T>& to, const LocalTensor<T>& from,
                                uint32_t rows, uint32_t len) {
  const bool dense = len * sizeof(T) % kBlockBytes == 0;
  const AscendC::DataCopyExtParams shape{
      to_uint16(dense ? 1 : rows),
      static_cast<uint32_t>((dense ? rows : 1) * len * sizeof(T)), 0, 0, 0};
  AscendC::DataCopyPad(to, from, shape);
}

// A run of groups; those of this core, or one tile of them.
struct GroupRange {
  int64_t begin, end;
};

// Even shares of the groups: the first `extra` cores take one more.
__aicore__ inline GroupRange take_share(int64_t core, int64_t per_core, int64_t extra) {
  const int64_t begin = core * per_core + (core < extra ? core : extra);
  return {begin, begin + per_core + (core < extra ? 1 : 0)};
}

}  // namespace bitcpm::ascend
