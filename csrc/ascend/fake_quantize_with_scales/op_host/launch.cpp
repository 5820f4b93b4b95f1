#include <ATen/ops/empty_like.h>

#include "checks.h"
#include "fake_quantize_with_scales/op_host/fake_quantize_with_scales_launch.h"
#include "fake_quantize_with_scales/op_host/fake_quantize_with_scales_tiling.h"
#include "launchers.h"
#include "platform.h"
#include "queue.h"

namespace bitcpm::ascend {
namespace {

struct Job {
  at::Tensor w, scales, wq;
  DType dtype;
  GroupTiling tiling;
};

// Adds a job unless there is nothing to do.
void add_job(std::vector<Job>& jobs, const at::Tensor& w, const at::Tensor& scales,
             const at::Tensor& wq) {
  check_matrix(w, "w");
  check_matrix(scales, "scales");
  check_same_device(scales, w);
  TORCH_CHECK(scales.scalar_type() == at::kFloat, "scales.dtype must be float32");
  if (w.numel() == 0) return;
  TORCH_CHECK(scales.size(0) == w.size(0) && scales.size(1) > 0 && w.size(1) % scales.size(1) == 0,
              "scales.shape ", scales.sizes(), " does not fit w.shape ", w.sizes());
  Job job{w, scales, wq, dtype_of(w), {}};
  check_tiling(make_fake_quantize_with_scales_tiling(job.dtype, w.size(0), w.size(1),
                                                     w.size(1) / scales.size(1), get_device(),
                                                     &job.tiling));
  jobs.push_back(std::move(job));
}

void launch(std::vector<Job> jobs) {
  if (jobs.empty()) return;
  const at::Tensor first = jobs.front().w;
  enqueue("bitcpm_fake_quantize_with_scales", first, [jobs = std::move(jobs)](void* stream) {
    for (const Job& job : jobs)
      launch_fake_quantize_with_scales(job.dtype, stream, job.w.data_ptr(), job.scales.data_ptr(),
                                       job.wq.data_ptr(), job.tiling);
  });
}

}  // namespace

at::Tensor fake_quantize_with_scales(const at::Tensor& w, const at::Tensor& scales) {
  const at::Tensor wq = at::empty_like(w);
  std::vector<Job> jobs;
  add_job(jobs, w, scales, wq);
  launch(std::move(jobs));
  return wq;
}

void fake_quantize_with_scales_list(const Tensors& ws, const Tensors& scales) {
  TORCH_CHECK(ws.size() == scales.size(), "one tensor of scales per weight is needed");
  std::vector<Job> jobs;
  for (size_t i = 0; i < ws.size(); ++i) {
    check_same_device(ws[i], ws[0]);
    add_job(jobs, ws[i], scales[i], ws[i]);
  }
  launch(std::move(jobs));
}

}  // namespace bitcpm::ascend
