// Runs single instructions of the host implementation on data from files, for tests of their
// semantics against numpy. One command per line on stdin, one answer per line on stdout:
//     OP key=value ...   ->   ok   or   error rule: detail
// Every OP reads a= (and b=) and writes out=, raw little-endian files; out_bytes= is how much
// of the result is written. nan=drop, sat=1 choose the modes of the device.

#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>

#include "host_check.h"
#include "kernel_operator.h"

using namespace AscendC;

namespace {

using Words = std::map<std::string, std::string>;

long number(const Words& words, const std::string& key, long otherwise = -1) {
  const auto found = words.find(key);
  if (found != words.end()) return std::stol(found->second);
  if (otherwise < 0) throw std::runtime_error("needs " + key);
  return otherwise;
}

uint32_t size_of(const Words& words, const std::string& key, long otherwise = -1) {
  return static_cast<uint32_t>(number(words, key, otherwise));
}

std::vector<uint8_t> read_file(const Words& words, const std::string& key) {
  const auto found = words.find(key);
  if (found == words.end()) return {};
  std::ifstream file(found->second, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Buffers of a kernel: two inputs in the unified buffer, one output.
struct Bench {
  TPipe pipe;
  TBuf<TPosition::VECIN> a_buffer, b_buffer;
  TBuf<TPosition::VECOUT> out_buffer;
  const Words& words;

  Bench(const Words& command, std::vector<uint8_t>& a, std::vector<uint8_t>& b) : words(command) {
    load(a_buffer, a);
    load(b_buffer, b);
    pipe.InitBuffer(out_buffer, size_of(words, "out_bytes") + 256);
    if (number(words, "clear", 0) != 0) {
      Duplicate(out_buffer.Get<int16_t>(), int16_t{0},
                static_cast<int>(size_of(words, "out_bytes") / 2));
    }
    PipeBarrier<PIPE_ALL>();
  }

  template <typename T>
  LocalTensor<T> a() { return a_buffer.Get<T>(); }
  template <typename T>
  LocalTensor<T> b() { return b_buffer.Get<T>(); }
  template <typename T>
  LocalTensor<T> out() { return out_buffer.Get<T>(); }
  uint32_t count() const { return size_of(words, "count"); }
  uint32_t mask() const { return size_of(words, "mask"); }
  uint32_t repeats() const { return size_of(words, "repeats"); }

  void finish(std::vector<uint8_t>& result) {
    PipeBarrier<PIPE_ALL>();
    GlobalTensor<uint8_t> target;
    target.SetGlobalBuffer(result.data(), result.size());
    DataCopyPad(target, out<uint8_t>(), {1, static_cast<uint32_t>(result.size()), 0, 0, 0});
  }

 private:
  void load(TBuf<TPosition::VECIN>& buffer, std::vector<uint8_t>& bytes) {
    pipe.InitBuffer(buffer, bytes.empty() ? 32 : bytes.size());
    if (bytes.empty()) return;
    GlobalTensor<uint8_t> source;
    source.SetGlobalBuffer(bytes.data(), bytes.size());
    DataCopyPad(buffer.Get<uint8_t>(), source, {1, static_cast<uint32_t>(bytes.size()), 0, 0, 0},
                {false, 0, 0, 0});
  }
};

RoundMode round_mode(const std::string& name) {
  static const std::map<std::string, RoundMode> modes = {
      {"none", RoundMode::CAST_NONE}, {"rint", RoundMode::CAST_RINT},
      {"floor", RoundMode::CAST_FLOOR}, {"ceil", RoundMode::CAST_CEIL},
      {"round", RoundMode::CAST_ROUND}, {"trunc", RoundMode::CAST_TRUNC},
      {"odd", RoundMode::CAST_ODD}};
  return modes.at(name);
}

CMPMODE compare_mode(const std::string& name) {
  static const std::map<std::string, CMPMODE> modes = {
      {"lt", CMPMODE::LT}, {"gt", CMPMODE::GT}, {"eq", CMPMODE::EQ},
      {"le", CMPMODE::LE}, {"ge", CMPMODE::GE}, {"ne", CMPMODE::NE}};
  return modes.at(name);
}

template <typename T>
T scalar(const Words& words) {
  return static_cast<T>(std::stod(words.at("value")));
}
template <>
half scalar<half>(const Words& words) { return half(std::stof(words.at("value"))); }

template <typename D, typename S>
void cast(Bench& bench) {
  Cast(bench.out<D>(), bench.a<S>(), round_mode(bench.words.at("mode")), bench.count());
}

template <typename T>
void arithmetic(Bench& bench, const std::string& op) {
  const auto out = bench.out<T>();
  const auto a = bench.a<T>();
  const auto b = bench.b<T>();
  const uint32_t n = bench.count();
  if (op == "Add") return Add(out, a, b, n);
  if (op == "Sub") return Sub(out, a, b, n);
  if (op == "Mul") return Mul(out, a, b, n);
  if (op == "Max") return Max(out, a, b, n);
  if (op == "Min") return Min(out, a, b, n);
  const T value = scalar<T>(bench.words);
  if (op == "Adds") return Adds(out, a, value, n);
  if (op == "Muls") return Muls(out, a, value, n);
  if (op == "Maxs") return Maxs(out, a, value, n);
  if (op == "Mins") return Mins(out, a, value, n);
  throw std::runtime_error("no op " + op);
}

template <typename T>
void bits(Bench& bench, const std::string& op) {
  const auto out = bench.out<T>();
  const auto a = bench.a<T>();
  const uint32_t n = bench.count();
  if (op == "ShiftLeft") return ShiftLeft(out, a, scalar<T>(bench.words), n);
  if (op == "ShiftRight") return ShiftRight(out, a, scalar<T>(bench.words), n);
  if constexpr (sizeof(T) == 2) {
    if (op == "And") return And(out, a, bench.b<T>(), n);
    if (op == "Or") return Or(out, a, bench.b<T>(), n);
    if (op == "Not") return Not(out, a, n);
  }
  throw std::runtime_error("no op " + op);
}

template <typename T>
void reduce(Bench& bench, const std::string& op) {
  const auto out = bench.out<T>();
  const auto a = bench.a<T>();
  const int32_t mask = static_cast<int32_t>(bench.mask());
  if (op == "WholeReduceSum") return WholeReduceSum(out, a, mask, bench.repeats(), 1, 1, 8);
  if (op == "BlockReduceSum") return BlockReduceSum(out, a, bench.repeats(), mask, 1, 1, 8);
  if (op == "PairReduceSum") return PairReduceSum(out, a, bench.repeats(), mask, 1, 1, 8);
  throw std::runtime_error("no op " + op);
}

template <typename T>
void compare(Bench& bench) {
  const CMPMODE mode = compare_mode(bench.words.at("mode"));
  if (bench.words.count("value") != 0) {
    return CompareScalar(bench.out<uint8_t>(), bench.a<T>(), scalar<T>(bench.words), mode,
                         bench.count());
  }
  Compare(bench.out<uint8_t>(), bench.a<T>(), bench.b<T>(), mode, bench.count());
}

// Copies `blocks` blocks of `length` bytes, `gap` bytes apart, with padding, and back as they lie.
void pad(Bench& bench, std::vector<uint8_t>& a) {
  GlobalTensor<int16_t> source;
  source.SetGlobalBuffer(reinterpret_cast<int16_t*>(a.data()), a.size() / 2);
  const Words& w = bench.words;
  DataCopyPad(bench.out<int16_t>(), source,
              {static_cast<uint16_t>(number(w, "blocks")), size_of(w, "length"), size_of(w, "gap"),
               size_of(w, "ub_gap"), 0},
              {true, static_cast<uint8_t>(number(w, "left")),
               static_cast<uint8_t>(number(w, "right")), scalar<int16_t>(w)});
}

void accumulate(Bench& bench) {
  const auto out = bench.out<float>();
  Add(out, bench.a<float>(), out, bench.mask(), bench.repeats(), {1, 1, 1, 0, 8, 0});
}

// The broadcast of one block per group: out = a * b, group by group.
void broadcast(Bench& bench) {
  Mul(bench.out<float>(), bench.a<float>(), bench.b<float>(), bench.mask(), bench.repeats(),
      {1, 1, 0, 8, 8, 1});
}

// Each core writes the number of its turn to its place: the order in which cores run.
std::string visits(const Words& words) {
  std::vector<int32_t> turns(size_of(words, "cores"));
  host_check::Machine machine;
  machine.add_buffer(turns.data(), turns.size() * 4, host_check::Access::kOut, "turns");
  host_check::Config config;
  config.block_dim = size_of(words, "cores");
  config.seed = size_of(words, "seed");
  int32_t turn = 0;
  machine.run(config, [&] {
    if (GetBlockNum() != static_cast<int64_t>(turns.size())) throw std::runtime_error("GetBlockNum");
    TPipe pipe;
    TBuf<TPosition::VECOUT> buffer;
    pipe.InitBuffer(buffer, 32);
    Duplicate(buffer.Get<int32_t>(), turn++, 1);
    PipeBarrier<PIPE_ALL>();
    GlobalTensor<int32_t> target;
    target.SetGlobalBuffer(turns.data(), turns.size());
    DataCopyPad(target[static_cast<uint64_t>(GetBlockIdx())], buffer.Get<int32_t>(),
                {1, 4, 0, 0, 0});
  });
  std::string answer = "ok turns=";
  for (const int32_t number : turns) answer += std::to_string(number) + ",";
  return answer;
}

using Run = std::function<void(Bench&, std::vector<uint8_t>&)>;

template <typename T>
Run of_type(const std::string& op) {
  return [op](Bench& bench, std::vector<uint8_t>&) {
    if constexpr (std::is_integral_v<T>) {
      if (op == "And" || op == "Or" || op == "Not" || op.rfind("Shift", 0) == 0) {
        return bits<T>(bench, op);
      }
    }
    if constexpr (host_check::is_float_type<T>) {
      if (op.find("Reduce") != std::string::npos) return reduce<T>(bench, op);
      if (op == "Abs") return Abs(bench.out<T>(), bench.a<T>(), bench.count());
      if (op == "Select") {
        return Select(bench.out<T>(), bench.b<uint8_t>(), bench.a<T>(), scalar<T>(bench.words),
                      SELMODE::VSEL_TENSOR_SCALAR_MODE, bench.count());
      }
    }
    if constexpr (host_check::is_one_of<T, half, float, int32_t>) {
      if (op == "Compare") return compare<T>(bench);
    }
    if (op == "Brcb") return Brcb(bench.out<T>(), bench.a<T>(), bench.repeats(), {1, 8});
    if constexpr (host_check::is_arithmetic_type<T>) return arithmetic<T>(bench, op);
    throw std::runtime_error("no op " + op);
  };
}

template <typename D, typename S>
Run of_cast() {
  return [](Bench& bench, std::vector<uint8_t>&) { cast<D, S>(bench); };
}

const std::map<std::string, Run>& casts() {
  static const std::map<std::string, Run> all = {
      {"f32-f16", of_cast<half, float>()},      {"f32-bf16", of_cast<bfloat16_t, float>()},
      {"f32-f32", of_cast<float, float>()},     {"f32-i32", of_cast<int32_t, float>()},
      {"f32-i16", of_cast<int16_t, float>()},   {"f16-f32", of_cast<float, half>()},
      {"f16-i8", of_cast<int8_t, half>()},      {"f16-u8", of_cast<uint8_t, half>()},
      {"f16-i16", of_cast<int16_t, half>()},    {"f16-i32", of_cast<int32_t, half>()},
      {"bf16-f32", of_cast<float, bfloat16_t>()}, {"bf16-i32", of_cast<int32_t, bfloat16_t>()},
      {"i8-f16", of_cast<half, int8_t>()},      {"u8-f16", of_cast<half, uint8_t>()},
      {"i16-f16", of_cast<half, int16_t>()},    {"i16-f32", of_cast<float, int16_t>()},
      {"i32-f32", of_cast<float, int32_t>()},   {"i32-i16", of_cast<int16_t, int32_t>()}};
  return all;
}

Run find_run(const std::string& op, const Words& words) {
  if (op == "Cast") return casts().at(words.at("types"));
  if (op == "DataCopyPad") return [](Bench& bench, std::vector<uint8_t>& a) { pad(bench, a); };
  if (op == "accumulate") return [](Bench& bench, std::vector<uint8_t>&) { accumulate(bench); };
  if (op == "broadcast") return [](Bench& bench, std::vector<uint8_t>&) { broadcast(bench); };
  const std::string type = words.at("type");
  if (type == "f32") return of_type<float>(op);
  if (type == "f16") return of_type<half>(op);
  if (type == "i16") return of_type<int16_t>(op);
  if (type == "u16") return of_type<uint16_t>(op);
  if (type == "i32") return of_type<int32_t>(op);
  if (type == "u32") return of_type<uint32_t>(op);
  throw std::runtime_error("no type " + type);
}

std::string execute(const std::string& line) {
  std::istringstream stream(line);
  std::string op;
  stream >> op;
  Words words;
  for (std::string word; stream >> word;) {
    const size_t equals = word.find('=');
    words[word.substr(0, equals)] = word.substr(equals + 1);
  }
  if (op == "visits") return visits(words);
  std::vector<uint8_t> a = read_file(words, "a");
  std::vector<uint8_t> b = read_file(words, "b");
  std::vector<uint8_t> result(size_of(words, "out_bytes"));
  const Run run = find_run(op, words);
  host_check::Machine machine;
  if (!a.empty()) machine.add_buffer(a.data(), a.size(), host_check::Access::kIn, "a");
  if (!b.empty()) machine.add_buffer(b.data(), b.size(), host_check::Access::kIn, "b");
  machine.add_buffer(result.data(), result.size(), host_check::Access::kOut, "out");
  host_check::Config config;
  if (words.count("nan") != 0) config.nan_max = host_check::NanMax::kDrop;
  config.saturate = number(words, "sat", 0) != 0;
  const host_check::Meter meter = machine.run(config, [&] {
    Bench bench(words, a, b);
    run(bench, a);
    bench.finish(result);
  });
  std::ofstream(words.at("out"), std::ios::binary)
      .write(reinterpret_cast<const char*>(result.data()),
             static_cast<std::streamsize>(result.size()));
  std::ostringstream answer;
  answer << "ok repeats=" << meter.repeats << " cycles=" << meter.cycles
         << " instructions=" << meter.vector_instructions << " barriers=" << meter.barriers
         << " read=" << meter.bytes_read << " written=" << meter.bytes_written;
  return answer.str();
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    try {
      std::cout << execute(line) << std::endl;
    } catch (const std::exception& error) {
      std::cout << "error " << error.what() << std::endl;
    }
  }
  return 0;
}
