// Runs the Ascend kernels on the host check: one command per line on stdin, one answer per line on
// stdout, arrays in raw little-endian files.
//
//     OP key=value ...   ->   ok [key=value ...]   or   error TEXT
//
// OP is fake_quantize, quantize, abs_sums, fake_quantize_with_scales or pack2. Keys:
//   dtype=f32|bf16|f16 grid=ternary rows= cols= group_len= inplace=0|1
//   eps= (eight hexadecimal digits of its float32)
//   w= wq= codes= scales= sums= packed= files; fake_quantize writes those that are given
//   blocks= vector cores of the device, seed= order of the cores, ub= bytes of the unified buffer
//   nan=propagate|drop what maximum and minimum do with NaN
//   sat=0|1 whether casts to 16-bit types saturate
// Answers: blocks used, bytes_read, bytes_written, passes (full-rate vector passes per element),
// instructions, barriers, copies, ub_bytes.
//
// `ascend-runner model` prints the modelled times instead; see runner_model.h.

#include <cstdio>
#include <iostream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/common/check_command.h"
#include "runner_kernels.h"
#include "runner_model.h"

namespace {

using namespace bitcpm::ascend;
using bitcpm::DType;
using bitcpm::checks::Command;
using host_check::Access;

// Exactly the bytes of one array, so that the machine sees each overrun.
class Array {
 public:
  explicit Array(int64_t bytes) : data(static_cast<size_t>(bytes), 0xa5) {}
  int64_t bytes() const { return static_cast<int64_t>(data.size()); }
  uint8_t* address() { return data.data(); }

  std::vector<uint8_t> data;
};

// The arrays of one command, known to the machine.
class Arrays {
 public:
  explicit Arrays(const Command& command) : command_(command) {}

  uint8_t* in(const std::string& key, int64_t bytes, Access access = Access::kIn) {
    Array& array = add(bytes);
    command_.read(key, array.address(), bytes);
    machine.add_buffer(array.address(), array.data.size(), access, key);
    return array.address();
  }
  uint8_t* out(const std::string& key, int64_t bytes) {
    Array& array = add(bytes);
    outputs_[command_.need(key)] = &array;
    machine.add_buffer(array.address(), array.data.size(), Access::kOut, key);
    return array.address();
  }
  // Read from one file and, when the kernel is done, written to another.
  uint8_t* in_out(const std::string& from, const std::string& to, int64_t bytes) {
    uint8_t* address = in(from, bytes, Access::kInOut);
    outputs_[command_.need(to)] = arrays_.back().get();
    return address;
  }
  void write_outputs() const {
    for (const auto& [path, array] : outputs_)
      bitcpm::checks::write_file(path, array->data.data(), array->bytes());
  }

  host_check::Machine machine;

