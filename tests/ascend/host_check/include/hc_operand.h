// Operands of vector instructions: how repeats, blocks and masks map to the unified buffer, and
// the checks that every instruction shares (alignment, extent, stride, overlap, shadow, order).
#pragma once

#include <cstdint>

#include "hc_core.h"
#include "hc_tensor.h"

namespace host_check {

// Which lanes of a repeat take part.
struct Lanes {
  uint64_t bits[2] = {0, 0};
  uint32_t first_n = 0;  // > 0: exactly the first n lanes, bits unused

  bool has(uint32_t lane) const {
    if (first_n != 0) return lane < first_n;
    return ((bits[lane >> 6] >> (lane & 63u)) & 1u) != 0;
  }
};

inline Lanes lanes_of_count(uint64_t mask, uint32_t lanes, const char* what) {
  if (mask == 0 || mask > lanes) {
    fail("mask-range", "%s with mask %llu, must be 1..%u", what,
         static_cast<unsigned long long>(mask), lanes);
  }
  Lanes result;
  result.first_n = static_cast<uint32_t>(mask);
  return result;
}

inline Lanes lanes_of_bits(const uint64_t mask[2], uint32_t lanes, const char* what) {
  Lanes result;
  result.bits[0] = mask[0];
  result.bits[1] = lanes > 64 ? mask[1] : 0;
  if (lanes <= 64 && mask[1] != 0) {
    fail("mask-range", "%s on 32-bit lanes with a nonzero mask[1]", what);
  }
  if (result.bits[0] == 0 && result.bits[1] == 0) fail("mask-range", "%s with an empty mask", what);
  return result;
}

// One instruction: `repeats` repeats of up to `lanes` lanes; the last repeat may be shorter
// (count form). In the count form operands are contiguous.
struct Shape {
  uint32_t repeats = 0;
  uint32_t lanes = 0;  // lanes of a full repeat, by the widest operand
  Lanes mask;          // every repeat but the last
  Lanes last;          // last repeat
};

inline Shape shape_of_count(uint32_t count, uint32_t lanes) {
  Shape shape;
  shape.lanes = lanes;
  shape.repeats = (count + lanes - 1) / lanes;
  shape.mask.first_n = lanes;
  const uint32_t rest = count % lanes;
  shape.last.first_n = rest == 0 ? lanes : rest;
  return shape;
}

inline Shape shape_of_mask(const Lanes& mask, uint32_t repeats, uint32_t lanes) {
  Shape shape;
  shape.lanes = lanes;
  shape.repeats = repeats;
  shape.mask = mask;
  shape.last = mask;
  return shape;
}

// A strided vector operand. Strides count 32-byte blocks.
struct Operand {
  const char* name = "";
  View view;
  uint32_t element = 0;  // bytes
  uint32_t block_stride = 1;
  uint32_t repeat_stride = 8;
  uint32_t first_block = 0;     // the rest is set by prepare()
  uint32_t blocks = 0;          // blocks that a repeat spans
  uint32_t bytes[8] = {};       // byte mask of each block, all repeats but the last
  uint32_t last_bytes[8] = {};

