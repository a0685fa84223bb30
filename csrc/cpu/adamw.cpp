#include <algorithm>
#include <cmath>

#include "cpu/adamw_kernel.h"
#include "cpu/host.h"
#include "cpu/ops.h"

namespace maefast::cpu {

namespace {

float* scalar(const Tensor& x, const char* name) {
  MAEFAST_CHECK(x.numel() == 1 && x.scalar_type() == ScalarType::Float, "adamw: ", name,
                " must be one float32 number");
  return static_cast<float*>(x.mutable_data_ptr());
}

void* writable(const Tensor& x, const Tensor& param, const char* name) {
  MAEFAST_CHECK(x.is_contiguous() && x.numel() == param.numel(), "adamw: ", name,
                " must be contiguous and as large as its parameter");
  return x.mutable_data_ptr();
}

void* state(const Tensor& x, const Tensor& param, const char* name) {
  MAEFAST_CHECK(x.scalar_type() == param.scalar_type(), "adamw: ", name, " must have its parameter's dtype");
  return writable(x, param, name);
}

}  // namespace

void adamw(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
           const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
           const std::vector<Tensor>& max_exp_avg_sqs, const std::vector<Tensor>& shadows,
           const std::vector<Tensor>& steps, const std::optional<Tensor>& lr_tensor, double lr, double beta1,
           double beta2, double eps, double weight_decay, bool maximize,
           const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  const size_t n = params.size();
  const auto fits = [&](const std::vector<Tensor>& list, bool optional) {
    return list.size() == n || (optional && list.empty());
  };
  MAEFAST_CHECK(fits(grads, false) && fits(exp_avgs, false) && fits(exp_avg_sqs, false) &&
                    fits(steps, false) && fits(max_exp_avg_sqs, true) && fits(shadows, true),
                "adamw: the lists must be of one length");
  if (lr_tensor) lr = *scalar(*lr_tensor, "lr");
  AdamwArgs args;
  args.decay = 1 - lr * weight_decay;
  args.beta1 = beta1;
  args.beta2 = beta2;
  args.eps = eps;
  args.grad_scale = grad_scale ? *scalar(*grad_scale, "grad_scale") : 0;
  args.maximize = maximize;
  args.skip = found_inf && *scalar(*found_inf, "found_inf") != 0;

  std::vector<AdamwTensor> tensors(n);
  std::vector<int64_t> ends(n);  // of the elements of each parameter among those of all
  int64_t total = 0, bytes = 0;
  for (size_t i = 0; i < n; ++i) {
    AdamwTensor& t = tensors[i];
    t.type = dtype_of(params[i]);
    t.grad_type = dtype_of(grads[i]);
    MAEFAST_CHECK(t.type == t.grad_type || widens(t.grad_type, t.type) || widens(t.type, t.grad_type),
                  "adamw: no kernel for this dtype of a gradient");
    t.param = state(params[i], params[i], "param");
    t.grad = writable(grads[i], params[i], "grad");
    t.exp_avg = state(exp_avgs[i], params[i], "exp_avg");
    t.exp_avg_sq = state(exp_avg_sqs[i], params[i], "exp_avg_sq");
    t.max_exp_avg_sq =
        max_exp_avg_sqs.empty() ? nullptr : state(max_exp_avg_sqs[i], params[i], "max_exp_avg_sq");
    t.shadow = nullptr;
    t.shadow_type = DType::bf16;
    if (!shadows.empty()) {
      t.shadow_type = dtype_of(shadows[i]);
      MAEFAST_CHECK(is_half(t.shadow_type) && !is_half(t.type),
                    "adamw: a shadow has 16 bits, its parameter more");
      t.shadow = writable(shadows[i], params[i], "shadow");
    }
    float* step = scalar(steps[i], "step");
    if (!args.skip) *step += 1;
    t.step_size = lr / (1 - std::pow(beta1, double(*step)));
    t.bias_correction2_sqrt = std::sqrt(1 - std::pow(beta2, double(*step)));
    t.count = params[i].numel();
    total += t.count;
    bytes += t.count * (6 * element_size(t.type) + element_size(t.grad_type));
    ends[i] = total;
  }
  if (total == 0) return;
  const auto kernel = adamw_kernels_chosen().adamw;
  parallel_rows(total, bytes / total, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++i) {
      const int64_t start = ends[i] - tensors[i].count, stop = std::min(end, ends[i]);
      if (stop > begin) kernel(args, tensors[i], begin - start, stop - start);
      begin = std::max(begin, stop);
    }
  });
}

}  // namespace maefast::cpu
