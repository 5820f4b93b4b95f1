// Two-bit rows of ternary codes; the layout is in common/contract.h.
#pragma once

#include "../common/contract.h"
#include "vectors.h"

namespace bitcpm {
namespace {

// A quarter of a block is as wide on every instruction set; the compiler splits it where needed.
typedef uint8_t Quarter __attribute__((vector_size(kPackBytes)));
typedef uint32_t QuarterU32 __attribute__((vector_size(kPackBytes)));
typedef uint64_t QuarterU64 __attribute__((vector_size(kPackBytes)));
constexpr int kQuarters = kPackInputs / kPackBytes;

inline bool any(Quarter mask) {
  const QuarterU64 words = (QuarterU64)mask;
  return (words[0] | words[1] | words[2] | words[3]) != 0;
}

// Marks codes other than -1, 0, 1 in `bad`.
inline Quarter pack_block(const int8_t* codes, Quarter& bad) {
  QuarterU32 bytes = {};
  for (int k = 0; k < kQuarters; ++k) {
    const Quarter field = load<Quarter>(codes + k * kPackBytes) + 1;
    bad |= (Quarter)(field > 2);
    // In two bits nothing is shifted into a neighbouring byte.
    bytes |= (QuarterU32)(field & 3) << (2 * k);
  }
  return (Quarter)bytes;
}

// Marks fields of 3 in `bad`, also behind the row's end.
inline void unpack_block(Quarter bytes, int8_t* codes, Quarter& bad) {
  bad |= bytes & (Quarter)((QuarterU32)bytes >> 1) & 0x55;
  for (int k = 0; k < kQuarters; ++k) {
    const Quarter field = (Quarter)((QuarterU32)bytes >> (2 * k)) & 3;
    store(codes + k * kPackBytes, field - 1);
  }
}

inline int64_t pack_rows(const int8_t* codes, uint8_t* packed, int64_t rows, int64_t cols) {
  int64_t first_bad = -1;
  for (int64_t row = 0; row < rows; ++row, codes += cols) {
    Quarter bad = {};
    int64_t i = 0;
    for (; i + kPackInputs <= cols; i += kPackInputs, packed += kPackBytes)
      store(packed, pack_block(codes + i, bad));
    if (i < cols) {
      int8_t last[kPackInputs] = {};
      std::memcpy(last, codes + i, static_cast<size_t>(cols - i));
      store(packed, pack_block(last, bad));
      packed += kPackBytes;
    }
    if (first_bad < 0 && any(bad)) first_bad = row;
  }
  return first_bad;
}

inline int64_t unpack_rows(const uint8_t* packed, int8_t* codes, int64_t rows, int64_t cols) {
  int64_t first_bad = -1;
  for (int64_t row = 0; row < rows; ++row, codes += cols) {
    Quarter bad = {};
    int64_t i = 0;
    for (; i + kPackInputs <= cols; i += kPackInputs, packed += kPackBytes)
      unpack_block(load<Quarter>(packed), codes + i, bad);
    if (i < cols) {
      int8_t last[kPackInputs];
      unpack_block(load<Quarter>(packed), last, bad);
      std::memcpy(codes + i, last, static_cast<size_t>(cols - i));
      packed += kPackBytes;
    }
    if (first_bad < 0 && any(bad)) first_bad = row;
  }
  return first_bad;
}

}  // namespace
}  // namespace bitcpm
