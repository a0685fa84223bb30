// Index of the CUDA ops. Loaded by maefast/_native.py beside a CUDA torch, after Python has defined the
// schemas.
#include "cuda/ops.h"

// The name is a macro's (CMakeLists.txt), which must be replaced before STABLE_TORCH_LIBRARY_IMPL sees it.
#define REGISTER(...) STABLE_TORCH_LIBRARY_IMPL(__VA_ARGS__)

REGISTER(MAEFAST_NAMESPACE, CUDA, m) {
  using namespace maefast::cuda;
  // embed
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens));
  m.impl("gather_tokens_backward", TORCH_BOX(&gather_tokens_backward));
  // attention
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