 private:
  Array& add(int64_t bytes) {
    arrays_.push_back(std::make_unique<Array>(bytes));
    return *arrays_.back();
  }
  const Command& command_;
  std::vector<std::unique_ptr<Array>> arrays_;
  std::map<std::string, const Array*> outputs_;
};

struct Matrix {
  DType dtype;
  int64_t rows, cols, group_len;
  int64_t bytes() const { return rows * cols * bitcpm::size_of(dtype); }
  int64_t groups() const { return group_len == 0 ? 0 : rows * (cols / group_len); }
};

Matrix parse_matrix(const Command& command) {
  return {command.dtype(), command.number("rows"), command.number("cols"),
          command.number("group_len")};
}

void check_ternary(const Command& command) {
  const std::string grid = command.get("grid", "ternary");
  if (grid != "ternary") throw std::runtime_error("grid=" + grid + " has no Ascend kernel");
}

Run parse_run(const Command& command) {
  Run run;
  run.device.vector_cores = static_cast<uint32_t>(command.number("blocks", 48));
  run.device.ub_bytes = static_cast<uint32_t>(command.number("ub", kMaxUbBytes));
  run.seed = static_cast<uint32_t>(command.number("seed", 0));
  run.nan_max = static_cast<host_check::NanMax>(command.choose("nan", {"propagate", "drop"}));
  run.saturate = command.number("sat", 1) != 0;
  return run;
}

std::string report(const Result& result, int64_t elements) {
  const host_check::Meter& meter = result.meter;
  char text[400];
  std::snprintf(text, sizeof text,
                "ok blocks=%u bytes_read=%llu bytes_written=%llu passes=%.6f instructions=%llu "
                "barriers=%llu copies=%llu ub_bytes=%u",
                result.blocks, static_cast<unsigned long long>(meter.bytes_read),
                static_cast<unsigned long long>(meter.bytes_written),
                meter.passes(static_cast<uint64_t>(elements)),
                static_cast<unsigned long long>(meter.vector_instructions),
                static_cast<unsigned long long>(meter.barriers),
                static_cast<unsigned long long>(meter.copies), meter.ub_bytes);
  return text;
}

std::string run_group_op(const Command& command, Arrays& arrays, const Run& run) {
  const Matrix matrix = parse_matrix(command);
  const bool in_place = command.flag("inplace");
  const auto take_wq = [&](uint8_t** w, uint8_t** wq) {
    if (in_place) {
      *w = *wq = arrays.in_out("w", "wq", matrix.bytes());
    } else {
      *w = arrays.in("w", matrix.bytes());
      if (command.has("wq")) *wq = arrays.out("wq", matrix.bytes());
    }
  };
  uint8_t *w = nullptr, *wq = nullptr;
  Result result;
  if (command.op == "abs_sums") {
    w = arrays.in("w", matrix.bytes());
    uint8_t* sums = arrays.out("sums", matrix.groups() * 4);
    result = run_abs_sums_kernel(arrays.machine, run, matrix.dtype, matrix.rows, matrix.cols,
                                 matrix.group_len, w, sums);
  } else if (command.op == "fake_quantize_with_scales") {
    check_ternary(command);
    command.need("wq");
    take_wq(&w, &wq);
    uint8_t* scales = arrays.in("scales", matrix.groups() * 4);
    result = run_with_scales_kernel(arrays.machine, run, matrix.dtype, matrix.rows, matrix.cols,
                                    matrix.group_len, w, scales, wq);
  } else {
    check_ternary(command);
    take_wq(&w, &wq);
    uint8_t *codes = nullptr, *scales = nullptr;
    if (command.has("codes")) codes = arrays.out("codes", matrix.rows * matrix.cols);
    if (command.has("scales")) scales = arrays.out("scales", matrix.groups() * 4);
    result = run_fake_quantize_kernel(arrays.machine, run, matrix.dtype, matrix.rows, matrix.cols,
                                      matrix.group_len, command.eps(), w, wq, codes, scales);
  }
  return report(result, matrix.rows * matrix.cols);
}

std::string run_pack2(const Command& command, Arrays& arrays, const Run& run) {
  const int64_t rows = command.number("rows"), cols = command.number("cols");
  uint8_t* codes = arrays.in("codes", rows * cols);
  uint8_t* packed =
      arrays.out("packed", rows * bitcpm::count_pack_blocks(cols) * bitcpm::kPackBytes);
  return report(run_pack2_kernel(arrays.machine, run, rows, cols, codes, packed), rows * cols);
}

std::string run_command(const std::string& line) {
  const Command command(line);
  Arrays arrays(command);
  const Run run = parse_run(command);
  std::string answer;
  if (command.op == "fake_quantize" || command.op == "quantize" || command.op == "abs_sums" ||
      command.op == "fake_quantize_with_scales") {
    answer = run_group_op(command, arrays, run);
  } else if (command.op == "pack2") {
    answer = run_pack2(command, arrays, run);
  } else {
    throw std::runtime_error(command.op + " has no Ascend kernel");
  }
  arrays.write_outputs();
  return answer;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "model") return print_model();
  if (argc != 1) {
    std::fprintf(stderr, "usage: %s [model]\n", argv[0]);
    return 2;
  }
  for (std::string line; std::getline(std::cin, line);) {
    std::string answer;
    try {
      answer = run_command(line);
    } catch (const std::exception& error) {
      answer = std::string("error ") + error.what();
      for (char& c : answer)
        if (c == '\n') c = ' ';
    }
    std::cout << answer << std::endl;
  }
  return 0;
}
