// LocalTensor, GlobalTensor, TPipe, TQueBind, TQue, TBuf, flags and barriers.
// Facts: the data-structure, resource and synchronisation pages of asc-devkit; kernel_tensor.h.
#pragma once

#include <deque>
#include <vector>

#include "hc_core.h"

namespace AscendC {

template <typename T>
class LocalTensor {
 public:
  using PrimType = T;
  LocalTensor() = default;
  LocalTensor(const host_check::View& view, uint32_t elements) : view_(view), size_(elements) {}

  LocalTensor operator[](const uint32_t offset) const {
    const host_check::Buffer& buffer = host_check::core().owner(view_, "operator[]");
    const uint64_t address = view_.address + static_cast<uint64_t>(offset) * sizeof(T);
    if (address > buffer.end) {
      host_check::fail("ub-out-of-bounds", "operator[](%u) is past the buffer's end", offset);
    }
    LocalTensor part = *this;
    part.view_.address = static_cast<uint32_t>(address);
    part.size_ = offset < size_ ? size_ - offset : 0;
    return part;
  }

  template <typename U>
  LocalTensor<U> ReinterpretCast() const {
    return LocalTensor<U>(view_, static_cast<uint32_t>(size_ * sizeof(T) / sizeof(U)));
  }

  T GetValue(const uint32_t index) const {
    host_check::Core& core = host_check::core();
    const uint32_t address = scalar_address(index, "GetValue");
    core.next_instruction();
    core.check_read(PIPE_S, address / host_check::kBlock, mask(address), "GetValue");
    core.note_read(PIPE_S, address / host_check::kBlock, mask(address));
    ++core.meter.scalar_accesses;
    T value;
    std::memcpy(static_cast<void*>(&value), core.ub + address, sizeof(T));
    return value;
  }

  template <typename S>
  void SetValue(const uint32_t index, const S value) const {
    host_check::Core& core = host_check::core();
    const uint32_t address = scalar_address(index, "SetValue");
    core.next_instruction();
    core.check_write(PIPE_S, address / host_check::kBlock, mask(address), "SetValue");
    core.note_write(PIPE_S, address / host_check::kBlock, mask(address));
    ++core.meter.scalar_accesses;
    const T converted = static_cast<T>(value);
    std::memcpy(core.ub + address, static_cast<const void*>(&converted), sizeof(T));
  }

  uint32_t GetSize() const { return size_; }
  int32_t GetPosition() const {
    return static_cast<int32_t>(host_check::core().owner(view_, "GetPosition").position);
  }
  const host_check::View& view() const { return view_; }

 private:
  uint32_t scalar_address(uint32_t index, const char* what) const {
    const host_check::Buffer& buffer = host_check::core().owner(view_, what);
    const uint64_t address = view_.address + static_cast<uint64_t>(index) * sizeof(T);
    if (address + sizeof(T) > buffer.end) {
      host_check::fail("ub-out-of-bounds", "%s(%u) is past the buffer's end", what, index);
    }
    if (address % sizeof(T) != 0) {
      host_check::fail("ub-misaligned", "%s at address %u", what, static_cast<uint32_t>(address));
    }
    return static_cast<uint32_t>(address);
  }
  static uint32_t mask(uint32_t address) {
    const uint64_t bytes = (uint64_t{1} << sizeof(T)) - 1;
    return static_cast<uint32_t>(bytes << (address % host_check::kBlock));
  }

  host_check::View view_;
  uint32_t size_ = 0;
};

template <typename T>
class GlobalTensor {
 public:
  using PrimType = T;
  GlobalTensor() = default;

  // A tensor lies in one allocation. Without a size it ends where that ends.
  void SetGlobalBuffer(T* buffer, uint64_t elements) {
    (void)host_check::core().memory.room_at(buffer, elements * sizeof(T), "SetGlobalBuffer");
    base_ = buffer;
    size_ = elements;
  }
  void SetGlobalBuffer(T* buffer) {
    base_ = buffer;
    size_ = host_check::core().memory.room_at(buffer, 1, "SetGlobalBuffer") / sizeof(T);
  }
  GlobalTensor operator[](const uint64_t offset) const {
    if (offset > size_) {
      host_check::fail("gm-out-of-bounds", "operator[](%llu) of a tensor of %llu elements",
                       static_cast<unsigned long long>(offset),
                       static_cast<unsigned long long>(size_));
    }
    GlobalTensor part = *this;
    part.base_ = base_ + offset;
    part.size_ = size_ - offset;
    return part;
  }
  T GetValue(const uint64_t offset) const {
    host_check::Core& core = host_check::core();
    check_extent(offset, 1, "GetValue");
    core.next_instruction();
    core.memory.read(base_ + offset, sizeof(T), core.sequence(), "GetValue",
                     [&core](uint32_t number) { return core.follows(PIPE_S, PIPE_MTE3, number); });
    ++core.meter.scalar_accesses;
    core.meter.bytes_read += sizeof(T);
    return base_[offset];
  }
  T* GetPhyAddr() const { return base_; }

