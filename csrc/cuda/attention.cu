// Attention over sequences of up to 256 tokens in float16 and bfloat16: checks, and the launches for up to 64
// tokens, of attention_kernel.cuh.
//
// Not run on a device yet. To measure first: one warp for two heads up to 16 tokens, a cap on
// the registers of the backward (__launch_bounds__(128, 5)), P and dS in the place of v and k (a third less
// memory).
#include <optional>
#include <tuple>

#include "cuda/attention_launch.cuh"
#include "cuda/ops.h"

namespace maefast::cuda {
namespace {

template <class T, int kDepth>
void launch(const Args& p, int64_t batch, bool backward, cudaStream_t stream) {
  const int rows_q = padded(p.max_q), rows_k = padded(p.max_k);
  const int rows = (backward ? 2 : 1) * rows_q + 2 * rows_k;
  const size_t bytes = 2 * (rows * (kDepth + 8) + (backward ? 2 * rows_q * (rows_k + 8) : 0));
  const char* const name = backward ? "attention_backward" : "attention";
  const auto kernel = backward ? attention_bwd_kernel<T, kDepth> : attention_fwd_kernel<T, kDepth>;
  allow_shared(kernel, bytes);  // up to 86 KiB, which every device from sm_80 on has
  const int warps = (backward && rows_k > rows_q ? rows_k : rows_q) / 16;
  const int64_t blocks = batch * p.heads;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), name, ": ", blocks,
                  " sequences and heads, more than a grid has blocks");
  kernel<<<static_cast<unsigned>(blocks), 32 * (warps > 0 ? warps : 1), bytes, stream>>>(p);
  check_launch(name);
}

// Rows start at multiples of 16 bytes unless the storage itself is a view into something odd.
Tensor aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 ? x : torch::stable::clone(x);
}

const uint16_t* words(const Tensor& x) {
  return static_cast<const uint16_t*>(x.const_data_ptr());
}
uint16_t* words(Tensor& x) {
  return static_cast<uint16_t*>(x.mutable_data_ptr());
}

const int32_t* starts(const std::optional<Tensor>& cu, int64_t batch) {
  if (!cu) return nullptr;
  STD_TORCH_CHECK(cu->numel() == batch + 1, "attention: cu must hold batch + 1 starts");
  return cu->const_data_ptr<int32_t>();
}

Args arguments(const Tensor& q, const std::optional<Tensor>& kv, const std::optional<Tensor>& cu_q,
               const std::optional<Tensor>& cu_k, int64_t batch, int64_t max_q, int64_t max_k, double scale,
               bool causal) {
  const bool cross = kv.has_value();
  Args p{};
  p.heads = static_cast<int>(q.size(q.dim() - 2));
  p.width = static_cast<int>(q.size(q.dim() - 1));
  p.max_q = static_cast<int>(max_q);
  p.max_k = static_cast<int>(max_k);
  p.scale = static_cast<float>(scale);
  p.causal = causal;
  p.cu_q = starts(cu_q, batch);
  p.cu_k = cross ? starts(cu_k, batch) : p.cu_q;
  STD_TORCH_CHECK(max_q <= kLongest && max_k <= kLongest, "attention: the CUDA kernel takes up to ", kLongest,
                  " tokens");
  STD_TORCH_CHECK(p.width % 8 == 0 && p.width >= 16 && p.width <= 128, "attention: head width ", p.width);
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Half || q.scalar_type() == ScalarType::BFloat16,
                  "attention: the CUDA kernel takes float16 and bfloat16");
  const int64_t part = static_cast<int64_t>(p.heads) * p.width;
  p.q_stride = cross ? part : 3 * part;
  p.kv_stride = cross ? 2 * part : 3 * part;
  p.q = words(q);
  p.k = cross ? words(*kv) : p.q + part;
  p.v = p.k + part;
  return p;
}

