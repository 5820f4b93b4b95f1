// State of one simulated vector core: unified buffer with shadow, pipes and their order, buffers,
// events, meter. Global memory is shared by the cores of a launch (hc_memory.h).
//
// Order of instructions: each access gets a number; clock[p][q] is the newest access of pipe q
// that pipe p is known to follow (through a flag, a queue or a barrier). Two accesses to the same
// byte, one of them a write, must be ordered. Bytes are kept as one 32-bit mask per 32-byte block.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "hc_error.h"
#include "hc_memory.h"
#include "hc_types.h"

namespace host_check {

constexpr uint32_t kPhysicalUb = 196608;
constexpr uint32_t kDefaultUbBudget = 184 * 1024;
constexpr uint32_t kBlock = 32;
constexpr uint32_t kRepeatBytes = 256;
constexpr uint32_t kMaxBuffers = 64;
constexpr uint32_t kMaxOutstanding = 8;
constexpr int kEventIds = 8;
constexpr int kPipes = 4;  // PIPE_S, PIPE_V, PIPE_MTE2, PIPE_MTE3

enum class NanMax { kPropagate, kDrop };

struct Config {
  uint32_t block_dim = 1;
  uint32_t seed = 0;
  uint32_t ub_bytes = kDefaultUbBudget;
  bool whole_outputs = true;  // every byte of every output must have been written in the end
  NanMax nan_max = NanMax::kPropagate;
  // State of CTRL[48]. The documented default saturates: infinity becomes the largest value and NaN
  // becomes 0 in half arithmetic and in Cast to half and bfloat16_t. Kernels cannot change it: the
  // functions for that do not exist in every CANN.
  bool saturate = true;
};

struct Meter {
  uint64_t bytes_read = 0;         // global memory to unified buffer
  uint64_t bytes_written = 0;      // unified buffer to global memory
  uint64_t repeats = 0;            // vector repeats started, strided and masked ones included
  uint64_t cycles = 0;             // repeats weighted by the documented rate of the instruction
  uint64_t vector_instructions = 0;
  uint64_t barriers = 0;           // PipeBarrier of any pipe
  uint64_t copies = 0;             // DataCopy and DataCopyPad calls
  uint64_t scalar_accesses = 0;    // GetValue and SetValue
  uint32_t ub_bytes = 0;           // most bytes given out by InitBuffer on one core

  // Full-rate passes over fp32 per element: 1.0 = one cycle for every 64 elements.
  double passes(uint64_t elements) const {
    return elements == 0 ? 0.0 : 64.0 * static_cast<double>(cycles) / static_cast<double>(elements);
  }
};

enum class BufferState : uint8_t { kFree, kAllocated, kQueued, kDequeued, kScratch };

struct Clock {
  uint32_t seen[kPipes] = {0, 0, 0, 0};
  void join(const Clock& other) {
    for (int q = 0; q < kPipes; ++q) {
      if (other.seen[q] > seen[q]) seen[q] = other.seen[q];
    }
  }
};

struct Buffer {
  uint32_t begin = 0;
  uint32_t end = 0;
  uint32_t generation = 0;
  BufferState state = BufferState::kFree;
  AscendC::TPosition position = AscendC::TPosition::VECCALC;
  Clock released;  // what an acquirer of this buffer may rely on
};

// A LocalTensor without its type.
struct View {
  uint32_t address = 0;
  int32_t buffer = -1;
  uint32_t generation = 0;
  uint32_t epoch = 0;  // of the TPipe that gave it out
};

inline const char* pipe_name(int pipe) {
  static const char* const names[] = {"S", "V", "MTE2", "MTE3"};
  return names[pipe];
}

class Core {
 public:
  Core(const Config& run_config, GlobalMemory& global_memory)
      : config(run_config), memory(global_memory) {
    if (config.ub_bytes == 0 || config.ub_bytes > kPhysicalUb) {
      fail("ub-overflow", "a budget of %u bytes, the unified buffer has %u", config.ub_bytes,
           kPhysicalUb);
    }
  }

  Config config;
  GlobalMemory& memory;
  Meter meter;
  uint32_t block = 0;
  std::vector<Buffer> buffers;
  bool pipe_alive = false;
  alignas(64) uint8_t ub[kPhysicalUb];

