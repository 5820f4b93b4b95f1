// Wrong kernels. Each is written once; `wrong` picks the broken line or the corrected one, so that
// the two differ in nothing else. main.cpp runs them by name.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "host_check.h"
#include "kernel_operator.h"

namespace wrong_kernels {

constexpr uint32_t kCores = 3;
constexpr uint32_t kElements = 1024;  // floats of each global buffer

// What a kernel gets: global memory of one launch.
struct Memory {
  std::vector<float> in = std::vector<float>(kElements, 1.0f);
  std::vector<float> out = std::vector<float>(kElements, 0.0f);
  std::vector<float> both = std::vector<float>(kElements, 1.0f);
};

struct Case {
  const char* name;
  const char* rule;
  std::function<void(Memory&, bool)> kernel;
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Register {
  Register(const char* name, const char* rule, std::function<void(Memory&, bool)> kernel) {
    cases().push_back({name, rule, std::move(kernel)});
  }
};

// KERNEL(name, "rule") { body that uses `wrong` }
#define KERNEL(NAME, RULE)                                                               \
  static void NAME(wrong_kernels::Memory& memory, bool wrong);                           \
  static const wrong_kernels::Register NAME##_registered(#NAME, RULE, NAME);             \
  static void NAME([[maybe_unused]] wrong_kernels::Memory& memory, [[maybe_unused]] bool wrong)

// A kernel with a scratch buffer of fp32 that holds ones in its first `ready` elements.
struct Scratch {
  AscendC::TPipe pipe;
  AscendC::TBuf<AscendC::TPosition::VECCALC> buffer;
  AscendC::LocalTensor<float> x;
  explicit Scratch(int32_t ready, uint32_t bytes = 65536) {
    pipe.InitBuffer(buffer, bytes);
    x = buffer.Get<float>();
    AscendC::Duplicate(x, 1.0f, ready);
    AscendC::PipeBarrier<PIPE_V>();
  }
};

inline AscendC::GlobalTensor<float> global(std::vector<float>& memory) {
  AscendC::GlobalTensor<float> tensor;
  tensor.SetGlobalBuffer(memory.data(), memory.size());
  return tensor;
}

}  // namespace wrong_kernels
