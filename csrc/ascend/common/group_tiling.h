// How the groups of a contiguous matrix are cut into pieces of work; pure C++, host side.
//
// A matrix is a run of groups of equal length. Short groups go many at a time: one copy brings a
// tile of them. A group that is too long for that is a tile of its own, kept whole in its own type
// and worked through piece by piece; the longest groups are read from global memory piece by piece,
// and twice where the sum is needed before the levels.
#pragma once

#include <cstdint>

#include "../../common/contract.h"
#include "device.h"

namespace bitcpm::ascend {

enum class GroupPlan : int32_t {
  kManyGroups = 0,  // a tile is `tile_groups` groups
  kWholeGroup = 1,  // a tile is one group, worked through in pieces of `piece` elements
  kPieces = 2,      // a tile is one piece of a group
};

// Passed to the kernels by value.
struct GroupTiling {
  int64_t num_groups;
  int64_t group_len;  // elements
  int64_t groups_per_core;
  int64_t extra_groups;  // the first cores take one more
  uint32_t blocks;       // blockDim; 0 = nothing to do
  GroupPlan plan;
  uint32_t stride;       // elements from group to group in the unified buffer: whole data blocks
  uint32_t code_stride;  // the same for int8 codes
  uint32_t tile_groups;
  uint32_t piece;        // elements; a multiple of the 64 lanes of a sum
};

// Bytes of the unified buffer that an operator needs.
struct GroupCosts {
  int64_t element_size;
  int64_t whole_in;       // per element of the input tile, both buffers
  int64_t rest;           // per element of a piece: outputs (both buffers) and scratch
  int64_t code_rest;      // per padded code: both output buffers and scratch
  int64_t per_group;      // per group of a tile
  int64_t fixed;          // constants and accumulators
  bool keeps_group_whole;  // whether kWholeGroup is of use: the group is needed twice
};

constexpr int64_t kMaxTileGroups = 255 * 8;  // one Brcb broadcasts 8 groups in each repeat
constexpr int64_t kGroupGrain = 16;   // per-group vectors are whole blocks of 16-bit words
constexpr int64_t kPieceGrain = 128;  // elements
constexpr int64_t kMinPiece = 512;

constexpr TilingStatus cut_groups(int64_t num_groups, int64_t group_len, const GroupCosts& costs,
                                  const Device& device, GroupTiling* tiling) {
  if (num_groups < 0 || group_len < 0) return TilingStatus::kBadShape;
  if (device.vector_cores == 0) return TilingStatus::kNoCores;
  *tiling = GroupTiling{};
  tiling->num_groups = num_groups;
  tiling->group_len = group_len;
  if (num_groups == 0 || group_len == 0) return TilingStatus::kOk;
  const Shares shares = share_out(num_groups, device.vector_cores);
  tiling->groups_per_core = shares.per_core;
  tiling->extra_groups = shares.extra;
  tiling->blocks = shares.blocks;

  const int64_t room = usable_ub(device) - costs.fixed;
  const int64_t stride = align_up(group_len, kDataBlock / costs.element_size);
  const int64_t code_stride = align_up(group_len, kDataBlock);
  const int64_t group_bytes =
      stride * (costs.whole_in + costs.rest) + code_stride * costs.code_rest + costs.per_group;
  int64_t groups = (room - (kGroupGrain - 1) * costs.per_group) / group_bytes;
  if (groups >= 1) {
    groups = lesser(lesser(groups, kMaxTileGroups), divide_up(num_groups, shares.blocks));
    if (groups > kGroupGrain) groups = align_down(groups, kGroupGrain);
    tiling->plan = GroupPlan::kManyGroups;
    tiling->stride = static_cast<uint32_t>(stride);
    tiling->code_stride = static_cast<uint32_t>(code_stride);
    tiling->tile_groups = static_cast<uint32_t>(groups);
    tiling->piece = static_cast<uint32_t>(groups * stride);
    return TilingStatus::kOk;
  }
  tiling->tile_groups = 1;
  const int64_t piece_room = room - kGroupGrain * costs.per_group;
  const int64_t rest = costs.rest + costs.code_rest;
  int64_t piece = align_down((piece_room - stride * costs.whole_in) / rest, kPieceGrain);
  tiling->plan = GroupPlan::kWholeGroup;
  tiling->stride = static_cast<uint32_t>(stride);
  if (!costs.keeps_group_whole || piece_room < stride * costs.whole_in || piece < kMinPiece) {
    piece = align_down(piece_room / (rest + costs.whole_in), kPieceGrain);
    tiling->plan = GroupPlan::kPieces;
    tiling->stride = static_cast<uint32_t>(piece);
    if (piece < kMinPiece) return TilingStatus::kSmallBuffer;
  }
  // Pieces of about equal length, so that the last is no crumb.
  const int64_t pieces = divide_up(group_len, piece);
  piece = align_up(divide_up(group_len, pieces), kPieceGrain);
  tiling->piece = static_cast<uint32_t>(piece);
  if (tiling->plan == GroupPlan::kPieces) tiling->stride = static_cast<uint32_t>(piece);
  tiling->code_stride = static_cast<uint32_t>(piece);
  return TilingStatus::kOk;
}

// Groups per matrix; false when the group does not divide the row.
constexpr bool count_matrix_groups(int64_t rows, int64_t cols, int64_t group_len,
                                   int64_t* num_groups) {
  if (rows < 0 || cols < 0 || group_len < 0) return false;
  if (cols == 0 || rows == 0) {
    *num_groups = 0;
    return true;
  }
  if (group_len == 0 || cols % group_len) return false;
  *num_groups = rows * (cols / group_len);
  return true;
}

// float32(1 / n), as the reference has it.
constexpr float invert_length(int64_t group_len) {
  return group_len ? static_cast<float>(1.0 / static_cast<double>(group_len)) : 0.0f;
}

}  // namespace bitcpm::ascend
