// Index of the CUDA ops. Loaded by maefast/_native.py beside a CUDA torch, after Python has defined the
// schemas.
#include "cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(maefast, CUDA, m) {
  using namespace maefast::cuda;
  // embed
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens));
  m.impl("gather_tokens_backward", TORCH_BOX(&gather_tokens_backward));
  // attention
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
