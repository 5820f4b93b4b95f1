// DataCopy and DataCopyPad between global memory and the unified buffer.
// Gaps run from the end of a block to the start of the next: bytes on the global side, 32-byte
// blocks in the unified buffer. Facts: the data copy pages of asc-devkit.
#pragma once

#include "hc_operand.h"

namespace host_check {

constexpr uint32_t kMaxCopyBlocks = 4095;
constexpr uint32_t kMaxCopyLength = 2097151;

template <typename T>
inline void check_copy(const AscendC::DataCopyExtParams& p) {
  if (p.blockCount > kMaxCopyBlocks) {
    fail("copy-params", "DataCopyPad: blockCount %u, must be 0..%u",
         static_cast<unsigned>(p.blockCount), kMaxCopyBlocks);
  }
  if (p.blockLen > kMaxCopyLength || p.blockLen % sizeof(T) != 0) {
    fail("copy-params", "DataCopyPad: blockLen %u, must be 0..%u and a multiple of %d", p.blockLen,
         kMaxCopyLength, static_cast<int>(sizeof(T)));
  }
}

// One block in: `bytes` from global memory after `left` bytes of padding, up to whole 32 bytes.
struct Padding {
  bool defined = false;   // every added lane holds `lane`, else its value counts as undefined
  uint32_t left = 0;      // bytes
  uint32_t right = 0;
  const void* lane = nullptr;
  uint32_t element = 1;
};

inline void fill_lanes(uint8_t* to, uint32_t bytes, const void* lane, uint32_t element) {
  for (uint32_t i = 0; i < bytes; i += element) std::memcpy(to + i, lane, element);
}

inline void copy_block_in(uint32_t to, const uint8_t* from, uint32_t bytes, const Padding& pad) {
  Core& now = core();
  const char* what = "DataCopyPad";
  now.memory.read(from, bytes, now.sequence(), what, [&now](uint32_t number) {
    return now.follows(PIPE_MTE2, PIPE_MTE3, number);
  });
  const uint32_t used = pad.left + bytes + pad.right;
  const uint32_t whole = (used + kBlock - 1) / kBlock * kBlock;
  const Run run{to, to + whole};
  check_write(PIPE_MTE2, run, what);
  note_write(PIPE_MTE2, run);
  std::memcpy(now.ub + to + pad.left, from, bytes);
  const Run before{to, to + pad.left};
  const Run after{to + pad.left + bytes, to + whole};
  if (pad.defined) {
    fill_lanes(now.ub + before.begin, pad.left, pad.lane, pad.element);
    fill_lanes(now.ub + after.begin, after.end - after.begin, pad.lane, pad.element);
    return;
  }
  const auto garbage = [&now](uint32_t i, uint32_t mask) { now.note_garbage(i, mask); };
  each_block(before, garbage);
  each_block(after, garbage);
}

inline void copy_block_out(uint8_t* to, uint32_t from, uint32_t bytes) {
  Core& now = core();
  const char* what = "DataCopyPad";
  const Run run{from, from + bytes};
  check_read(PIPE_MTE3, run, what);
  note_read(PIPE_MTE3, run);
  now.memory.write(
      to, bytes, now.sequence(), what,
      [&now](uint32_t number) { return now.follows(PIPE_MTE3, PIPE_MTE3, number); },
      [&now](uint32_t number) { return now.follows(PIPE_MTE3, PIPE_MTE2, number); });
  std::memcpy(to, now.ub + from, bytes);
}

// `unit_gap` blocks of 32 bytes lie between blocks in the unified buffer.
inline uint32_t ub_place(const View& view, uint32_t block, uint32_t padded, uint32_t unit_gap) {
  return view.address + block * (padded + unit_gap * kBlock);
}

inline void check_position(const View& view, bool in, const char* what) {
  const AscendC::TPosition position = core().owner(view, what).position;
  if (in && position == AscendC::TPosition::VECCALC) {
    fail("dma-position", "%s from global memory into VECCALC; the target is VECIN or VECOUT", what);
  }
  if (!in && position == AscendC::TPosition::VECCALC) {
    fail("dma-position", "%s to global memory from VECCALC; the source is VECIN or VECOUT", what);
  }
}

}  // namespace host_check

