// Order of instructions: barriers, flags, queues, and values that nothing has written.
#include "cases.h"

using namespace AscendC;
using wrong_kernels::global;
using wrong_kernels::Scratch;

namespace {

const DataCopyPadExtParams<float> kNoPad{false, 0, 0, 0.0f};
const DataCopyExtParams kCopy256{1, 256, 0, 0, 0};
uint32_t mine() { return static_cast<uint32_t>(GetBlockIdx()) * 64; }

// Scratch buffers used as copy targets without a queue.
struct Buffers {
  TPipe pipe;
  TBuf<TPosition::VECIN> in_buffer;
  TBuf<TPosition::VECOUT> out_buffer;
  LocalTensor<float> in, out;
  Buffers() {
    pipe.InitBuffer(in_buffer, 512);
    pipe.InitBuffer(out_buffer, 512);
    in = in_buffer.Get<float>();
    out = out_buffer.Get<float>();
  }
};

template <HardEvent event>
void order(TPipe& pipe, bool wanted) {
  if (!wanted) return;
  const int32_t id = static_cast<int32_t>(pipe.FetchEventID(event));
  SetFlag<event>(id);
  WaitFlag<event>(id);
}

}  // namespace

KERNEL(read_after_write, "missing-barrier") {
  Scratch s(64);
  Adds(s.x[64], s.x, 1.0f, 64);
  if (!wrong) PipeBarrier<PIPE_V>();
  Adds(s.x[128], s.x[64], 1.0f, 64);
}

KERNEL(write_after_read, "missing-barrier") {
  Scratch s(64);
  Adds(s.x[64], s.x, 1.0f, 64);
  if (!wrong) PipeBarrier<PIPE_V>();
  Duplicate(s.x, 2.0f, 64);
}

KERNEL(write_after_write, "missing-barrier") {
  Scratch s(64);
  Adds(s.x[64], s.x, 1.0f, 64);
  if (!wrong) PipeBarrier<PIPE_V>();
  Duplicate(s.x[64], 2.0f, 64);
}

KERNEL(read_after_reduce, "missing-barrier") {
  Scratch s(64);
  WholeReduceSum(s.x[64], s.x, 64, 1, 1, 1, 8);
  if (!wrong) PipeBarrier<PIPE_V>();
  Adds(s.x[72], s.x[64], 1.0f, 1);
}

KERNEL(unwritten_scratch, "uninitialised-read") {
  Scratch s(64);
  Adds(s.x, s.x, 1.0f, wrong ? 65 : 64);
}

KERNEL(unwritten_lanes_of_a_reduce, "uninitialised-read") {
  Scratch s(60);
  WholeReduceSum(s.x[64], s.x, wrong ? 64 : 60, 1, 1, 1, 8);
}

KERNEL(lanes_added_by_the_copy, "uninitialised-read") {
  // 20 bytes are copied, 12 are added to fill 32.
  Buffers b;
  DataCopyPad(b.in, global(memory.in), {1, 20, 0, 0, 0}, kNoPad);
  order<HardEvent::MTE2_V>(b.pipe, true);
  Adds(b.out, b.in, 1.0f, wrong ? 8 : 5);
}

KERNEL(stale_data_of_a_queue, "uninitialised-read") {
  // A tensor that is allocated again holds nothing.
  TPipe pipe;
  TQue<TPosition::VECOUT, 1> queue;
  pipe.InitBuffer(queue, 1, 256);
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  Duplicate(tensor, 1.0f, 64);
  queue.FreeTensor(tensor);
  tensor = queue.AllocTensor<float>();
  if (!wrong) Duplicate(tensor, 1.0f, 64);
  PipeBarrier<PIPE_V>();
  Adds(tensor, tensor, 1.0f, 64);
  queue.FreeTensor(tensor);
}

KERNEL(unwritten_copy_out, "uninitialised-read") {
  Buffers b;
  Duplicate(b.out, 1.0f, wrong ? 63 : 64);
  order<HardEvent::V_MTE3>(b.pipe, true);
  DataCopyPad(global(memory.out)[mine()], b.out, kCopy256);
}

KERNEL(vector_before_its_copy, "missing-sync") {
  Buffers b;
  DataCopyPad(b.in, global(memory.in), kCopy256, kNoPad);
  order<HardEvent::MTE2_V>(b.pipe, !wrong);
  Adds(b.out, b.in, 1.0f, 64);
}

KERNEL(copy_out_before_vector, "missing-sync") {
  Buffers b;
  Duplicate(b.out, 1.0f, 64);
  order<HardEvent::V_MTE3>(b.pipe, !wrong);
  DataCopyPad(global(memory.out)[mine()], b.out, kCopy256);
}

