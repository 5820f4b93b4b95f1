// The instruction sets of this build that this processor has.
#pragma once

#include <vector>

#include "kernels.h"

namespace bitcpm {

struct Isa {
  const char* name;
  Kernels (*get_kernels)();
};

// Best first; "generic" is always the last.
std::vector<Isa> list_isas();

}  // namespace bitcpm