namespace AscendC {

template <typename T>
inline void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src,
                        const DataCopyExtParams& p, const DataCopyPadExtParams<T>& pad) {
  using host_check::kBlock;
  const char* what = "DataCopyPad";
  host_check::check_copy<T>(p);
  host_check::check_position(dst.view(), true, what);
  host_check::Core& core = host_check::core();
  ++core.meter.copies;
  if (p.blockCount == 0 || p.blockLen == 0) return;
  host_check::Padding padding;
  // With both counts 0 the page promises the first element in the added lanes; a kernel that wants
  // a value there says so by isPad and a count.
  padding.defined = pad.isPad && (pad.leftPadding != 0 || pad.rightPadding != 0);
  padding.left = static_cast<uint32_t>(pad.leftPadding * sizeof(T));
  padding.right = static_cast<uint32_t>(pad.rightPadding * sizeof(T));
  padding.lane = &pad.paddingValue;
  padding.element = sizeof(T);
  if (padding.left > kBlock || padding.right > kBlock) {
    host_check::fail("copy-params", "DataCopyPad: padding of %u and %u bytes, each at most 32",
                     padding.left, padding.right);
  }
  const uint32_t used = padding.left + p.blockLen + padding.right;
  const uint32_t padded = (used + kBlock - 1) / kBlock * kBlock;
  const uint64_t extent = uint64_t{p.blockCount} * padded +
                          uint64_t{p.blockCount - 1u} * p.dstStride * kBlock;
  (void)host_check::run_of(dst.view(), extent, kBlock, "dst", what);
  const uint64_t pitch = uint64_t{p.blockLen} + p.srcStride;
  if (pitch % sizeof(T) != 0) {
    host_check::fail("copy-params", "DataCopyPad: srcStride %u bytes splits an element",
                     p.srcStride);
  }
  src.check_extent(0, ((p.blockCount - 1u) * pitch + p.blockLen) / sizeof(T), what);
  core.next_instruction();
  const uint8_t* from = reinterpret_cast<const uint8_t*>(src.GetPhyAddr());
  for (uint32_t b = 0; b < p.blockCount; ++b) {
    host_check::copy_block_in(host_check::ub_place(dst.view(), b, padded, p.dstStride),
                              from + b * pitch, p.blockLen, padding);
  }
  core.meter.bytes_read += uint64_t{p.blockCount} * p.blockLen;
}

template <typename T>
inline void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src,
                        const DataCopyExtParams& p) {
  using host_check::kBlock;
  const char* what = "DataCopyPad";
  host_check::check_copy<T>(p);
  host_check::check_position(src.view(), false, what);
  host_check::Core& core = host_check::core();
  ++core.meter.copies;
  if (p.blockCount == 0 || p.blockLen == 0) return;
  const uint32_t padded = (p.blockLen + kBlock - 1) / kBlock * kBlock;
  const uint64_t extent = uint64_t{p.blockCount - 1u} * (padded + uint64_t{p.srcStride} * kBlock) +
                          p.blockLen;
  (void)host_check::run_of(src.view(), extent, kBlock, "src", what);
  const uint64_t pitch = uint64_t{p.blockLen} + p.dstStride;
  if (pitch % sizeof(T) != 0) {
    host_check::fail("copy-params", "DataCopyPad: dstStride %u bytes splits an element",
                     p.dstStride);
  }
  dst.check_extent(0, ((p.blockCount - 1u) * pitch + p.blockLen) / sizeof(T), what);
  core.next_instruction();
  uint8_t* to = reinterpret_cast<uint8_t*>(dst.GetPhyAddr());
  for (uint32_t b = 0; b < p.blockCount; ++b) {
    host_check::copy_block_out(to + b * pitch,
                               host_check::ub_place(src.view(), b, padded, p.srcStride),
                               p.blockLen);
  }
  core.meter.bytes_written += uint64_t{p.blockCount} * p.blockLen;
}

// DataCopy drops what does not fill 32 bytes, without a word: refused here.
template <typename T>
inline void check_whole_blocks(uint64_t count) {
  if (count * sizeof(T) % host_check::kBlock != 0) {
    host_check::fail("datacopy-rounding", "DataCopy of %llu elements of %d bytes rounds down to 32",
                     static_cast<unsigned long long>(count), static_cast<int>(sizeof(T)));
  }
}

template <typename T>
inline void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src,
                     host_check::Count count) {
  check_whole_blocks<T>(count);
  DataCopyPad(dst, src,
              DataCopyExtParams(1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0),
              DataCopyPadExtParams<T>());
}
template <typename T>
inline void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src,
                     host_check::Count count) {
  check_whole_blocks<T>(count);
  DataCopyPad(dst, src, DataCopyExtParams(1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0));
}
// Lengths and gaps of DataCopyParams count 32-byte blocks on both sides.
template <typename T>
inline void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src,
                     const DataCopyParams& p) {
  DataCopyPad(dst, src,
              DataCopyExtParams(p.blockCount, p.blockLen * host_check::kBlock,
                                p.srcGap * host_check::kBlock, p.dstGap, 0),
              DataCopyPadExtParams<T>());
}
template <typename T>
inline void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src,
                     const DataCopyParams& p) {
  DataCopyPad(dst, src,
              DataCopyExtParams(p.blockCount, p.blockLen * host_check::kBlock, p.srcGap,
                                p.dstGap * host_check::kBlock, 0));
}

}  // namespace AscendC
