// The unified buffer and the queues.
#include "cases.h"

using namespace AscendC;
using wrong_kernels::global;

using In = TQue<TPosition::VECIN, 1>;

KERNEL(budget, "ub-overflow") {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, wrong ? 184 * 1024 + 1 : 184 * 1024);
}

KERNEL(buffers_of_a_queue, "ub-overflow") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, wrong ? 3 : 2, 80 * 1024);
}

KERNEL(sixty_five_buffers, "too-many-buffers") {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffers[65];
  for (int i = 0; i < (wrong ? 65 : 64); ++i) pipe.InitBuffer(buffers[i], 32);
}

KERNEL(nine_outstanding, "too-many-outstanding") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 9, 32);
  LocalTensor<float> tensors[9];
  const int n = wrong ? 9 : 8;
  for (int i = 0; i < n; ++i) tensors[i] = queue.AllocTensor<float>();
  for (int i = 0; i < n; ++i) queue.FreeTensor(tensors[i]);
}

KERNEL(empty_buffer, "init-buffer") {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, wrong ? 0 : 32);
}

KERNEL(queue_without_buffers, "queue-without-buffer") {
  TPipe pipe;
  In queue;
  if (!wrong) pipe.InitBuffer(queue, 1, 32);
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  queue.FreeTensor(tensor);
}

KERNEL(two_pipes, "tpipe") {
  TPipe pipe;
  if (wrong) TPipe second;
}

KERNEL(third_alloc_of_two, "alloc-without-free") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 2, 32);
  LocalTensor<float> a = queue.AllocTensor<float>();
  LocalTensor<float> b = queue.AllocTensor<float>();
  if (!wrong) queue.FreeTensor(a);
  LocalTensor<float> c = queue.AllocTensor<float>();
  queue.FreeTensor(b);
  queue.FreeTensor(c);
}

KERNEL(enqueue_twice, "enqueue-not-allocated") {
  TPipe pipe;
  TQue<TPosition::VECIN, 2> queue;
  pipe.InitBuffer(queue, 2, 32);
  LocalTensor<float> a = queue.AllocTensor<float>();
  LocalTensor<float> b = queue.AllocTensor<float>();
  queue.EnQue(a);
  queue.EnQue(wrong ? a : b);
  LocalTensor<float> c = queue.DeQue<float>();
  queue.FreeTensor(c);
  c = queue.DeQue<float>();
  queue.FreeTensor(c);
}

KERNEL(enqueue_past_depth, "queue-depth") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 2, 32);
  LocalTensor<float> a = queue.AllocTensor<float>();
  LocalTensor<float> b = queue.AllocTensor<float>();
  queue.EnQue(a);
  if (!wrong) {
    a = queue.DeQue<float>();
    queue.FreeTensor(a);
  }
  queue.EnQue(b);
  b = queue.DeQue<float>();
  queue.FreeTensor(b);
}

KERNEL(dequeue_of_nothing, "dequeue-empty") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 32);
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  if (!wrong) queue.EnQue(tensor);
  tensor = queue.DeQue<float>();
  queue.FreeTensor(tensor);
}

KERNEL(free_twice, "double-free") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 2, 32);
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  queue.FreeTensor(tensor);
  if (wrong) queue.FreeTensor(tensor);
}

KERNEL(queue_of_another, "wrong-queue") {
  TPipe pipe;
  In one, two;
  pipe.InitBuffer(one, 1, 32);
  pipe.InitBuffer(two, 1, 32);
  LocalTensor<float> tensor = one.AllocTensor<float>();
  if (wrong) two.EnQue(tensor);
  one.FreeTensor(tensor);
}

KERNEL(leak_of_an_allocated_tensor, "queue-leak") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 32);
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  if (!wrong) queue.FreeTensor(tensor);
}

KERNEL(leak_of_a_queued_tensor, "queue-leak") {
  TPipe pipe;
  In queue;
  pipe.InitBuffer(queue, 1, 32);
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  queue.EnQue(tensor);
  if (wrong) return;
  tensor = queue.DeQue<float>();
  queue.FreeTensor(tensor);
}

KERNEL(use_of_a_freed_tensor, "use-after-free") {
  TPipe pipe;
  TQue<TPosition::VECOUT, 1> queue;
  pipe.InitBuffer(queue, 1, 256);
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  if (wrong) queue.FreeTensor(tensor);
  Duplicate(tensor, 1.0f, 64);
  if (!wrong) queue.FreeTensor(tensor);
}

KERNEL(use_of_a_queued_tensor, "use-while-queued") {
  TPipe pipe;
  TQue<TPosition::VECOUT, 1> queue;
  pipe.InitBuffer(queue, 1, 256);
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  if (!wrong) Duplicate(tensor, 1.0f, 64);
  queue.EnQue(tensor);
  if (wrong) Duplicate(tensor, 1.0f, 64);
  tensor = queue.DeQue<float>();
  queue.FreeTensor(tensor);
}

KERNEL(tensor_of_no_buffer, "tensor-without-buffer") {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, 256);
  LocalTensor<float> tensor;
  if (!wrong) tensor = buffer.Get<float>();
  Duplicate(tensor, 1.0f, 64);
}

KERNEL(tensor_of_a_dead_pipe, "outlived-pipe") {
  LocalTensor<float> tensor;
  {
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, 256);
    tensor = buffer.Get<float>();
    if (!wrong) Duplicate(tensor, 1.0f, 64);
  }
  if (wrong) Duplicate(tensor, 1.0f, 64);
}

KERNEL(tensor_of_another_core, "outlived-pipe") {
  static LocalTensor<float> kept;
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, 256);
  if (!wrong || kept.GetSize() == 0) kept = buffer.Get<float>();
  Duplicate(kept, 1.0f, 64);
}

KERNEL(queue_of_a_dead_pipe, "outlived-pipe") {
  In queue;
  {
    TPipe pipe;
    pipe.InitBuffer(queue, 1, 256);
    if (!wrong) {
      LocalTensor<float> tensor = queue.AllocTensor<float>();
      queue.FreeTensor(tensor);
    }
  }
  if (!wrong) return;
  LocalTensor<float> tensor = queue.AllocTensor<float>();
  queue.FreeTensor(tensor);
}

KERNEL(more_than_the_buffer_has, "ub-out-of-bounds") {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, 256);
  Duplicate(buffer.Get<float>(wrong ? 65u : 64u), 1.0f, 64);
}
