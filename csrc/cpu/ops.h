// The CPU ops: one declaration for each schema of the families in maefast/ops that csrc/cpu implements.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace maefast::cpu {

// mask.cpp
std::tuple<Tensor, Tensor, Tensor> token_mask(const Tensor& scores, const Tensor& cu_visible,
                                              int64_t total_visible, bool by_position);

// embed.cpp
Tensor gather_tokens(const Tensor& x, const Tensor& index, const Tensor& cu, int64_t max_count,
                     int64_t prefix, bool keep_prefix);
Tensor gather_tokens_backward(const Tensor& grad, const Tensor& slot, const Tensor& cu, int64_t prefix,
                              bool keep_prefix, bool masked);
Tensor patch_rows(const Tensor& images, const Tensor& index, const std::vector<int64_t>& patch,
                  ScalarType dtype);
Tensor patch_rows_backward(const Tensor& grad, const Tensor& slot, const std::vector<int64_t>& image_shape,
                           const std::vector<int64_t>& patch, ScalarType dtype);
Tensor place_tokens(const Tensor& y, const Tensor& visible, const Tensor& cu_visible, int64_t num_tokens,
                    const std::optional<Tensor>& pos, const std::optional<Tensor>& prefix_tokens);
std::tuple<Tensor, Tensor, Tensor> place_tokens_backward(const Tensor& grad, const Tensor& slot,
                                                         const Tensor& cu_visible, int64_t prefix,
                                                         bool need_pos, bool need_prefix, ScalarType y_dtype);

// restore.cpp
Tensor restore_tokens(const Tensor& x, const Tensor& visible, const Tensor& masked, const Tensor& cu_visible,
                      const Tensor& mask_token, const std::optional<Tensor>& pos, int64_t prefix,
                      bool visible_first, bool pos_on_masked, const std::optional<Tensor>& cu_masked,
                      int64_t num_tokens);
std::tuple<Tensor, Tensor, Tensor> restore_tokens_backward(
    const Tensor& grad, const Tensor& visible, const Tensor& masked, const Tensor& slot,
    const Tensor& cu_visible, int64_t pos_rows, int64_t prefix, bool visible_first, bool pos_on_masked,
    bool need_mask_token, ScalarType x_dtype, const std::optional<Tensor>& cu_masked);

// norm.cpp
std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm(const Tensor& x, const std::optional<Tensor>& delta,
                                                    const Tensor& weight, const Tensor& bias, double eps,
                                                    ScalarType dtype, const std::optional<Tensor>& shift);
std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward(
    const Tensor& grad_y, const std::optional<Tensor>& grad_residual, const Tensor& residual,
    const Tensor& mean, const Tensor& rstd, const Tensor& weight, bool need_weight,
    const std::optional<Tensor>& bias, std::optional<ScalarType> delta_dtype, bool need_shift);

// linear.cpp
std::tuple<Tensor, Tensor> transpose_sum(const Tensor& x, bool need_sum);

// gelu.cpp
Tensor bias_gelu(const Tensor& x, const std::optional<Tensor>& bias, bool tanh);
std::tuple<Tensor, Tensor, Tensor> bias_gelu_backward(const Tensor& grad, const Tensor& x,
                                                      const std::optional<Tensor>& bias, bool tanh,
                                                      bool need_key_bias, bool need_out);

// resize.cpp
void resize(const Tensor& image, double left, double top, double right, double bottom, bool flip,
            const Tensor& out);

// adamw.cpp
void adamw(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
           const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
           const std::vector<Tensor>& max_exp_avg_sqs, const std::vector<Tensor>& shadows,
           const std::vector<Tensor>& steps, const std::optional<Tensor>& lr_tensor, double lr, double beta1,
           double beta2, double eps, double weight_decay, bool maximize,
           const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf);

// attention.cpp
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

// loss.cpp
std::tuple<Tensor, Tensor> patch_loss(const Tensor& pred, const Tensor& images, const Tensor& index,
                                      const std::vector<int64_t>& patch, bool packed, bool channels_first,
                                      int64_t norm, int64_t kind, double beta);
