// ascend-wrong list: one line "name rule" per kernel. ascend-wrong NAME wrong|right: runs it on
// three cores and prints "ok" or "error rule: detail". ascend-wrong all: "name wrong|right answer".
#include <cstdio>
#include <cstring>

#include "cases.h"

namespace {

std::string run(const wrong_kernels::Case& what, bool wrong) {
  wrong_kernels::Memory memory;
  const size_t bytes = wrong_kernels::kElements * sizeof(float);
  host_check::Machine machine;
  machine.add_buffer(memory.in.data(), bytes, host_check::Access::kIn, "in");
  machine.add_buffer(memory.out.data(), bytes, host_check::Access::kOut, "out");
  machine.add_buffer(memory.both.data(), bytes, host_check::Access::kInOut, "both");
  host_check::Config config;
  config.block_dim = wrong_kernels::kCores;
  config.seed = 7;
  // Most kernels write no output.
  config.whole_outputs = std::strcmp(what.rule, "gm-unwritten") == 0;
  try {
    machine.run(config, [&] { what.kernel(memory, wrong); });
    return "ok";
  } catch (const host_check::Error& error) {
    return std::string("error ") + error.what();
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string verb = argc > 1 ? argv[1] : "";
  bool known = verb == "list" || verb == "all";
  for (const wrong_kernels::Case& what : wrong_kernels::cases()) {
    if (verb == "list") std::printf("%s %s\n", what.name, what.rule);
    if (verb == "all") {
      std::printf("%s wrong %s\n", what.name, run(what, true).c_str());
      std::printf("%s right %s\n", what.name, run(what, false).c_str());
    }
    if (verb == what.name && argc == 3) {
      known = true;
      std::printf("%s\n", run(what, std::strcmp(argv[2], "wrong") == 0).c_str());
    }
  }
  if (known) return 0;
  std::fprintf(stderr, "usage: ascend-wrong list | all | NAME wrong|right\n");
  return 2;
}