  uint32_t block(uint32_t repeat, uint32_t b) const {
    return first_block + repeat * repeat_stride + b * block_stride;
  }
  // Address of a lane; `per_block` is 32 / element.
  uint32_t address(uint32_t repeat, uint32_t lane) const {
    const uint32_t per_block = kBlock / element;
    return block(repeat, lane / per_block) * kBlock + lane % per_block * element;
  }
};

inline void block_masks(const Lanes& lanes, uint32_t element, uint32_t lanes_per_repeat,
                        uint32_t out[8]) {
  const uint32_t per_block = kBlock / element;
  const uint32_t lane_mask = static_cast<uint32_t>((uint64_t{1} << element) - 1);
  for (uint32_t b = 0; b < 8; ++b) {
    const uint32_t start = b * per_block;
    uint32_t bits = 0;
    if (lanes.first_n != 0) {
      const uint32_t end = lanes.first_n;
      const uint32_t n = end <= start ? 0 : (end - start < per_block ? end - start : per_block);
      bits = static_cast<uint32_t>((uint64_t{1} << (n * element)) - 1);
    } else {
      for (uint32_t l = 0; l < per_block && start + l < lanes_per_repeat; ++l) {
        if (lanes.has(start + l)) bits |= lane_mask << (l * element);
      }
    }
    out[b] = bits;
  }
}

inline void check_alignment(const View& view, uint32_t align, const char* name, const char* what) {
  if (view.address % align != 0) {
    fail("ub-misaligned", "%s: %s at address %u is not a multiple of %u bytes", what, name,
         view.address, align);
  }
}

inline void check_end(uint64_t end, const Buffer& buffer, const char* name, const char* what) {
  if (end > buffer.end) {
    fail("ub-out-of-bounds", "%s: %s reaches byte %llu, its buffer ends at %u", what, name,
         static_cast<unsigned long long>(end), buffer.end);
  }
}

// Alignment and extent; fills the block masks.
inline void prepare(Operand& operand, const Shape& shape, const char* what) {
  const Buffer& buffer = core().owner(operand.view, what);
  check_alignment(operand.view, kBlock, operand.name, what);
  block_masks(shape.mask, operand.element, shape.lanes, operand.bytes);
  block_masks(shape.last, operand.element, shape.lanes, operand.last_bytes);
  operand.first_block = operand.view.address / kBlock;
  operand.blocks = 0;
  uint64_t end = 0;
  for (uint32_t b = 0; b < 8; ++b) {
    const uint32_t masks[2] = {shape.repeats > 1 ? operand.bytes[b] : 0, operand.last_bytes[b]};
    for (uint32_t i = 0; i < 2; ++i) {
      if (masks[i] == 0) continue;
      operand.blocks = b + 1;
      const uint64_t repeat = shape.repeats - 2 + i;
      const uint64_t block = operand.first_block + repeat * operand.repeat_stride +
                             uint64_t{b} * operand.block_stride;
      const uint64_t reach = block * kBlock + 32 - static_cast<uint32_t>(__builtin_clz(masks[i]));
      if (reach > end) end = reach;
    }
  }
  check_end(end, buffer, operand.name, what);
}

// Calls f(block index, byte mask) for each block an operand touches, in order of execution.
// A repeat stride of 0 touches the same blocks again: they are visited once.
template <typename F>
inline void each_block(const Operand& operand, const Shape& shape, const F& f) {
  if (operand.repeat_stride == 0) {
    for (uint32_t b = 0; b < operand.blocks; ++b) {
      const uint32_t bytes = operand.last_bytes[b] | (shape.repeats > 1 ? operand.bytes[b] : 0);
      if (bytes != 0) f(operand.block(0, b), bytes);
    }
    return;
  }
  for (uint32_t r = 0; r < shape.repeats; ++r) {
    const uint32_t* masks = r + 1 == shape.repeats ? operand.last_bytes : operand.bytes;
    for (uint32_t b = 0; b < operand.blocks; ++b) {
      if (masks[b] != 0) f(operand.block(r, b), masks[b]);
    }
  }
}

inline uint32_t last_block(const Operand& operand, const Shape& shape) {
  return operand.block(shape.repeats - 1, operand.blocks - 1);
}

// For each block of the unified buffer, where the current instruction writes it. Stamped by a
// number that never repeats in the process, so that nothing has to be cleared.
struct WriteMap {
  uint64_t stamp[kPhysicalUb / kBlock] = {};
  uint32_t place[kPhysicalUb / kBlock] = {};  // repeat * 8 + block in repeat
  uint32_t bytes[kPhysicalUb / kBlock] = {};
  uint64_t now = 0;
};
inline WriteMap& write_map() {
  static WriteMap map;
  return map;
}

// Calls f(repeat, block in repeat, block index, byte mask) for each block, repeats of stride 0 too.
template <typename F>
inline void each_step(const Operand& operand, const Shape& shape, const F& f) {
  for (uint32_t r = 0; r < shape.repeats; ++r) {
    const uint32_t* masks = r + 1 == shape.repeats ? operand.last_bytes : operand.bytes;
    for (uint32_t b = 0; b < operand.blocks; ++b) {
      if (masks[b] != 0) f(r, b, operand.block(r, b), masks[b]);
    }
  }
}

// Marks what `dst` writes. `once`: no byte may be written twice.
inline void map_writes(const Operand& dst, const Shape& shape, const char* what, bool once) {
  WriteMap& map = write_map();
  ++map.now;
  each_step(dst, shape, [&](uint32_t r, uint32_t b, uint32_t index, uint32_t bytes) {
    const bool seen = map.stamp[index] == map.now;
    if (once && seen && (map.bytes[index] & bytes) != 0) {
      fail("partial-overlap", "%s: repeat %u writes bytes that repeat %u has written", what, r,
           map.place[index] / 8);
    }
    map.bytes[index] = seen ? (map.bytes[index] | bytes) : bytes;
    map.stamp[index] = map.now;
    map.place[index] = r * 8 + b;
  });
}

inline bool same_walk(const Operand& a, const Operand& b, const Shape& shape) {
  return a.view.address == b.view.address && a.element == b.element &&
         (a.blocks <= 1 || a.block_stride == b.block_stride) &&
         (shape.repeats <= 1 || a.repeat_stride == b.repeat_stride);
}

// dst may be src (same addresses in each repeat) or apart from it; nothing between. A repeat must
// not read what an earlier one wrote, save in the documented accumulation (dst == src1, both
// repeat strides 0).
inline void check_overlap(const Operand& dst, const Operand& src, const Shape& shape,
                          const char* what, bool accumulates) {
  if (same_walk(dst, src, shape) &&
      (accumulates || dst.repeat_stride != 0 || shape.repeats == 1)) {
    return;
  }
  if (last_block(src, shape) < dst.first_block || last_block(dst, shape) < src.first_block) return;
  map_writes(dst, shape, what, false);
  const WriteMap& map = write_map();
  each_step(src, shape, [&](uint32_t r, uint32_t b, uint32_t index, uint32_t bytes) {
    if (map.stamp[index] != map.now || (map.bytes[index] & bytes) == 0) return;
    if (map.place[index] != r * 8 + b || dst.element != src.element) {
      fail("partial-overlap", "%s: repeat %u of %s reads bytes that repeat %u writes", what, r,
           src.name, map.place[index] / 8);
    }
  });
}

// Strides of a destination: 0 between blocks is undefined, 0 between repeats writes one place
// again and again (only the documented accumulation may).
inline void check_dst_strides(const Operand& dst, const Shape& shape, const char* what,
                              bool accumulates) {
  if (dst.block_stride == 0) fail("zero-dst-stride", "%s: dstBlkStride is 0", what);
  if (shape.repeats > 1 && dst.repeat_stride == 0 && !accumulates) {
    fail("zero-dst-stride", "%s: dstRepStride is 0 with %u repeats", what, shape.repeats);
  }
}

// Cycles of one repeat on A2, from the appendix of theoretical vector performance: every
// instruction here runs 256 bytes of its widest operand a cycle, except sums over a whole repeat
// and block sums of half, which take 7.
constexpr uint32_t kFullRate = 1;
constexpr uint32_t kSlowSum = 7;

inline void count_instruction(uint32_t repeats, uint32_t cycles_per_repeat = kFullRate) {
  Core& now = core();
  ++now.meter.vector_instructions;
  now.meter.repeats += repeats;
  now.meter.cycles += uint64_t{repeats} * cycles_per_repeat;
}

// Checks of an instruction of the vector pipe and its trace in the shadow.
template <typename... Sources>
inline void check_vector(const char* what, const Shape& shape, bool accumulates, Operand& dst,
                         Sources&... sources) {
  Core& now = core();
  now.next_instruction();
  count_instruction(shape.repeats);
  dst.name = "dst";
  prepare(dst, shape, what);
  (prepare(sources, shape, what), ...);
  check_dst_strides(dst, shape, what, accumulates);
  if (shape.repeats > 1 && !accumulates &&
      dst.repeat_stride < (dst.blocks - 1) * dst.block_stride + 1) {
    map_writes(dst, shape, what, true);
  }
  (check_overlap(dst, sources, shape, what, accumulates), ...);
  (each_block(sources, shape,
              [&](uint32_t index, uint32_t bytes) { now.check_read(PIPE_V, index, bytes, what); }),
   ...);
  each_block(dst, shape,
             [&](uint32_t index, uint32_t bytes) { now.check_write(PIPE_V, index, bytes, what); });
  (each_block(sources, shape,
              [&](uint32_t index, uint32_t bytes) { now.note_read(PIPE_V, index, bytes); }),
   ...);
  each_block(dst, shape,
             [&](uint32_t index, uint32_t bytes) { now.note_write(PIPE_V, index, bytes); });
}

// Calls f(lane pointers...) for the lanes of an instruction in order. `chunk` lanes lie together
// in every operand.
template <typename D, typename... S, typename F, typename... Sources>
inline void each_lane(const Shape& shape, const F& f, const Operand& dst,
                      const Sources&... sources) {
  uint8_t* ub = core().ub;
  const uint32_t chunk = shape.lanes / 8;  // one 32-byte block of the widest operand
  for (uint32_t r = 0; r < shape.repeats; ++r) {
    const Lanes& lanes = r + 1 == shape.repeats ? shape.last : shape.mask;
    for (uint32_t first = 0; first < shape.lanes; first += chunk) {
      D* out = reinterpret_cast<D*>(ub + dst.address(r, first));
      const auto go = [&](uint32_t n, const auto*... in) {
        if (lanes.first_n != 0) {
          const uint32_t active = lanes.first_n <= first ? 0
                                  : lanes.first_n - first < n ? lanes.first_n - first : n;
#pragma GCC ivdep
          for (uint32_t i = 0; i < active; ++i) out[i] = f(in[i]...);
        } else {
          for (uint32_t i = 0; i < n; ++i) {
            if (lanes.has(first + i)) out[i] = f(in[i]...);
          }
        }
      };
      go(chunk, reinterpret_cast<const S*>(ub + sources.address(r, first))...);
    }
  }
}

// A contiguous run of bytes, for operands that are not lanes (packed bits, reduced values, copies).
struct Run {
  uint32_t begin = 0;
  uint32_t end = 0;
};

inline Run run_of(const View& view, uint64_t bytes, uint32_t align, const char* name,
                  const char* what) {
  const Buffer& buffer = core().owner(view, what);
  check_alignment(view, align, name, what);
  check_end(view.address + bytes, buffer, name, what);
  return Run{view.address, view.address + static_cast<uint32_t>(bytes)};
}

template <typename F>
inline void each_block(const Run& run, const F& f) {
  for (uint32_t at = run.begin; at < run.end;) {
    const uint32_t start = at % kBlock;
    const uint32_t length = kBlock - start < run.end - at ? kBlock - start : run.end - at;
    f(at / kBlock, static_cast<uint32_t>(((uint64_t{1} << length) - 1) << start));
    at += length;
  }
}

inline void check_apart(const Run& a, const Run& b, const char* what) {
  if (a.begin < b.end && b.begin < a.end) {
    fail("partial-overlap", "%s: dst and src share bytes at %u", what,
         a.begin > b.begin ? a.begin : b.begin);
  }
}

inline void check_read(int pipe, const Run& run, const char* what) {
  Core& now = core();
  each_block(run, [&](uint32_t i, uint32_t bytes) { now.check_read(pipe, i, bytes, what); });
}
inline void check_write(int pipe, const Run& run, const char* what) {
  Core& now = core();
  each_block(run, [&](uint32_t i, uint32_t bytes) { now.check_write(pipe, i, bytes, what); });
}
inline void note_read(int pipe, const Run& run) {
  Core& now = core();
  each_block(run, [&](uint32_t i, uint32_t bytes) { now.note_read(pipe, i, bytes); });
}
inline void note_write(int pipe, const Run& run) {
  Core& now = core();
  each_block(run, [&](uint32_t i, uint32_t bytes) { now.note_write(pipe, i, bytes); });
}

template <typename T>
inline Operand operand(const char* name, const AscendC::LocalTensor<T>& tensor,
                       uint32_t block_stride, uint32_t repeat_stride) {
  Operand result;
  result.name = name;
  result.view = tensor.view();
  result.element = sizeof(T);
  result.block_stride = block_stride;
  result.repeat_stride = repeat_stride;
  return result;
}

}  // namespace host_check
