// The CUDA ops: one declaration for each schema of the families in maefast/ops that csrc/cuda implements.
#pragma once

#include <optional>
#include <tuple>

#include "common.h"

namespace maefast::cuda {

// embed.cu
Tensor gather_tokens(const Tensor& x, const Tensor& index, const Tensor& cu, int64_t max_count,
                     int64_t prefix, bool keep_prefix);
Tensor gather_tokens_backward(const Tensor& grad, const Tensor& slot, const Tensor& cu, int64_t prefix,
                              bool keep_prefix, bool masked);

// attention.cu
std::tuple<Tensor, Tensor, Tensor, Tensor> attention(
    const Tensor& q, const std::optional<Tensor>& kv, const std::optional<Tensor>& cu_q,
    const std::optional<Tensor>& cu_k, int64_t batch, int64_t max_q, int64_t max_k, double scale, bool causal,
    const std::optional<Tensor>& key_bias, const std::optional<Tensor>& marked, bool stats,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    bool interleaved);
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_lse, const std::optional<Tensor>& grad_entropy,
    const std::optional<Tensor>& grad_mass, const Tensor& q, const std::optional<Tensor>& kv,
    const Tensor& out, const Tensor& lse, const Tensor& entropy, const Tensor& mass,
    const std::optional<Tensor>& cu_q, const std::optional<Tensor>& cu_k, int64_t batch, int64_t max_q,
    int64_t max_k, double scale, bool causal, const std::optional<Tensor>& key_bias,
    const std::optional<Tensor>& marked, bool need_key_bias, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool interleaved, bool need_bias);

}  // namespace maefast::cuda
