// Runs the CPU kernels outside Python, under sanitizers or an emulator: one command per line on
// stdin, one answer per line on stdout, arrays in raw little-endian files.
//
//     OP key=value ...   ->   ok [key=value ...]   or   error TEXT
//
// OP is fake_quantize, quantize, abs_sums, fake_quantize_with_scales, pack2, unpack2,
// int8_per_token or list_isas. Keys: dtype=f32|bf16|f16 grid=NAME rows= cols= group_len= threads=
// inplace=0|1 isa=NAME, eps= (eight hexadecimal digits of its float32), files w= wq= codes= scales=
// sums= packed= x= xq=. jobs=N hands the rows of w over as N tensors, as the operators over lists
// do. Every array is an allocation of exactly its size, so that a sanitizer sees each overrun.

#include <cstdlib>
#include <iostream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../common/check_command.h"
#include "../isa.h"
#include "../threads.h"

namespace {

using bitcpm::DType;
using bitcpm::Grid;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(bytes), data_(std::malloc(static_cast<size_t>(bytes))) {
    if (bytes > 0 && !data_) throw std::runtime_error("out of memory");
  }
  int64_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_.get());
  }

 private:
  int64_t bytes_;
  std::unique_ptr<void, Free> data_;
};

class Command : public bitcpm::checks::Command {
 public:
  using bitcpm::checks::Command::Command;

  int threads() const { return static_cast<int>(number("threads", 1)); }
  Grid grid() const {
    return static_cast<Grid>(
        choose("grid", {"ternary", "asym4", "half_sym4", "int_sym4", "five"}));
  }

  bitcpm::Kernels kernels() const {
    const std::string isa = get("isa", "auto");
    for (const bitcpm::Isa& candidate : bitcpm::list_isas())
      if (isa == candidate.name || isa == "auto") return candidate.get_kernels();
    throw std::runtime_error("isa=" + isa + ": not in this processor and build");
  }

  Buffer read(const std::string& key, int64_t bytes) const {
    Buffer buffer(bytes);
    bitcpm::checks::Command::read(key, buffer.as<char>(), bytes);
    return buffer;
  }
  void write(const std::string& key, const Buffer& buffer) const {
    bitcpm::checks::write_file(need(key), buffer.as<char>(), buffer.bytes());
  }
};

// The groups of w, [rows, cols] cut into groups of group_len.
struct Groups {
  explicit Groups(const Command& command)
      : rows(command.number("rows")),
        cols(command.number("cols")),
        length(command.number("group_len", cols)),
        per_row(length > 0 ? cols / length : 0) {
    if (per_row * length != cols) throw std::runtime_error("group_len does not divide cols");
  }
  int64_t count() const { return rows * per_row; }
  int64_t scale_bytes() const { return count() * 4; }
  int64_t rows, cols, length, per_row;
};

// w as a list of tensors, each in memory of its own: pieces of a file, and of an output.
struct TensorList {
  std::vector<Buffer> w, scales, wq;
  std::vector<bitcpm::Job> jobs;

  TensorList(const Command& command, const Groups& groups, bool with_scales) {
    const DType dtype = command.dtype();
    const int64_t pieces = command.number("jobs", 1);
    const bool inplace = command.flag("inplace");
    const int64_t row_bytes = groups.cols * size_of(dtype);
    const Buffer whole = command.read("w", groups.rows * row_bytes);
    const Buffer all_scales =
        with_scales ? command.read("scales", groups.scale_bytes()) : Buffer(0);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      // Unequal pieces, some of them empty.
      const int64_t first = groups.rows * piece * piece / (pieces * pieces);
      const int64_t last = groups.rows * (piece + 1) * (piece + 1) / (pieces * pieces);
      const int64_t scales_per_row = groups.per_row * 4;
      w.push_back(copy(whole, first * row_bytes, last * row_bytes));
      if (!inplace) wq.emplace_back((last - first) * row_bytes);
      if (with_scales)
        scales.push_back(copy(all_scales, first * scales_per_row, last * scales_per_row));
      jobs.push_back({w.back().as<void>(), with_scales ? scales.back().as<float>() : nullptr,
                      inplace ? w.back().as<void>() : wq.back().as<void>(), dtype,
                      (last - first) * groups.per_row, groups.length});
    }
  }

  void write(const Command& command) const {
    const std::vector<Buffer>& pieces = wq.empty() ? w : wq;
    int64_t bytes = 0, offset = 0;
    for (const Buffer& piece : pieces) bytes += piece.bytes();
    const Buffer whole(bytes);
    for (const Buffer& piece : pieces) {
      if (piece.bytes())
        __builtin_memcpy(whole.as<char>() + offset, piece.as<char>(),
                         static_cast<size_t>(piece.bytes()));
      offset += piece.bytes();
    }
    command.write("wq", whole);
  }

 private:
  static Buffer copy(const Buffer& from, int64_t first, int64_t last) {
    Buffer piece(last - first);
    if (last > first)
      __builtin_memcpy(piece.as<char>(), from.as<char>() + first,
                       static_cast<size_t>(last - first));
    return piece;
  }
};

