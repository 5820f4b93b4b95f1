// Copies between global memory and the unified buffer: parameters, positions, global memory.
#include "cases.h"

using namespace AscendC;
using wrong_kernels::global;
using wrong_kernels::kElements;

using In = TQue<TPosition::VECIN, 1>;
using Out = TQue<TPosition::VECOUT, 1>;

namespace {

const DataCopyPadExtParams<float> kNoPad{false, 0, 0, 0.0f};

// Fills a tensor of the queue from global memory and gives it back.
void copy_in(In& queue, const GlobalTensor<float>& from, const DataCopyExtParams& params) {
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  DataCopyPad(tensor, from, params, kNoPad);
  queue.EnQue(tensor);
  tensor = queue.DeQue<float>();
  queue.FreeTensor(tensor);
}

// Writes `count` ones to global memory.
void copy_out(Out& queue, const GlobalTensor<float>& to, uint32_t count) {
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  Duplicate(tensor, 1.0f, static_cast<int32_t>(count));
  queue.EnQue(tensor);
  tensor = queue.DeQue<float>();
  DataCopyPad(to, tensor, DataCopyExtParams(1, count * 4, 0, 0, 0));
  queue.FreeTensor(tensor);
}

uint32_t me() { return static_cast<uint32_t>(GetBlockIdx()); }

}  // namespace

KERNEL(copy_of_a_tail, "datacopy-rounding") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 512);
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  DataCopy(tensor, global(memory.in), wrong ? 100 : 104);
  queue.FreeTensor(tensor);
}

KERNEL(copy_blocks_over_4095, "copy-params") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 160 * 1024);
  const uint16_t blocks = wrong ? 5000 : 256;
  copy_in(queue, global(memory.in), {blocks, 4, 0, 0, 0});
}

KERNEL(copy_length_splits_an_element, "copy-params") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 512);
  copy_in(queue, global(memory.in), {1, wrong ? 30u : 32u, 0, 0, 0});
}

KERNEL(copy_length_over_2_mib, "copy-params") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 512);
  copy_in(queue, global(memory.in), {1, wrong ? 2097152u : 512u, 0, 0, 0});
}

KERNEL(padding_over_32_bytes, "copy-params") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 512);
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  const uint8_t right = wrong ? 9 : 8;
  DataCopyPad(tensor, global(memory.in), {1, 32, 0, 0, 0}, {true, 0, right, 0.0f});
  queue.FreeTensor(tensor);
}

KERNEL(copy_past_the_unified_buffer, "ub-out-of-bounds") {
  // 8 blocks of 36 bytes fill 64 bytes each.
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, wrong ? 288 : 512);
  copy_in(queue, global(memory.in), {8, 36, 0, 0, 0});
}

KERNEL(ub_gap_in_blocks, "ub-out-of-bounds") {
  // dstStride counts 32-byte blocks, not bytes.
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 256);
  copy_in(queue, global(memory.in), {4, 32, 0, wrong ? 32u : 1u, 0});
}

KERNEL(copy_into_scratch, "dma-position") {
  TPipe pipe;
  TBuf<TPosition::VECCALC> scratch;
  TBuf<TPosition::VECIN> input;
  pipe.InitBuffer(scratch, 512);
  pipe.InitBuffer(input, 512);
  DataCopy(wrong ? scratch.Get<float>() : input.Get<float>(), global(memory.in), 128);
}

KERNEL(misaligned_copy, "ub-misaligned") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 512);
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  DataCopyPad(tensor[wrong ? 4 : 8], global(memory.in), {1, 32, 0, 0, 0}, kNoPad);
  queue.FreeTensor(tensor);
}

KERNEL(read_past_the_end, "gm-out-of-bounds") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 512);
  copy_in(queue, global(memory.in)[kElements - 32], {1, wrong ? 132u : 128u, 0, 0, 0});
}

