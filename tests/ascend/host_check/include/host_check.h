// What a program that runs kernels uses: Machine, Config, Meter, Error. Kernels never include this.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "hc_core.h"
#include "hc_error.h"

namespace host_check {

// Runs kernels on a model of one device. Not thread-safe: one machine at a time per process.
class Machine {
 public:
  // Makes [address, address + bytes) known as global memory. Accesses outside every registered
  // range fail. kOut starts unwritten: reading it before writing fails.
  void add_buffer(void* address, size_t bytes, Access access, const std::string& name) {
    memory_.add(address, bytes, access, name);
  }

  // Runs `kernel` once per core in a shuffled order. Throws Error for a broken rule; a kOut buffer
  // that is not wanted must not be registered, since all bytes of the others must be written.
  // Ownership of global bytes is judged over this call, registered buffers stay registered.
  Meter run(const Config& config, const std::function<void()>& kernel) {
    if (config.block_dim < 1 || config.block_dim > 200) {
      fail("block-dim", "%u cores, must be 1..200", config.block_dim);
    }
    memory_.start_launch();
    const auto owner = std::make_unique<Core>(config, memory_);
    Core& core = *owner;
    CoreScope scope(core);
    std::vector<uint32_t> order(config.block_dim);
    for (uint32_t i = 0; i < config.block_dim; ++i) order[i] = i;
    std::mt19937 random(config.seed);
    std::shuffle(order.begin(), order.end(), random);
    for (const uint32_t block : order) {
      core.start_block(block);
      kernel();
      core.end_block();
    }
    if (config.whole_outputs) memory_.end_launch();
    return core.meter;
  }

 private:
  GlobalMemory memory_;
};

}  // namespace host_check