  void start_block(uint32_t index) {
    block = index;
    end_epoch();
    buffers.clear();
    used_ = 0;
    pipe_alive = false;
    std::memset(written_, 0, sizeof written_);
    std::memset(flags_set_, 0, sizeof flags_set_);
    std::memset(events_taken_, 0, sizeof events_taken_);
    order_all();
    memory.start_block(index);
  }

  void end_block() {
    check_no_leak();
    for (int event = 0; event < kEvents; ++event) {
      for (int id = 0; id < kEventIds; ++id) {
        if (flags_set_[event][id]) {
          fail("flag-pair", "SetFlag of %s, id %d, has no WaitFlag at kernel end",
               event_name(event), id);
        }
      }
    }
  }

  void check_no_leak() const {
    for (size_t i = 0; i < buffers.size(); ++i) {
      const BufferState state = buffers[i].state;
      if (state != BufferState::kFree && state != BufferState::kScratch) {
        fail("queue-leak", "buffer %zu is %s at kernel end", i, state_name(state));
      }
    }
  }

  int32_t new_buffer(uint32_t bytes, AscendC::TPosition position, BufferState state) {
    if (buffers.size() >= kMaxBuffers) {
      fail("too-many-buffers", "InitBuffer of buffer %zu, at most %u in a kernel",
           buffers.size() + 1, kMaxBuffers);
    }
    const uint64_t rounded = (static_cast<uint64_t>(bytes) + kBlock - 1) / kBlock * kBlock;
    if (used_ + rounded > config.ub_bytes) {
      fail("ub-overflow", "%llu bytes wanted, budget is %u",
           static_cast<unsigned long long>(used_ + rounded), config.ub_bytes);
    }
    Buffer buffer;
    buffer.begin = used_;
    buffer.end = used_ + static_cast<uint32_t>(rounded);
    buffer.state = state;
    buffer.position = position;
    used_ = buffer.end;
    if (used_ > meter.ub_bytes) meter.ub_bytes = used_;
    buffers.push_back(buffer);
    return static_cast<int32_t>(buffers.size()) - 1;
  }

  // Marks the bytes of a buffer as never written.
  void poison(const Buffer& buffer) {
    std::memset(written_ + buffer.begin / kBlock, 0, (buffer.end - buffer.begin) / kBlock * 4);
    std::memset(ub + buffer.begin, 0xa5, buffer.end - buffer.begin);
  }

  // A number that changes when a TPipe dies and when a core starts: what was given out before is
  // of no use any more.
  uint32_t epoch() const { return epoch_; }
  void end_epoch() {
    static uint32_t last = 0;  // never comes again, not in the next launch either
    epoch_ = ++last;
  }
  void check_epoch(uint32_t epoch, const char* what) const {
    if (epoch != epoch_) {
      fail("outlived-pipe", "%s uses what a TPipe gave out that is dead, or another core's", what);
    }
  }

  const Buffer& owner(const View& view, const char* what) const {
    if (view.buffer < 0) {
      fail("tensor-without-buffer", "%s uses a LocalTensor that no buffer gave out", what);
    }
    check_epoch(view.epoch, what);
    const Buffer& buffer = buffers[static_cast<size_t>(view.buffer)];
    if (buffer.state == BufferState::kScratch) return buffer;
    if (buffer.state == BufferState::kFree || buffer.generation != view.generation) {
      fail("use-after-free", "%s uses a tensor after FreeTensor", what);
    }
    if (buffer.state == BufferState::kQueued) {
      fail("use-while-queued", "%s uses a tensor between EnQue and DeQue", what);
    }
    return buffer;
  }

  // ---- order of accesses -------------------------------------------------------------------
  void next_instruction() {
    if (++sequence_ == 0xffffffffu) fail("internal", "more accesses than the model can number");
  }

  void barrier(int pipe) {
    ++meter.barriers;
    if (pipe == PIPE_ALL) {
      order_all();
    } else {
      clock_[pipe].seen[pipe] = sequence_;
    }
    update_settled();
  }

  Clock release(int pipe) const {
    Clock clock = clock_[pipe];
    clock.seen[pipe] = sequence_;
    return clock;
  }

  // Orders `pipe` after everything that `clock` follows.
  void acquire(int pipe, const Clock& clock) {
    clock_[pipe].join(clock);
    update_settled();
  }

