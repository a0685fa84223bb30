// Index of the CPU ops. Loaded by maefast/_native.py after Python has defined the schemas.
#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) {
  using namespace maefast::cpu;
  // embed
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens));
  m.impl("gather_tokens_backward", TORCH_BOX(&gather_tokens_backward));
}