KERNEL(barrier_is_no_flag, "missing-sync") {
  Buffers b;
  DataCopyPad(b.in, global(memory.in), kCopy256, kNoPad);
  if (wrong) {
    PipeBarrier<PIPE_MTE2>();
    PipeBarrier<PIPE_V>();
  } else {
    PipeBarrier<PIPE_ALL>();
  }
  Adds(b.out, b.in, 1.0f, 64);
}

KERNEL(reuse_under_the_copy_out, "missing-sync") {
  Buffers b;
  Duplicate(b.out, 1.0f, 64);
  order<HardEvent::V_MTE3>(b.pipe, true);
  DataCopyPad(global(memory.out)[mine()], b.out, kCopy256);
  order<HardEvent::MTE3_V>(b.pipe, !wrong);
  PipeBarrier<PIPE_V>();
  Duplicate(b.out, 2.0f, 64);
}

KERNEL(copy_in_over_a_copy_out, "missing-sync") {
  TPipe pipe;
  TBuf<TPosition::VECIN> buffer;
  pipe.InitBuffer(buffer, 256);
  const LocalTensor<float> tensor = buffer.Get<float>();
  DataCopyPad(tensor, global(memory.in), kCopy256, kNoPad);
  order<HardEvent::MTE2_MTE3>(pipe, true);
  DataCopyPad(global(memory.out)[mine()], tensor, kCopy256);
  order<HardEvent::MTE3_MTE2>(pipe, !wrong);
  DataCopyPad(tensor, global(memory.in), kCopy256, kNoPad);
}

KERNEL(copy_in_over_a_vector_read, "missing-sync") {
  Buffers b;
  DataCopyPad(b.in, global(memory.in), kCopy256, kNoPad);
  order<HardEvent::MTE2_V>(b.pipe, true);
  Adds(b.out, b.in, 1.0f, 64);
  order<HardEvent::V_MTE2>(b.pipe, !wrong);
  DataCopyPad(b.in, global(memory.in), kCopy256, kNoPad);
}

KERNEL(two_copies_into_one_place, "missing-sync") {
  Buffers b;
  DataCopyPad(b.in, global(memory.in), kCopy256, kNoPad);
  if (!wrong) PipeBarrier<PIPE_MTE2>();
  DataCopyPad(b.in, global(memory.in)[64], kCopy256, kNoPad);
}

KERNEL(two_copies_to_one_global_place, "missing-sync") {
  Buffers b;
  Duplicate(b.out, 1.0f, 64);
  order<HardEvent::V_MTE3>(b.pipe, true);
  DataCopyPad(global(memory.out)[mine()], b.out, kCopy256);
  if (!wrong) PipeBarrier<PIPE_MTE3>();
  DataCopyPad(global(memory.out)[mine()], b.out, kCopy256);
}

KERNEL(read_back_of_an_output, "missing-sync") {
  Buffers b;
  Duplicate(b.out, 1.0f, 64);
  order<HardEvent::V_MTE3>(b.pipe, true);
  DataCopyPad(global(memory.out)[mine()], b.out, kCopy256);
  order<HardEvent::MTE3_MTE2>(b.pipe, !wrong);
  DataCopyPad(b.in, global(memory.out)[mine()], kCopy256, kNoPad);
}

KERNEL(write_in_place_before_the_read, "missing-sync") {
  // The result overwrites weights whose copy in may still be under way.
  Buffers b;
  DataCopyPad(b.in, global(memory.both)[mine()], kCopy256, kNoPad);
  Duplicate(b.out, 1.0f, 64);
  order<HardEvent::MTE2_V>(b.pipe, !wrong);
  order<HardEvent::V_MTE3>(b.pipe, true);
  DataCopyPad(global(memory.both)[mine()], b.out, kCopy256);
}

KERNEL(scalar_read_after_vector, "missing-sync") {
  Scratch s(64);
  order<HardEvent::V_S>(s.pipe, !wrong);
  const float first = s.x.GetValue(0);
  Adds(s.x[64], s.x, first, 64);
}

KERNEL(vector_after_scalar_write, "missing-sync") {
  Scratch s(64);
  s.x.SetValue(64, 1.0f);
  order<HardEvent::S_V>(s.pipe, !wrong);
  Adds(s.x[72], s.x[64], 1.0f, 1);
}

KERNEL(set_without_wait, "flag-pair") {
  SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
  if (!wrong) WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
}

KERNEL(wait_without_set, "flag-pair") {
  if (!wrong) SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
  WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
}

KERNEL(wait_for_another_id, "flag-pair") {
  SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
  WaitFlag<HardEvent::MTE2_V>(wrong ? EVENT_ID1 : EVENT_ID0);
}

KERNEL(set_twice, "flag-pair") {
  SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
  if (!wrong) WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
  SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
  WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
}

KERNEL(event_id_8, "event-id") {
  const int32_t id = wrong ? 8 : 7;
  SetFlag<HardEvent::MTE2_V>(id);
  WaitFlag<HardEvent::MTE2_V>(id);
}