  bool follows(int pipe, int other, uint32_t number) const {
    return number <= clock_[pipe].seen[other];
  }
  uint32_t sequence() const { return sequence_; }

  // ---- shadow of one 32-byte block ---------------------------------------------------------
  void check_read(int pipe, uint32_t index, uint32_t bytes, const char* what) const {
    if ((written_[index] & bytes) != bytes) fail_uninitialised(index, bytes, what);
    check_order(pipe, index, bytes, false, what);
  }
  void check_write(int pipe, uint32_t index, uint32_t bytes, const char* what) const {
    check_order(pipe, index, bytes, true, what);
  }
  void note_read(int pipe, uint32_t index, uint32_t bytes) {
    if (pipe == PIPE_V) note(own_read_[index], bytes, clock_[PIPE_V].seen[PIPE_V]);
    note(reads_[pipe][index], bytes, settled_[pipe]);
    touched_[pipe] = true;
  }
  void note_write(int pipe, uint32_t index, uint32_t bytes) {
    if (pipe == PIPE_V) note(own_write_[index], bytes, clock_[PIPE_V].seen[PIPE_V]);
    note(writes_[pipe][index], bytes, settled_[pipe]);
    touched_[pipe] = true;
    written_[index] |= bytes;
  }
  // A DMA leaves bytes whose value is undefined.
  void note_garbage(uint32_t index, uint32_t bytes) {
    written_[index] &= ~bytes;
    for (uint32_t b = 0; b < kBlock; ++b) {
      if ((bytes >> b) & 1u) ub[index * kBlock + b] = 0xa5;
    }
  }

  // ---- events ------------------------------------------------------------------------------
  static constexpr int kEvents = 12;
  static const char* event_name(int event) {
    static const char* const names[kEvents] = {"MTE2_V", "V_MTE2", "MTE3_V",    "V_MTE3",
                                               "V_S",    "S_V",    "MTE2_S",    "S_MTE2",
                                               "MTE3_S", "S_MTE3", "MTE2_MTE3", "MTE3_MTE2"};
    return names[event];
  }
  void set_flag(int event, int source, int64_t id) {
    check_event(event, id);
    if (flags_set_[event][id]) {
      fail("flag-pair", "SetFlag of %s, id %d, twice without WaitFlag", event_name(event),
           static_cast<int>(id));
    }
    flags_set_[event][id] = true;
    flags_[event][id] = release(source);
  }
  void wait_flag(int event, int destination, int64_t id) {
    check_event(event, id);
    if (!flags_set_[event][id]) {
      fail("flag-pair", "WaitFlag of %s, id %d, without SetFlag: the core would hang",
           event_name(event), static_cast<int>(id));
    }
    flags_set_[event][id] = false;
    acquire(destination, flags_[event][id]);
  }
  int fetch_event(int event, bool take) {
    for (int id = 0; id < kEventIds; ++id) {
      if (!events_taken_[event][id]) {
        events_taken_[event][id] = take;
        return id;
      }
    }
    fail("event-id", "no free event id for %s", event_name(event));
  }
  void release_event(int event, int64_t id) {
    check_event(event, id);
    if (!events_taken_[event][id]) {
      fail("event-id", "ReleaseEventID of %s, id %d, which was not allocated", event_name(event),
           static_cast<int>(id));
    }
    events_taken_[event][id] = false;
  }

  static const char* state_name(BufferState state) {
    switch (state) {
      case BufferState::kFree: return "free";
      case BufferState::kAllocated: return "allocated (no EnQue or FreeTensor)";
      case BufferState::kQueued: return "in its queue (no DeQue)";
      case BufferState::kDequeued: return "taken from its queue (no FreeTensor)";
      default: return "scratch";
    }
  }

 private:
  struct Note {
    uint32_t number = 0;
    uint32_t bytes = 0;
  };
  static constexpr uint32_t kBlocks = kPhysicalUb / kBlock;

  void note(Note& entry, uint32_t bytes, uint32_t settled) const {
    entry.bytes = entry.number <= settled ? bytes : (entry.bytes | bytes);
    entry.number = sequence_;
  }