void run(const Args& p, int64_t batch, bool backward, const Tensor& like) {
  if (p.max_q > kShort || p.max_k > kShort) return run_tiled(p, batch, backward, like);
  const Launch on(like);
  with_depth(p.width, [&](auto depth) {
    constexpr int kDepth = decltype(depth)::value;
    if (like.scalar_type() == ScalarType::Half) {
      launch<Half, kDepth>(p, batch, backward, on.stream);
    } else {
      launch<Bfloat, kDepth>(p, batch, backward, on.stream);
    }
  });
}

constexpr const char* kExtras = "attention: the CUDA kernel has no biases, rotation or statistics";

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(
    const Tensor& q_, const std::optional<Tensor>& kv_, const std::optional<Tensor>& cu_q,
    const std::optional<Tensor>& cu_k, int64_t batch, int64_t max_q, int64_t max_k, double scale, bool causal,
    const std::optional<Tensor>& key_bias, const std::optional<Tensor>& marked, bool stats,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    bool interleaved) {
  STD_TORCH_CHECK(!key_bias && !marked && !stats && !bias && !cos && !sin && !interleaved, kExtras);
  const Tensor q = aligned(q_);
  const std::optional<Tensor> kv = kv_ ? std::optional<Tensor>(aligned(*kv_)) : std::nullopt;
  Args p = arguments(q, kv, cu_q, cu_k, batch, max_q, max_k, scale, causal);
  Tensor out = empty({q.size(0), p.heads, p.width}, q.scalar_type(), q);
  Tensor lse = empty({q.size(0), p.heads}, ScalarType::Float, q);
  p.out = words(out);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (q.size(0) > 0) run(p, batch, false, q);
  return {out, lse, empty({0}, ScalarType::Float, q), empty({0}, ScalarType::Float, q)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_, const std::optional<Tensor>& grad_lse, const std::optional<Tensor>& grad_entropy,
    const std::optional<Tensor>& grad_mass, const Tensor& q_, const std::optional<Tensor>& kv_,
    const Tensor& out_, const Tensor& lse, const Tensor& /*entropy*/, const Tensor& /*mass*/,
    const std::optional<Tensor>& cu_q, const std::optional<Tensor>& cu_k, int64_t batch, int64_t max_q,
    int64_t max_k, double scale, bool causal, const std::optional<Tensor>& key_bias,
    const std::optional<Tensor>& marked, bool need_key_bias, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool interleaved, bool need_bias) {
  STD_TORCH_CHECK(!grad_lse && !grad_entropy && !grad_mass && !key_bias && !marked && !need_key_bias,
                  kExtras);
  STD_TORCH_CHECK(!bias && !cos && !sin && !interleaved && !need_bias, kExtras);
  const Tensor q = aligned(q_), grad = aligned(grad_), out = aligned(out_);
  const std::optional<Tensor> kv = kv_ ? std::optional<Tensor>(aligned(*kv_)) : std::nullopt;
  Args p = arguments(q, kv, cu_q, cu_k, batch, max_q, max_k, scale, causal);
  const int64_t rows = q.size(0), columns = kv ? kv->size(0) : rows;
  Tensor grad_q = kv ? empty({rows, p.heads, p.width}, q.scalar_type(), q)
                     : empty({rows, 3, p.heads, p.width}, q.scalar_type(), q);
  Tensor grad_kv =
      kv ? empty({columns, 2, p.heads, p.width}, q.scalar_type(), q) : empty({0}, q.scalar_type(), q);
  p.grad = words(grad);
  p.o = words(out);
  p.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  p.dq = words(grad_q);
  p.dk = kv ? words(grad_kv) : p.dq + (p.v - p.k);
  p.dv = p.dk + (p.v - p.k);
  if (rows > 0 || columns > 0) run(p, batch, true, q);
  return {grad_q, grad_kv, empty({0}, ScalarType::Float, q), empty({0}, ScalarType::Float, q)};
}

}  // namespace maefast::cuda
