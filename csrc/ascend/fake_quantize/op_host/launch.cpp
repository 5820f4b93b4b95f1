// fake_quantize and quantize: one kernel, its outputs wq, codes and scales are all optional.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "checks.h"
#include "fake_quantize/op_host/fake_quantize_launch.h"
#include "fake_quantize/op_host/fake_quantize_tiling.h"
#include "launchers.h"
#include "platform.h"
#include "queue.h"

namespace bitcpm::ascend {
namespace {

// Outputs that are not wanted are undefined tensors.
struct Job {
  at::Tensor w, wq, codes, scales;
  DType dtype;
  FakeQuantizeTiling tiling;
};

void* address_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.data_ptr() : nullptr;
}

// Adds a job unless there is nothing to do.
void add_job(std::vector<Job>& jobs, const at::Tensor& w, const at::Tensor& wq,
             const at::Tensor& codes, const at::Tensor& scales, int64_t group_len, double eps) {
  check_matrix(w, "w");
  check_group_len(w, group_len);
  if (w.numel() == 0) return;
  Job job{w, wq, codes, scales, dtype_of(w), {}};
  const FakeQuantizeOutputs outputs{wq.defined(), codes.defined(), scales.defined()};
  check_tiling(make_fake_quantize_tiling(job.dtype, w.size(0), w.size(1), group_len,
                                         static_cast<float>(eps), outputs, get_device(),
                                         &job.tiling));
  jobs.push_back(std::move(job));
}

void launch(std::vector<Job> jobs) {
  if (jobs.empty()) return;
  const at::Tensor first = jobs.front().w;
  // The jobs hold the tensors until the kernels are on the stream; from there on the stream's order
  // protects their memory.
  enqueue("bitcpm_fake_quantize", first, [jobs = std::move(jobs)](void* stream) {
    for (const Job& job : jobs)
      launch_fake_quantize(job.dtype, stream, address_of(job.w), address_of(job.wq),
                           address_of(job.codes), address_of(job.scales), job.tiling);
  });
}

}  // namespace

at::Tensor fake_quantize(const at::Tensor& w, int64_t group_len, double eps) {
  const at::Tensor wq = at::empty_like(w);
  std::vector<Job> jobs;
  add_job(jobs, w, wq, {}, {}, group_len, eps);
  launch(std::move(jobs));
  return wq;
}

std::tuple<at::Tensor, at::Tensor> quantize(const at::Tensor& w, int64_t group_len, double eps) {
  check_group_len(w, group_len);
  const at::Tensor codes = at::empty(w.sizes(), w.options().dtype(at::kChar));
  const at::Tensor scales =
      at::empty({w.size(0), w.size(1) / group_len}, w.options().dtype(at::kFloat));
  std::vector<Job> jobs;
  add_job(jobs, w, {}, codes, scales, group_len, eps);
  launch(std::move(jobs));
  return {codes, scales};
}

void fake_quantize_list(const Tensors& ws, const std::vector<int64_t>& group_lens, double eps) {
  TORCH_CHECK(ws.size() == group_lens.size(), "one group length per tensor is needed");
  std::vector<Job> jobs;
  for (size_t i = 0; i < ws.size(); ++i) {
    check_same_device(ws[i], ws[0]);
    add_job(jobs, ws[i], ws[i], {}, {}, group_lens[i], eps);
  }
  launch(std::move(jobs));
}

}  // namespace bitcpm::ascend