std::tuple<Tensor, Tensor> patch_loss_backward(const Tensor& grad, const Tensor& pred, const Tensor& images,
                                               const Tensor& index, const Tensor& slot, const Tensor& stats,
                                               const std::vector<int64_t>& patch, bool packed,
                                               bool channels_first, int64_t norm, int64_t kind, double beta,
                                               bool need_images);

// cells.cpp
Tensor pack_cells(const Tensor& x, const Tensor& cells, const std::vector<int64_t>& grid, bool channels_last);
Tensor unpack_cells(const Tensor& x, const Tensor& slot, const std::vector<int64_t>& grid,
                    const std::optional<Tensor>& fill, bool channels_last);
Tensor fill_sum(const Tensor& grad, const Tensor& slot, const std::vector<int64_t>& grid);

// pool.cpp
std::tuple<Tensor, Tensor> max_pool_cells(const Tensor& x, const Tensor& neighbours,
                                          const std::vector<int64_t>& kernel,
                                          const std::vector<int64_t>& stride,
                                          const std::vector<int64_t>& padding);
Tensor max_pool_cells_backward(const Tensor& grad, const Tensor& argmax, const Tensor& neighbours,
                               const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                               const std::vector<int64_t>& padding);
Tensor avg_pool_cells(const Tensor& x, const Tensor& neighbours, const std::vector<int64_t>& kernel,
                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                      bool count_include_pad);
Tensor avg_pool_cells_backward(const Tensor& grad, const Tensor& neighbours,
                               const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                               const std::vector<int64_t>& padding, bool count_include_pad);

// cell_norm.cpp
std::tuple<Tensor, Tensor> segment_stats(const Tensor& x, const std::optional<Tensor>& cu, int64_t sites);
Tensor norm_act(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& cu,
                int64_t sites, const Tensor& mean, const Tensor& scale, const Tensor& bias, int64_t act);
std::tuple<Tensor, Tensor> norm_act_sums(const Tensor& grad, const Tensor& x,
                                         const std::optional<Tensor>& gate, const std::optional<Tensor>& cu,
                                         int64_t sites, const Tensor& mean, const Tensor& scale,
                                         const Tensor& bias, int64_t act);
Tensor norm_act_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& cu, int64_t sites,
                         const Tensor& mean, const Tensor& scale, const Tensor& bias,
                         const std::optional<Tensor>& offset, const std::optional<Tensor>& slope,
                         int64_t act);

// depthwise.cpp
Tensor depthwise(const Tensor& x, const Tensor& neighbours, const Tensor& weight,
                 const std::optional<Tensor>& bias, bool flip);
std::tuple<Tensor, Tensor> depthwise_grad_weight(const Tensor& x, const Tensor& grad,
                                                 const Tensor& neighbours, int64_t size);

// points.cpp
Tensor farthest_points(const Tensor& points, int64_t count, int64_t start);
std::tuple<Tensor, Tensor> knn(const Tensor& queries, const Tensor& points, int64_t k);

// chamfer.cpp
std::tuple<Tensor, Tensor, Tensor, Tensor> chamfer(const Tensor& a, const Tensor& b);
std::tuple<Tensor, Tensor> chamfer_backward(const Tensor& grad_to_b, const Tensor& grad_to_a, const Tensor& a,
                                            const Tensor& b, const Tensor& at_b, const Tensor& at_a);

// feature_loss.cpp
std::tuple<Tensor, Tensor> feature_loss(const Tensor& pred, const Tensor& target,
                                        const std::optional<Tensor>& index, int64_t norm, int64_t kind,
                                        double beta, double eps);
Tensor feature_loss_backward(const Tensor& grad, const Tensor& pred, const Tensor& target,
                             const std::optional<Tensor>& index, const Tensor& stats, int64_t norm,
                             int64_t kind, double beta);

// sparse_conv.cpp
Tensor halo_cells(const Tensor& x, const Tensor& neighbours, const std::vector<int64_t>& halo);
Tensor halo_cells_backward(const Tensor& grad, const Tensor& neighbours, const std::vector<int64_t>& halo);
Tensor gather_taps(const Tensor& x, const Tensor& neighbours, const std::vector<int64_t>& kernel,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation);
Tensor gather_taps_backward(const Tensor& grad, const Tensor& neighbours, const std::vector<int64_t>& size,
                            const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                            const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

}  // namespace maefast::cpu
