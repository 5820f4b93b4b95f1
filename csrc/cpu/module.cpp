// Python module megatron_bitcpm._cpu: plain functions over addresses and sizes. It knows no torch;
// megatron_bitcpm/ops/_operators.py checks type and layout before _cpu.py passes data_ptr().

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace py = pybind11;

namespace bitcpm {
namespace {

Kernels kernels = list_isas().front().get_kernels();

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : list_isas()) names.emplace_back(isa.name);
  return names;
}

std::string select_isa(const std::string& name) {
  for (const Isa& isa : list_isas()) {
    if (name == isa.name || name == "auto") {
      kernels = isa.get_kernels();
      return isa.name;
    }
  }
  throw std::invalid_argument("instruction set " + name + " is not supported here");
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

DType to_dtype(int code) {
  if (code < 0 || code >= kNumDTypes)
    throw std::invalid_argument("unknown element type " + std::to_string(code));
  return static_cast<DType>(code);
}

Grid to_grid(int code) {
  if (code < 0 || code >= kNumGrids)
    throw std::invalid_argument("unknown grid " + std::to_string(code));
  return static_cast<Grid>(code);
}

void check_sizes(int64_t count, int64_t length) {
  if (count < 0 || length < 0)
    throw std::invalid_argument("negative size " + std::to_string(count < 0 ? count : length));
}

// Addresses of w and wq (and, in the second form, of scales between them), type, groups, length.
using Unscaled = std::tuple<uintptr_t, uintptr_t, int, int64_t, int64_t>;
using Scaled = std::tuple<uintptr_t, uintptr_t, uintptr_t, int, int64_t, int64_t>;

Job make_job(uintptr_t w, uintptr_t scales, uintptr_t wq, int dtype, int64_t num_groups,
             int64_t group_len) {
  check_sizes(num_groups, group_len);
  return {at<const void>(w), at<const float>(scales), at<void>(wq), to_dtype(dtype), num_groups,
          group_len};
}

void fake_quantize_jobs(const std::vector<Unscaled>& tuples, int grid, double eps, int threads) {
  std::vector<Job> jobs;
  jobs.reserve(tuples.size());
  for (const auto& [w, wq, dtype, num_groups, group_len] : tuples)
    jobs.push_back(make_job(w, 0, wq, dtype, num_groups, group_len));
  fake_quantize(kernels, jobs, to_grid(grid), static_cast<float>(eps), threads);
}

void fake_quantize_jobs_with_scales(const std::vector<Scaled>& tuples, int grid, int threads) {
  std::vector<Job> jobs;
  jobs.reserve(tuples.size());
  for (const auto& [w, scales, wq, dtype, num_groups, group_len] : tuples)
    jobs.push_back(make_job(w, scales, wq, dtype, num_groups, group_len));
  fake_quantize_with_scales(kernels, jobs, to_grid(grid), threads);
}

void quantize_at(uintptr_t w, uintptr_t codes, uintptr_t scales, int dtype, int grid,
                 int64_t num_groups, int64_t group_len, double eps, int threads) {
  check_sizes(num_groups, group_len);
  quantize(kernels, to_dtype(dtype), to_grid(grid), at<const void>(w), at<int8_t>(codes),
           at<float>(scales), num_groups, group_len, static_cast<float>(eps), threads);
}

void abs_sums_at(uintptr_t w, uintptr_t sums, int dtype, int64_t num_groups, int64_t group_len,
                 int threads) {
  check_sizes(num_groups, group_len);
  abs_sums(kernels, to_dtype(dtype), at<const void>(w), at<float>(sums), num_groups, group_len,
           threads);
}

int64_t pack2_at(uintptr_t codes, uintptr_t packed, int64_t rows, int64_t cols, int threads) {
  check_sizes(rows, cols);
  return pack2(kernels, at<const int8_t>(codes), at<uint8_t>(packed), rows, cols, threads);
}

int64_t unpack2_at(uintptr_t packed, uintptr_t codes, int64_t rows, int64_t cols, int threads) {
  check_sizes(rows, cols);
  return unpack2(kernels, at<const uint8_t>(packed), at<int8_t>(codes), rows, cols, threads);
}

void int8_per_token_at(uintptr_t x, uintptr_t xq, int dtype, int64_t rows, int64_t cols,
                       int threads) {
  check_sizes(rows, cols);
  int8_per_token(kernels, to_dtype(dtype), at<const void>(x), at<void>(xq), rows, cols, threads);
}

}  // namespace
}  // namespace bitcpm

PYBIND11_MODULE(_cpu, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "The operators on the CPU, over addresses; see csrc/cpu/kernels.h.";
  m.attr("abi") = 1;  // raised with every change of what is below; see ops/_cpu.py
  m.def("supported_isas", &bitcpm::supported_isas);
  m.def("select_isa", &bitcpm::select_isa);
  m.def("fake_quantize", &bitcpm::fake_quantize_jobs, release());
  m.def("fake_quantize_with_scales", &bitcpm::fake_quantize_jobs_with_scales, release());
  m.def("quantize", &bitcpm::quantize_at, release());
  m.def("abs_sums", &bitcpm::abs_sums_at, release());
  m.def("pack2", &bitcpm::pack2_at, release());
  m.def("unpack2", &bitcpm::unpack2_at, release());
  m.def("int8_per_token", &bitcpm::int8_per_token_at, release());
}
