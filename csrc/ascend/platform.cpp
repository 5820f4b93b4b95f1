// The only file that needs CANN's own headers: what the platform says about the vector cores.
#include "platform.h"

#include <stdexcept>

#include "tiling/platform/platform_ascendc.h"

namespace bitcpm::ascend {
namespace {

Device ask_platform() {
  auto* platform = platform_ascendc::PlatformAscendCManager::GetInstance();
  if (platform == nullptr) throw std::runtime_error("CANN does not know this device");
  using platform_ascendc::SocVersion;
  const SocVersion soc = platform->GetSocVersion();
  if (soc != SocVersion::ASCEND910B && soc != SocVersion::ASCEND910_93)
    throw std::runtime_error("the kernels are for Ascend 910B and 910C only");
  uint64_t ub_bytes = 0;
  platform->GetCoreMemSize(platform_ascendc::CoreMemType::UB, ub_bytes);
  const uint32_t vector_cores = platform->GetCoreNumAiv();
  if (vector_cores == 0 || ub_bytes == 0)
    throw std::runtime_error("CANN reports no vector cores or no unified buffer");
  return Device{vector_cores, static_cast<uint32_t>(ub_bytes)};
}

}  // namespace

const Device& get_device() {
  // A process drives devices of one kind. A failure is not kept: the next call asks again.
  static const Device device = ask_platform();
  return device;
}

}  // namespace bitcpm::ascend