KERNEL(read_past_the_allocation, "gm-out-of-bounds") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 512);
  GlobalTensor<float> tensor;
  tensor.SetGlobalBuffer(memory.in.data());
  copy_in(queue, tensor[kElements - 32], {1, wrong ? 160u : 128u, 0, 0, 0});
}

KERNEL(tensor_larger_than_the_allocation, "gm-out-of-bounds") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 512);
  GlobalTensor<float> tensor;
  tensor.SetGlobalBuffer(memory.in.data(), kElements + (wrong ? 1 : 0));
  copy_in(queue, tensor, {1, 128, 0, 0, 0});
}

KERNEL(read_of_the_neighbouring_allocation, "gm-out-of-bounds") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 512);
  const float *first = memory.in.data(), *second = memory.both.data();
  if (second < first) std::swap(first, second);
  GlobalTensor<float> tensor;
  tensor.SetGlobalBuffer(const_cast<float*>(first));
  copy_in(queue, tensor[wrong ? static_cast<uint64_t>(second - first) : 0], {1, 128, 0, 0, 0});
}

KERNEL(output_with_a_gap, "gm-unwritten") {
  TPipe pipe;
  Out queue;
  pipe.InitBuffer(queue, 1, 2048);
  const uint32_t share = 352, begin = me() * share;
  const uint32_t count = me() < 2 ? share : kElements - 2 * share - (wrong ? 1 : 0);
  copy_out(queue, global(memory.out)[begin], count);
}

KERNEL(global_gap_in_bytes, "gm-out-of-bounds") {
  // srcStride counts bytes, not blocks: 16 blocks of 128 bytes, 128 bytes apart.
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 4096);
  copy_in(queue, global(memory.in), {16, 128, wrong ? 4 * 128u : 128u, 0, 0});
}

KERNEL(write_to_the_input, "gm-read-only") {
  TPipe pipe;
  Out queue;
  pipe.InitBuffer(queue, 1, 256);
  copy_out(queue, global(wrong ? memory.in : memory.out)[me() * 64], 64);
}

KERNEL(cores_write_the_same_bytes, "gm-write-overlap") {
  TPipe pipe;
  Out queue;
  pipe.InitBuffer(queue, 1, 512);
  copy_out(queue, global(memory.out)[me() * 64], wrong ? 65 : 64);
}

KERNEL(read_of_an_unwritten_output, "gm-read-of-unwritten") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 256);
  copy_in(queue, global(wrong ? memory.out : memory.in), {1, 256, 0, 0, 0});
}

KERNEL(read_of_what_another_core_writes, "gm-read-of-other-core") {
  TPipe pipe;
  In in;
  Out out;
  pipe.InitBuffer(in, 1, 256);
  pipe.InitBuffer(out, 1, 256);
  copy_out(out, global(memory.both)[me() * 64], 64);
  PipeBarrier<PIPE_ALL>();
  copy_in(in, global(memory.both)[(wrong ? (me() + 1) % 3 : me()) * 64], {1, 256, 0, 0, 0});
}

KERNEL(tensor_without_memory, "gm-out-of-bounds") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 256);
  GlobalTensor<float> tensor;
  if (!wrong) tensor.SetGlobalBuffer(memory.in.data(), kElements);
  copy_in(queue, tensor, {1, 256, 0, 0, 0});
}

KERNEL(copy_through_without_arithmetic, "uninitialised-read") {
  // 2 lines of 4 blocks in, 4 blocks apart in global memory; lengths and gaps count 32 bytes.
  TPipe pipe;
  TQueBind<TPosition::VECIN, TPosition::VECOUT, 1> queue;
  pipe.InitBuffer(queue, 1, 512);
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  DataCopy(tensor, global(memory.in), DataCopyParams(2, 4, 4, 0));
  queue.EnQue(tensor);
  tensor = queue.DeQue<float>();
  DataCopy(global(memory.out)[me() * 128], tensor, wrong ? 128 : 64);
  queue.FreeTensor(tensor);
}