  void check_order(int pipe, uint32_t index, uint32_t bytes, bool write, const char* what) const {
    const Clock& clock = clock_[pipe];
    if (pipe == PIPE_V) {
      const uint32_t barrier = clock.seen[PIPE_V];
      const Note& wrote = own_write_[index];
      if (wrote.number > barrier && (wrote.bytes & bytes) != 0) {
        fail_order("missing-barrier", pipe, pipe, true, write, index, what);
      }
      if (write) {
        const Note& read = own_read_[index];
        if (read.number > barrier && (read.bytes & bytes) != 0) {
          fail_order("missing-barrier", pipe, pipe, false, write, index, what);
        }
      }
    }
    for (int other = 0; other < kPipes; ++other) {
      // In-order pipes need no order with themselves; V has its own notes, two copies into the
      // unified buffer may overtake each other.
      if (!touched_[other] || (other == pipe && pipe != PIPE_MTE2)) continue;
      const uint32_t seen = clock.seen[other];
      const Note& wrote = writes_[other][index];
      if (wrote.number > seen && (wrote.bytes & bytes) != 0) {
        fail_order("missing-sync", other, pipe, true, write, index, what);
      }
      if (write && other != pipe) {
        const Note& read = reads_[other][index];
        if (read.number > seen && (read.bytes & bytes) != 0) {
          fail_order("missing-sync", other, pipe, false, write, index, what);
        }
      }
    }
  }

  [[noreturn]] __attribute__((cold, noinline)) void fail_uninitialised(uint32_t index,
                                                                       uint32_t bytes,
                                                                       const char* what) const {
    const int first = __builtin_ctz(bytes & ~written_[index]);
    fail("uninitialised-read", "%s reads unified-buffer byte %u, which nothing has written", what,
         index * kBlock + static_cast<uint32_t>(first));
  }

  [[noreturn]] __attribute__((cold, noinline)) void fail_order(const char* rule, int earlier,
                                                               int later, bool earlier_write,
                                                               bool later_write, uint32_t index,
                                                               const char* what) const {
    fail(rule, "%s %s bytes at %u that an earlier %s instruction %s, nothing orders %s after %s",
         what, later_write ? "writes" : "reads", index * kBlock, pipe_name(earlier),
         earlier_write ? "wrote" : "reads", pipe_name(later), pipe_name(earlier));
  }

  void check_event(int event, int64_t id) const {
    if (id < 0 || id >= kEventIds) {
      fail("event-id", "%s id %lld is outside 0..%d", event_name(event),
           static_cast<long long>(id), kEventIds - 1);
    }
  }

  void order_all() {
    for (Clock& clock : clock_) {
      for (uint32_t& seen : clock.seen) seen = sequence_;
    }
    update_settled();
  }

  // settled_[q]: accesses of q up to this number are ordered before every other pipe.
  void update_settled() {
    for (int q = 0; q < kPipes; ++q) {
      uint32_t least = 0xffffffffu;
      for (int p = 0; p < kPipes; ++p) {
        if (p != q && clock_[p].seen[q] < least) least = clock_[p].seen[q];
      }
      settled_[q] = least;
    }
  }

  uint32_t used_ = 0;
  uint32_t epoch_ = 0;
  uint32_t sequence_ = 1;
  Clock clock_[kPipes];
  uint32_t settled_[kPipes] = {0, 0, 0, 0};
  bool touched_[kPipes] = {false, false, false, false};  // has accessed the unified buffer
  Clock flags_[kEvents][kEventIds];
  bool flags_set_[kEvents][kEventIds] = {};
  bool events_taken_[kEvents][kEventIds] = {};
  uint32_t written_[kBlocks] = {};  // one bit per byte
  Note own_write_[kBlocks];         // vector pipe, since its last barrier
  Note own_read_[kBlocks];
  Note writes_[kPipes][kBlocks];
  Note reads_[kPipes][kBlocks];
};

inline Core*& current_core() {
  static Core* core = nullptr;
  return core;
}

inline Core& core() {
  Core* now = current_core();
  if (now == nullptr) fail("outside-kernel", "the device API was called outside Machine::run");
  return *now;
}

class CoreScope {
 public:
  explicit CoreScope(Core& now) { current_core() = &now; }
  ~CoreScope() { current_core() = nullptr; }
  CoreScope(const CoreScope&) = delete;
  CoreScope& operator=(const CoreScope&) = delete;
};

}  // namespace host_check