std::string run_fake_quantize(const Command& command) {
  TensorList list(command, Groups(command), false);
  bitcpm::fake_quantize(command.kernels(), list.jobs, command.grid(), command.eps(),
                        command.threads());
  list.write(command);
  return "";
}

std::string run_fake_quantize_with_scales(const Command& command) {
  TensorList list(command, Groups(command), true);
  bitcpm::fake_quantize_with_scales(command.kernels(), list.jobs, command.grid(),
                                    command.threads());
  list.write(command);
  return "";
}

std::string run_quantize(const Command& command) {
  const Groups groups(command);
  const DType dtype = command.dtype();
  const Buffer w = command.read("w", groups.rows * groups.cols * size_of(dtype));
  const Buffer codes(groups.rows * groups.cols), scales(groups.scale_bytes());
  bitcpm::quantize(command.kernels(), dtype, command.grid(), w.as<void>(), codes.as<int8_t>(),
                   scales.as<float>(), groups.count(), groups.length, command.eps(),
                   command.threads());
  command.write("codes", codes);
  command.write("scales", scales);
  return "";
}

std::string run_abs_sums(const Command& command) {
  const Groups groups(command);
  const DType dtype = command.dtype();
  const Buffer w = command.read("w", groups.rows * groups.cols * size_of(dtype));
  const Buffer sums(groups.scale_bytes());
  bitcpm::abs_sums(command.kernels(), dtype, w.as<void>(), sums.as<float>(), groups.count(),
                   groups.length, command.threads());
  command.write("sums", sums);
  return "";
}

std::string run_pack2(const Command& command) {
  const int64_t rows = command.number("rows"), cols = command.number("cols");
  const Buffer codes = command.read("codes", rows * cols);
  const Buffer packed(rows * bitcpm::count_pack_blocks(cols) * bitcpm::kPackBytes);
  const int64_t bad = bitcpm::pack2(command.kernels(), codes.as<int8_t>(), packed.as<uint8_t>(),
                                    rows, cols, command.threads());
  command.write("packed", packed);
  return " bad_row=" + std::to_string(bad);
}

std::string run_unpack2(const Command& command) {
  const int64_t rows = command.number("rows"), cols = command.number("cols");
  const Buffer packed = command.read(
      "packed", rows * bitcpm::count_pack_blocks(cols) * bitcpm::kPackBytes);
  const Buffer codes(rows * cols);
  const int64_t bad = bitcpm::unpack2(command.kernels(), packed.as<uint8_t>(), codes.as<int8_t>(),
                                      rows, cols, command.threads());
  command.write("codes", codes);
  return " bad_row=" + std::to_string(bad);
}

std::string run_int8_per_token(const Command& command) {
  const int64_t rows = command.number("rows"), cols = command.number("cols");
  const DType dtype = command.dtype();
  const Buffer x = command.read("x", rows * cols * size_of(dtype));
  const bool inplace = command.flag("inplace");
  const Buffer fresh(inplace ? 0 : rows * cols * size_of(dtype));
  const Buffer& xq = inplace ? x : fresh;
  bitcpm::int8_per_token(command.kernels(), dtype, x.as<void>(), xq.as<void>(), rows, cols,
                         command.threads());
  command.write("xq", xq);
  return "";
}

std::string list_isa_names(const Command&) {
  std::string names;
  for (const bitcpm::Isa& isa : bitcpm::list_isas())
    names += (names.empty() ? " isas=" : ",") + std::string(isa.name);
  return names;
}

std::string run(const std::string& line) {
  static const std::map<std::string, std::string (*)(const Command&)> kOps = {
      {"fake_quantize", run_fake_quantize},
      {"fake_quantize_with_scales", run_fake_quantize_with_scales},
      {"quantize", run_quantize},
      {"abs_sums", run_abs_sums},
      {"pack2", run_pack2},
      {"unpack2", run_unpack2},
      {"int8_per_token", run_int8_per_token},
      {"list_isas", list_isa_names},
  };
  const Command command(line);
  const auto found = kOps.find(command.op);
  if (found == kOps.end()) throw std::runtime_error("unknown operation " + command.op);
  return found->second(command);
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string line; std::getline(std::cin, line);) {
    try {
      const std::string answer = run(line);
      std::cout << "ok" << answer << std::endl;
    } catch (const std::exception& error) {
      std::cout << "error " << error.what() << std::endl;
    }
  }
  return 0;
}