  template <CacheRwMode mode = CacheRwMode::RW>
  void SetL2CacheHint(CacheMode) {}

  // For copies: `first` and `count` in elements of this tensor.
  void check_extent(uint64_t first, uint64_t count, const char* what) const {
    if (base_ == nullptr) {
      host_check::fail("gm-out-of-bounds", "%s uses a GlobalTensor without SetGlobalBuffer", what);
    }
    if (first + count > size_) {
      host_check::fail("gm-out-of-bounds", "%s ends at element %llu of a tensor of %llu", what,
                       static_cast<unsigned long long>(first + count),
                       static_cast<unsigned long long>(size_));
    }
  }

 private:
  T* base_ = nullptr;
  uint64_t size_ = 0;
};

template <HardEvent event>
struct EventPipes;
#define HOST_CHECK_EVENT(SOURCE, DESTINATION)                       \
  template <>                                                      \
  struct EventPipes<HardEvent::SOURCE##_##DESTINATION> {           \
    static constexpr int kSource = PIPE_##SOURCE;                  \
    static constexpr int kDestination = PIPE_##DESTINATION;        \
  };
HOST_CHECK_EVENT(MTE2, V)
HOST_CHECK_EVENT(V, MTE2)
HOST_CHECK_EVENT(MTE3, V)
HOST_CHECK_EVENT(V, MTE3)
HOST_CHECK_EVENT(V, S)
HOST_CHECK_EVENT(S, V)
HOST_CHECK_EVENT(MTE2, S)
HOST_CHECK_EVENT(S, MTE2)
HOST_CHECK_EVENT(MTE3, S)
HOST_CHECK_EVENT(S, MTE3)
HOST_CHECK_EVENT(MTE2, MTE3)
HOST_CHECK_EVENT(MTE3, MTE2)
#undef HOST_CHECK_EVENT

template <HardEvent event>
inline void SetFlag(int32_t event_id) {
  host_check::core().set_flag(static_cast<int>(event), EventPipes<event>::kSource, event_id);
}
template <HardEvent event>
inline void WaitFlag(int32_t event_id) {
  host_check::core().wait_flag(static_cast<int>(event), EventPipes<event>::kDestination, event_id);
}
template <pipe_t pipe>
inline void PipeBarrier() {
  static_assert(pipe != PIPE_S, "pipe-barrier: PipeBarrier<PIPE_S> hangs the core");
  host_check::core().barrier(pipe);
}

template <TPosition source, TPosition destination, int32_t depth, auto mask = 0>
class TQueBind {
  static constexpr bool kIn = source == TPosition::GM && destination == TPosition::VECIN;
  static constexpr bool kOut = source == TPosition::VECOUT && destination == TPosition::GM;
  static constexpr bool kThrough = source == TPosition::VECIN && destination == TPosition::VECOUT;
  static_assert(kIn || kOut || kThrough,
                "queue-position: a queue is VECIN, VECOUT or TQueBind<VECIN, VECOUT>");
  static_assert(depth >= 1, "queue-depth: depth must be at least 1");

 public:
  template <typename T>
  LocalTensor<T> AllocTensor() {
    host_check::Core& core = host_check::core();
    if (indices_.empty()) {
      host_check::fail("queue-without-buffer", "AllocTensor before TPipe::InitBuffer");
    }
    core.check_epoch(epoch_, "AllocTensor");
    int outstanding = 1;
    for (const host_check::Buffer& other : core.buffers) {
      outstanding += other.position == position() &&
                     other.state != host_check::BufferState::kFree &&
                     other.state != host_check::BufferState::kScratch;
    }
    if (outstanding > static_cast<int>(host_check::kMaxOutstanding)) {
      host_check::fail("too-many-outstanding",
                       "%d tensors of one position are allocated, at most %u", outstanding,
                       host_check::kMaxOutstanding);
    }
    const int32_t index = next_free();
    host_check::Buffer& buffer = core.buffers[static_cast<size_t>(index)];
    core.acquire(kSourcePipe, buffer.released);
    buffer.state = host_check::BufferState::kAllocated;
    ++buffer.generation;
    core.poison(buffer);
    return tensor<T>(index);
  }
  template <typename T>
  void AllocTensor(LocalTensor<T>& out) {
    out = AllocTensor<T>();
  }

