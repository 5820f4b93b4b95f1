// Stands in for torch_npu and CANN: a task queue that runs when it is told to, tensors on the CPU,
// and a device whose size the test chooses.
#include "queue.h"

#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "platform.h"

namespace {

struct Task {
  std::string name;
  std::function<void(void*)> launch;
};
std::vector<Task> tasks;
bitcpm::ascend::Device device{48, 196608};
std::string answer;

}  // namespace

namespace bitcpm::ascend {

bool is_on_device(const at::Tensor& tensor) { return tensor.is_cpu(); }
bool has_plain_format(const at::Tensor&) { return true; }
const Device& get_device() { return device; }

void enqueue(const char* name, const at::Tensor&, std::function<void(void*)> launch) {
  tasks.push_back({name, std::move(launch)});
}

}  // namespace bitcpm::ascend

extern "C" __attribute__((visibility("default"))) void set_device(uint32_t cores, uint32_t bytes) {
  device = {cores, bytes};
}

// Runs all tasks; returns their names, each with a space after it, or "error: ...".
extern "C" __attribute__((visibility("default"))) const char* run_tasks() {
  answer.clear();
  try {
    for (const Task& task : tasks) {
      task.launch(nullptr);
      answer += task.name + " ";
    }
  } catch (const std::exception& error) {
    answer = std::string("error: ") + error.what();
  }
  tasks.clear();
  return answer.c_str();
}
