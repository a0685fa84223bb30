// Large results that are mostly zeros. `empty` of host.h is defined beside this one.
#pragma once

#include "common.h"

namespace maefast::cpu {

// cpu::empty for a result [..., row] of which `written` rows will be written and all others are zero.
// `zeroed` says whether everything is zero already: what the system has just mapped is, and costs nothing
// until it is touched.
Tensor empty_or_zeros(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like,
                      int64_t written, bool* zeroed);

}  // namespace maefast::cpu
