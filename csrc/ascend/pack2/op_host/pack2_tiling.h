// Tiling of pack2: pure C++, no CANN.
//
// Rows are cut into segments of whole 128-code blocks; short rows go many at a time.
#pragma once

#include "../../../common/contract.h"
#include "../../common/device.h"

namespace bitcpm::ascend {

// Passed to the kernel by value.
struct Pack2Tiling {
  int64_t rows;
  int64_t cols;             // codes of a row
  int64_t segments;         // per row
  int64_t units_per_core;   // a unit is one segment of one row
  int64_t extra_units;
  uint32_t blocks;          // blockDim; 0 = nothing to do
  uint32_t segment;         // codes, a multiple of 128
  uint32_t tile_units;      // rows of one tile; 1 where a row has several segments
};

constexpr TilingStatus make_pack2_tiling(int64_t rows, int64_t cols, const Device& device,
                                         Pack2Tiling* tiling) {
  if (rows < 0 || cols < 0) return TilingStatus::kBadShape;
  if (device.vector_cores == 0) return TilingStatus::kNoCores;
  *tiling = Pack2Tiling{};
  tiling->rows = rows;
  tiling->cols = cols;
  if (rows == 0 || cols == 0) return TilingStatus::kOk;
  // Per code: both input buffers, a scratch copy, and both output buffers of a quarter byte.
  const int64_t fixed = 1024;
  const int64_t block_bytes = kPackInputs * 2 + kPackInputs + 2 * kPackBytes + kPackBytes;
  const int64_t room_blocks = (usable_ub(device) - fixed) / block_bytes;
  if (room_blocks < 1) return TilingStatus::kSmallBuffer;
  const int64_t row_blocks = count_pack_blocks(cols);
  const int64_t segments = divide_up(row_blocks, room_blocks);
  const int64_t segment_blocks = divide_up(row_blocks, segments);
  tiling->segments = divide_up(row_blocks, segment_blocks);
  const int64_t units = rows * tiling->segments;
  const Shares shares = share_out(units, device.vector_cores);
  tiling->units_per_core = shares.per_core;
  tiling->extra_units = shares.extra;
  tiling->blocks = shares.blocks;
  tiling->segment = static_cast<uint32_t>(segment_blocks * kPackInputs);
  const int64_t per_tile =
      tiling->segments > 1 ? 1 : lesser(room_blocks / row_blocks, kMaxCopyRows);
  tiling->tile_units = static_cast<uint32_t>(lesser(per_tile, divide_up(units, shares.blocks)));
  return TilingStatus::kOk;
}

}  // namespace bitcpm::ascend
