// What the tilings have to know of the machine; no CANN header, so that host checks build it too.
#pragma once

#include <cstdint>

namespace bitcpm::ascend {

// As the platform reports it; never hard-coded.
struct Device {
  uint32_t vector_cores;
  uint32_t ub_bytes;  // unified buffer of one vector core
};

// Of the unified buffer kernels know 192 KiB, of which default builds keep 8 KiB for the compiler.
constexpr int64_t kMaxUbBytes = 192 * 1024;
constexpr int64_t kCompilerUbBytes = 8 * 1024;

constexpr uint32_t kDataBlock = 32;     // bytes; the grain of every vector operand and local copy
constexpr uint32_t kMaxCopyRows = 4095;  // blocks of one DataCopyPad

constexpr int64_t divide_up(int64_t number, int64_t by) { return (number + by - 1) / by; }
constexpr int64_t align_up(int64_t number, int64_t to) { return divide_up(number, to) * to; }
constexpr int64_t align_down(int64_t number, int64_t to) { return number / to * to; }
constexpr int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t usable_ub(const Device& device) {
  return lesser(device.ub_bytes, kMaxUbBytes) - kCompilerUbBytes;
}

// Why a tiling cannot be made; the launcher turns it into one line.
enum class TilingStatus : int32_t {
  kOk = 0,
  kNoCores = 1,       // the platform reports no vector core
  kSmallBuffer = 2,   // the unified buffer is too small for one piece of work
  kBadShape = 3,      // negative sizes, or a group that does not divide the row
};

constexpr const char* describe(TilingStatus status) {
  switch (status) {
    case TilingStatus::kOk: return "ok";
    case TilingStatus::kNoCores: return "the device reports no vector cores";
    case TilingStatus::kSmallBuffer: return "the device's unified buffer is below 32 KiB";
    case TilingStatus::kBadShape: return "the group does not divide the row";
  }
  return "unknown";
}

// Even shares: core i takes `per_core` units, and one more while i < extra.
struct Shares {
  int64_t per_core;
  int64_t extra;
  uint32_t blocks;  // cores that have work, the blockDim; 0 = nothing to do
};

constexpr Shares share_out(int64_t units, uint32_t vector_cores) {
  const int64_t blocks = lesser(units, vector_cores);
  if (blocks == 0) return {0, 0, 0};
  return {units / blocks, units % blocks, static_cast<uint32_t>(blocks)};
}

}  // namespace bitcpm::ascend