  template <typename T>
  bool EnQue(const LocalTensor<T>& tensor_in) {
    host_check::Core& core = host_check::core();
    host_check::Buffer& buffer = own(tensor_in.view(), "EnQue");
    if (buffer.state != host_check::BufferState::kAllocated) {
      host_check::fail("enqueue-not-allocated", "EnQue of a tensor that is %s",
                       host_check::Core::state_name(buffer.state));
    }
    if (queued_.size() >= static_cast<size_t>(depth)) {
      host_check::fail("queue-depth", "EnQue of tensor %zu into a queue of depth %d",
                       queued_.size() + 1, depth);
    }
    buffer.state = host_check::BufferState::kQueued;
    buffer.released = core.release(kSourcePipe);
    queued_.push_back(tensor_in.view().buffer);
    return true;
  }

  template <typename T>
  LocalTensor<T> DeQue() {
    host_check::Core& core = host_check::core();
    if (!indices_.empty()) core.check_epoch(epoch_, "DeQue");
    if (queued_.empty()) host_check::fail("dequeue-empty", "DeQue of an empty queue");
    const int32_t index = queued_.front();
    queued_.pop_front();
    host_check::Buffer& buffer = core.buffers[static_cast<size_t>(index)];
    core.acquire(kDestinationPipe, buffer.released);
    buffer.state = host_check::BufferState::kDequeued;
    return tensor<T>(index);
  }
  template <typename T>
  void DeQue(LocalTensor<T>& out) {
    out = DeQue<T>();
  }

  template <typename T>
  void FreeTensor(LocalTensor<T>& tensor_in) {
    host_check::Core& core = host_check::core();
    host_check::Buffer& buffer = own(tensor_in.view(), "FreeTensor");
    if (buffer.state == host_check::BufferState::kFree ||
        buffer.generation != tensor_in.view().generation) {
      host_check::fail("double-free", "FreeTensor of a tensor that is free already");
    }
    if (buffer.state == host_check::BufferState::kQueued) {
      host_check::fail("use-while-queued", "FreeTensor between EnQue and DeQue");
    }
    const bool dequeued = buffer.state == host_check::BufferState::kDequeued;
    buffer.released = core.release(dequeued ? kDestinationPipe : kSourcePipe);
    buffer.state = host_check::BufferState::kFree;
  }

  bool VacantInQue() const { return queued_.size() < static_cast<size_t>(depth); }
  bool HasTensorInQue() const { return !queued_.empty(); }
  int32_t GetTensorCountInQue() const { return static_cast<int32_t>(queued_.size()); }
  bool HasIdleBuffer() const {
    for (const int32_t index : indices_) {
      if (host_check::core().buffers[static_cast<size_t>(index)].state ==
          host_check::BufferState::kFree) {
        return true;
      }
    }
    return false;
  }

 private:
  friend class TPipe;
  static constexpr int kSourcePipe = kOut ? PIPE_V : PIPE_MTE2;
  static constexpr int kDestinationPipe = kIn ? PIPE_V : PIPE_MTE3;
  static constexpr TPosition position() { return kOut ? TPosition::VECOUT : TPosition::VECIN; }

  template <typename T>
  LocalTensor<T> tensor(int32_t index) const {
    const host_check::Buffer& buffer = host_check::core().buffers[static_cast<size_t>(index)];
    return LocalTensor<T>(host_check::View{buffer.begin, index, buffer.generation, epoch_},
                          static_cast<uint32_t>((buffer.end - buffer.begin) / sizeof(T)));
  }
  int32_t next_free() {
    for (size_t tried = 0; tried < indices_.size(); ++tried) {
      const int32_t index = indices_[next_];
      next_ = (next_ + 1) % indices_.size();
      if (host_check::core().buffers[static_cast<size_t>(index)].state ==
          host_check::BufferState::kFree) {
        return index;
      }
    }
    host_check::fail("alloc-without-free", "AllocTensor: all %zu buffers of the queue are in use",
                     indices_.size());
  }
  host_check::Buffer& own(const host_check::View& view, const char* what) const {
    if (view.buffer >= 0) host_check::core().check_epoch(view.epoch, what);
    for (const int32_t index : indices_) {
      if (index == view.buffer) return host_check::core().buffers[static_cast<size_t>(index)];
    }
    host_check::fail("wrong-queue", "%s of a tensor that this queue did not allocate", what);
  }

  std::vector<int32_t> indices_;
  std::deque<int32_t> queued_;
  size_t next_ = 0;
  uint32_t epoch_ = 0;
};

template <TPosition position>
struct QueueEnds {
  static_assert(position == TPosition::VECIN || position == TPosition::VECOUT,
                "queue-position: a TQue is VECIN or VECOUT");
  static constexpr TPosition kSource =
      position == TPosition::VECIN ? TPosition::GM : TPosition::VECOUT;
  static constexpr TPosition kDestination =
      position == TPosition::VECIN ? TPosition::VECIN : TPosition::GM;
};

