// Python module megatron_bitcpm._cpu: plain functions over addresses and sizes. It knows no torch;
// megatron_bitcpm/ops/_cpu.py checks device, type and layout before it passes data_ptr().

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace py = pybind11;

namespace bitcpm {
namespace {

// A thread is worth waking for this many elements (torch's grain size).
constexpr int64_t kElementsPerThread = 32768;

struct Isa {
  const char* name;
  Kernels (*get_kernels)();
};

// Instruction sets of this processor, best first.
std::vector<Isa> list_isas() {
  std::vector<Isa> isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    isas.push_back({"avx512", get_kernels_avx512});
  if (__builtin_cpu_supports("avx2")) isas.push_back({"avx2", get_kernels_avx2});
#endif
  isas.push_back({"generic", get_kernels_generic});
  return isas;
}

Isa active_isa = list_isas().front();
Kernels kernels = active_isa.get_kernels();

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : list_isas()) names.emplace_back(isa.name);
  return names;
}

std::string select_isa(const std::string& name) {
  for (const Isa& isa : list_isas()) {
    if (name == isa.name || name == "auto") {
      active_isa = isa;
      kernels = isa.get_kernels();
      return isa.name;
    }
  }
  throw std::invalid_argument("instruction set " + name + " is not supported here");
}

// Call body(first, count) for contiguous ranges of groups, one per thread.
template <class Body>
void for_groups(int64_t num_groups, int64_t group_len, int threads, Body body) {
  const int64_t useful = num_groups * group_len / kElementsPerThread + 1;
  int64_t parts = threads < useful ? threads : useful;
  if (parts > num_groups) parts = num_groups;
  if (parts <= 1) return body(int64_t{0}, num_groups);
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = num_groups * part / parts;
    body(first, num_groups * (part + 1) / parts - first);
  }
}

template <class T>
T* at(uintptr_t address, int64_t bytes) {
  return reinterpret_cast<T*>(address + static_cast<uintptr_t>(bytes));
}

// Ask for huge pages under a fresh output, where the system leaves that to the program: most of the
// time of a large output is spent on the first touch of its 4 KiB pages. A hint; failure is fine.
void advise_huge_pages(uintptr_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t first = (address + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void fake_quantize(uintptr_t w, uintptr_t wq, int dtype_code, int64_t num_groups,
                   int64_t group_len, double eps, int threads) {
  const DType dtype = static_cast<DType>(dtype_code);
  const int64_t bytes = group_len * size_of(dtype);
  for_groups(num_groups, group_len, threads, [&](int64_t first, int64_t count) {
    kernels.fake_quantize(dtype, at<const void>(w, first * bytes), at<void>(wq, first * bytes),
                          count, group_len, static_cast<float>(eps));
  });
}

void quantize(uintptr_t w, uintptr_t codes, uintptr_t scales, int dtype_code, int64_t num_groups,
              int64_t group_len, double eps, int threads) {
  const DType dtype = static_cast<DType>(dtype_code);
  const int64_t bytes = group_len * size_of(dtype);
  for_groups(num_groups, group_len, threads, [&](int64_t first, int64_t count) {
    kernels.quantize(dtype, at<const void>(w, first * bytes),
                     at<int8_t>(codes, first * group_len),
                     at<float>(scales, first * static_cast<int64_t>(sizeof(float))), count,
                     group_len, static_cast<float>(eps));
  });
}

void abs_sums(uintptr_t w, uintptr_t sums, int dtype_code, int64_t num_groups, int64_t group_len,
              int threads) {
  const DType dtype = static_cast<DType>(dtype_code);
  const int64_t bytes = group_len * size_of(dtype);
  for_groups(num_groups, group_len, threads, [&](int64_t first, int64_t count) {
    kernels.abs_sums(dtype, at<const void>(w, first * bytes),
                     at<float>(sums, first * static_cast<int64_t>(sizeof(float))), count,
                     group_len);
  });
}

void fake_quantize_with_scales(uintptr_t w, uintptr_t scales, uintptr_t wq, int dtype_code,
                               int64_t num_groups, int64_t group_len, int threads) {
  const DType dtype = static_cast<DType>(dtype_code);
  const int64_t bytes = group_len * size_of(dtype);
  for_groups(num_groups, group_len, threads, [&](int64_t first, int64_t count) {
    kernels.fake_quantize_with_scales(
        dtype, at<const void>(w, first * bytes),
        at<const float>(scales, first * static_cast<int64_t>(sizeof(float))),
        at<void>(wq, first * bytes), count, group_len);
  });
}

}  // namespace
}  // namespace bitcpm

PYBIND11_MODULE(_cpu, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Ternary quantisation on the CPU, over addresses; see csrc/cpu/kernels.h.";
  m.def("supported_isas", &bitcpm::supported_isas);
  m.def("select_isa", &bitcpm::select_isa);
  m.def("advise_huge_pages", &bitcpm::advise_huge_pages);
  m.def("fake_quantize", &bitcpm::fake_quantize, release());
  m.def("quantize", &bitcpm::quantize, release());
  m.def("abs_sums", &bitcpm::abs_sums, release());
  m.def("fake_quantize_with_scales", &bitcpm::fake_quantize_with_scales, release());
}
