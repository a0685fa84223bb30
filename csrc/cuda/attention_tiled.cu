// Attention over 65 to 256 tokens in float16 and bfloat16: launches of attention_tiled_fwd.cuh and _bwd.cuh.
//
// Not run on a device yet. To measure first: 4 and 6 forward warps against 8 (more blocks, keys read more
// often); at width 64 one block of keys for each warp against two (Bwd, kBlocks: 128 registers and 15 warps
// against 242 and 8); 3 stages against 4.
#include "cuda/attention_launch.cuh"
#include "cuda/attention_tiled_bwd.cuh"
#include "cuda/attention_tiled_fwd.cuh"

namespace maefast::cuda {
namespace {

size_t shared_limit() {
  int device = 0, limit = 0;
  check(cudaGetDevice(&device), "attention");
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "attention");
  return static_cast<size_t>(limit);
}

template <class T, int kDepth>
void forward(const Args& p, int64_t batch, size_t limit, cudaStream_t stream) {
  const FwdShape shape = fwd_shape(kDepth, p.max_q, limit);
  const auto kernel = attention_tiled_fwd_kernel<T, kDepth>;
  allow_shared(kernel, shape.bytes);
  const auto blocks = static_cast<unsigned>(batch * p.heads * shape.parts);
  kernel<<<blocks, 32 * shape.warps, shape.bytes, stream>>>(p, shape.parts);
  check_launch("attention");
}

template <class T, int kDepth, int kBlocks>
void backward(Args p, int64_t batch, size_t limit, const Tensor& like, cudaStream_t stream) {
  const BwdShape shape = bwd_shape<kDepth, kBlocks>(p.max_q, p.max_k, limit);
  const int64_t blocks = batch * p.heads;
  Tensor sums = empty({blocks * shape.sums}, ScalarType::Float, like);
  p.sums = static_cast<float*>(sums.mutable_data_ptr());
  const auto kernel = attention_tiled_bwd_kernel<T, kDepth, kBlocks>;
  allow_shared(kernel, shape.bytes);
  kernel<<<static_cast<unsigned>(blocks), shape.threads, shape.bytes, stream>>>(p);
  check_launch("attention_backward");
}

template <class T>
void run_type(const Args& p, int64_t batch, bool is_backward, const Tensor& like) {
  const Launch on(like);
  const size_t limit = shared_limit();
  with_depth(p.width, [&](auto depth) {
    constexpr int kDepth = decltype(depth)::value;
    if (!is_backward) return forward<T, kDepth>(p, batch, limit, on.stream);
    if constexpr (kDepth == 64) {
      if (bwd_blocks<kDepth>(p.max_k) == 1) return backward<T, kDepth, 1>(p, batch, limit, like, on.stream);
    }
    return backward<T, kDepth, kDepth <= 64 ? 2 : 1>(p, batch, limit, like, on.stream);
  });
}

}  // namespace

void run_tiled(Args p, int64_t batch, bool backward, const Tensor& like) {
  // Within a sequence places are 32-bit numbers.
  STD_TORCH_CHECK(p.q_stride < (1 << 22), "attention: rows of ", p.q_stride, " elements are too long");
  if (like.scalar_type() == ScalarType::Half) {
    run_type<Half>(p, batch, backward, like);
  } else {
    run_type<Bfloat>(p, batch, backward, like);
  }
}

}  // namespace maefast::cuda