template <TPosition position, int32_t depth, auto mask = 0>
class TQue : public TQueBind<QueueEnds<position>::kSource, QueueEnds<position>::kDestination,
                             depth, mask> {};

template <TPosition position>
class TBuf {
  static_assert(position == TPosition::VECIN || position == TPosition::VECOUT ||
                    position == TPosition::VECCALC,
                "buffer-position: a TBuf is VECIN, VECOUT or VECCALC");

 public:
  template <typename T>
  LocalTensor<T> Get() {
    const host_check::Buffer& buffer = self();
    return get<T>(0, static_cast<uint32_t>((buffer.end - buffer.begin) / sizeof(T)));
  }
  template <typename T>
  LocalTensor<T> Get(uint32_t elements) {
    return get<T>(0, elements);
  }
  template <typename T>
  LocalTensor<T> GetWithOffset(uint32_t elements, uint32_t byte_offset) {
    return get<T>(byte_offset, elements);
  }

 private:
  friend class TPipe;
  const host_check::Buffer& self() const {
    if (index_ < 0) host_check::fail("queue-without-buffer", "TBuf::Get before TPipe::InitBuffer");
    host_check::core().check_epoch(epoch_, "TBuf::Get");
    return host_check::core().buffers[static_cast<size_t>(index_)];
  }
  template <typename T>
  LocalTensor<T> get(uint32_t byte_offset, uint32_t elements) {
    const host_check::Buffer& buffer = self();
    if (buffer.begin + byte_offset + uint64_t{elements} * sizeof(T) > buffer.end) {
      host_check::fail("ub-out-of-bounds", "TBuf::Get of %u elements from a buffer of %u bytes",
                       elements, buffer.end - buffer.begin);
    }
    return LocalTensor<T>(
        host_check::View{buffer.begin + byte_offset, index_, buffer.generation, epoch_}, elements);
  }
  int32_t index_ = -1;
  uint32_t epoch_ = 0;
};

class TPipe;
inline TPipe*& current_pipe() {
  static TPipe* pipe = nullptr;
  return pipe;
}

class TPipe {
 public:
  TPipe() {
    host_check::Core& core = host_check::core();
    if (core.pipe_alive) host_check::fail("tpipe", "a second TPipe while the first one lives");
    core.pipe_alive = true;
    current_pipe() = this;
  }
  ~TPipe() {
    if (current_pipe() == this) current_pipe() = nullptr;
    if (host_check::current_core() == nullptr) return;
    host_check::core().pipe_alive = false;
    host_check::core().end_epoch();
  }
  TPipe(const TPipe&) = delete;
  TPipe& operator=(const TPipe&) = delete;

  template <class Queue>
  bool InitBuffer(Queue& queue, host_check::Ranged<255> num, host_check::Count bytes) {
    check_length(bytes);
    if (num == 0u) host_check::fail("init-buffer", "a queue of 0 buffers");
    if (!queue.indices_.empty()) host_check::fail("init-buffer", "a queue initialised twice");
    queue.epoch_ = host_check::core().epoch();
    for (uint32_t i = 0; i < num; ++i) {
      queue.indices_.push_back(host_check::core().new_buffer(bytes, Queue::position(),
                                                             host_check::BufferState::kFree));
    }
    return true;
  }
  template <TPosition position>
  bool InitBuffer(TBuf<position>& buffer, host_check::Count bytes) {
    check_length(bytes);
    if (buffer.index_ >= 0) host_check::fail("init-buffer", "a TBuf initialised twice");
    buffer.epoch_ = host_check::core().epoch();
    buffer.index_ = host_check::core().new_buffer(bytes, position,
                                                  host_check::BufferState::kScratch);
    return true;
  }
  event_t FetchEventID(HardEvent event) {
    return static_cast<event_t>(host_check::core().fetch_event(static_cast<int>(event), false));
  }
  template <HardEvent event>
  event_t FetchEventID() {
    return FetchEventID(event);
  }
  template <HardEvent event>
  event_t AllocEventID() {
    return static_cast<event_t>(host_check::core().fetch_event(static_cast<int>(event), true));
  }
  template <HardEvent event>
  void ReleaseEventID(int32_t id) {
    host_check::core().release_event(static_cast<int>(event), id);
  }

 private:
  static void check_length(uint32_t bytes) {
    if (bytes == 0) host_check::fail("init-buffer", "a buffer of 0 bytes");
  }
};

inline TPipe* GetTPipePtr() {
  if (current_pipe() == nullptr) host_check::fail("tpipe", "GetTPipePtr without a TPipe");
  return current_pipe();
}

inline int64_t GetBlockIdx() { return host_check::core().block; }
inline int64_t GetBlockNum() { return host_check::core().config.block_dim; }

}  // namespace AscendC
