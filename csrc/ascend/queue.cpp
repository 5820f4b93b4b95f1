#include "queue.h"

#include <torch_npu/csrc/core/npu/NPUFormat.h>
#include <torch_npu/csrc/core/npu/NPUGuard.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>
#include <torch_npu/csrc/framework/OpCommand.h>

#include <utility>

namespace bitcpm::ascend {

bool is_on_device(const at::Tensor& tensor) { return tensor.is_privateuseone(); }

bool has_plain_format(const at::Tensor& tensor) {
  // torch_npu takes the next for granted.
  if (!is_on_device(tensor)) return false;
  const int64_t format = at_npu::native::get_npu_format(tensor);
  return format == ACL_FORMAT_ND || format == ACL_FORMAT_NCHW || format == ACL_FORMAT_NCDHW;
}

void enqueue(const char* name, const at::Tensor& tensor, std::function<void(void*)> launch) {
  const c10_npu::NPUGuard guard(tensor.device());
  // false: do not wait for the queue. A kernel put on the stream from here would overtake the
  // operations still in the queue, so OpCommand puts it there when its turn comes.
  void* stream = c10_npu::getCurrentNPUStream().stream(false);
  at_npu::native::OpCommand::RunOpApi(name, [stream, launch = std::move(launch)]() -> int {
    launch(stream);
    return 0;
  });
}

}  // namespace bitcpm::ascend
