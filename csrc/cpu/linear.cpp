#include "cpu/host.h"
#include "cpu/linear_kernel.h"
#include "cpu/ops.h"

namespace maefast::cpu {

std::tuple<Tensor, Tensor> transpose_sum(const Tensor& x, bool need_sum) {
  MAEFAST_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float,
                "transpose_sum: x must be [R, D] float32");
  const int64_t rows = x.size(0), width = x.size(1);
  Tensor out = empty({width, rows}, ScalarType::Float, x);
  Tensor sum = empty({need_sum ? width : 0}, ScalarType::Float, x);
  TransposeArgs args;
  args.x = static_cast<const float*>(data(x, "x"));
  args.out = static_cast<float*>(out.mutable_data_ptr());
  args.sum = need_sum ? static_cast<float*>(sum.mutable_data_ptr()) : nullptr;
  args.rows = rows;
  args.width = width;
  const auto kernel = linear_kernels_chosen().transpose_sum;
  parallel_rows((width + kTransposeColumns - 1) / kTransposeColumns, 8 * rows * kTransposeColumns,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {out, sum};
}

}  // namespace maefast::cpu
