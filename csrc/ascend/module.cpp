// Python module megatron_bitcpm._npu: the launchers over torch tensors. Registering them as torch
// operators, and every decision what they are not asked to do, is megatron_bitcpm/ops/_npu.py.
// Import torch_npu first.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "launchers.h"
#include "platform.h"
#include "queue.h"

namespace py = pybind11;

namespace {

py::dict describe_device() {
  const bitcpm::ascend::Device& device = bitcpm::ascend::get_device();
  py::dict description;
  description["vector_cores"] = device.vector_cores;
  description["ub_bytes"] = device.ub_bytes;
  return description;
}

}  // namespace

PYBIND11_MODULE(_npu, m) {
  // A full task queue makes a launcher wait, and the queue's thread may need the interpreter to free
  // a tensor: without the interpreter's lock neither waits for the other.
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Ternary quantisation on Ascend NPUs; see csrc/ascend/launchers.h.";
  m.def("describe_device", &describe_device);
  m.def("has_plain_format", &bitcpm::ascend::has_plain_format, release());
  m.def("fake_quantize", &bitcpm::ascend::fake_quantize, release());
  m.def("quantize", &bitcpm::ascend::quantize, release());
  m.def("abs_sums", &bitcpm::ascend::abs_sums, release());
  m.def("fake_quantize_with_scales", &bitcpm::ascend::fake_quantize_with_scales, release());
  m.def("pack2", &bitcpm::ascend::pack2, release());
  m.def("fake_quantize_list", &bitcpm::ascend::fake_quantize_list, release());
  m.def("fake_quantize_with_scales_list", &bitcpm::ascend::fake_quantize_with_scales_list,
        release());
}
