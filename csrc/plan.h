// What C++ and CUDA know of a plan's encoding.
#pragma once

#include <cstdint>

namespace maefast {

// The slot of a token that is neither visible nor masked; `ABSENT` of maefast/ops/mask.py.
constexpr int32_t kAbsent = INT32_MIN;

}  // namespace maefast
