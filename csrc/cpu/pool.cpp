#include "cpu/host.h"
#include "cpu/ops.h"
#include "cpu/pool_kernel.h"

namespace maefast::cpu {
namespace {

int64_t floor_div(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

// The content of a PoolAxis, for windows of `kernel` places, `stride` apart, that start `padding` before the
// cell.
class Axis {
 public:
  Axis(int64_t places, int64_t kernel) : kernel_(kernel), count_(places, 0), entries_(3 * places * kernel) {}

  // For each place of y, those of x (cells of `size`).
  static Axis forward(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
    Axis axis(size / stride, kernel);
    for (int64_t o = 0; o < size / stride; ++o)
      for (int64_t k = 0; k < kernel; ++k) axis.add(o, o * stride - padding + k, size, k);
    return axis;
  }

  // For each place of x, those of y whose windows contain it.
  static Axis backward(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
    Axis axis(size, kernel);
    for (int64_t i = 0; i < size; ++i)
      for (int64_t k = kernel - 1; k >= 0; --k) {
        const int64_t start = i + padding - k;
        if (start - floor_div(start, stride) * stride == 0)
          axis.add(i, floor_div(start, stride), size / stride, k);
      }
    return axis;
  }

  // How many cells away the farthest place is.
  int64_t reach() const { return reach_; }

  PoolAxis view() const {
    const int32_t* p = entries_.data();
    const int64_t n = static_cast<int64_t>(entries_.size()) / 3;
    return {count_.data(), p, p + n, p + 2 * n, kernel_};
  }

 private:
  void add(int64_t place, int64_t at, int64_t size, int64_t tap) {
    const int64_t n = static_cast<int64_t>(entries_.size()) / 3;
    const int64_t entry = place * kernel_ + count_[place]++;
    const int64_t cell = floor_div(at, size);
    entries_[entry] = static_cast<int32_t>(cell);
    entries_[n + entry] = static_cast<int32_t>(at - cell * size);
    entries_[2 * n + entry] = static_cast<int32_t>(tap);
    const int64_t away = cell < 0 ? -cell : cell;
    if (away > reach_) reach_ = away;
  }

  int64_t kernel_, reach_ = 0;
  std::vector<int32_t> count_, entries_;
};

int64_t side_of(const Tensor& neighbours, int64_t cells) {
  MAEFAST_CHECK(neighbours.dim() == 2 && neighbours.size(0) == cells,
                "pool: neighbours must be [T, side * side]");
  int64_t side = 1;
  while (side * side < neighbours.size(1)) side += 2;
  MAEFAST_CHECK(side * side == neighbours.size(1), "pool: neighbours must be [T, side * side], side odd");
  return side;
}

using Sizes = std::vector<int64_t>;

void check_window(const Sizes& kernel, const Sizes& stride, const Sizes& padding, bool max) {
  bool ok = kernel.size() == 2 && stride.size() == 2 && padding.size() == 2;
  for (int d = 0; ok && d < 2; ++d)
    ok = kernel[d] > 0 && kernel[d] <= kMaxTaps && stride[d] > 0 && padding[d] >= 0 &&
         kernel[d] - 2 * padding[d] > 0 && kernel[d] - 2 * padding[d] <= stride[d];
  MAEFAST_CHECK(ok && kernel[0] * kernel[1] <= (max ? 255 : kMaxTaps),
                "pool: this window does not divide the map by its stride");
}

// y, or where `grad_of_x` the gradient of x from that of y.
Tensor run(const Tensor& in, const Tensor& neighbours, const Sizes& kernel, const Sizes& stride,
           const Sizes& padding, uint8_t* argmax, bool max, bool include_pad, bool grad_of_x) {
  const int64_t h = in.size(1) * (grad_of_x ? stride[0] : 1);
  const int64_t w = in.size(2) * (grad_of_x ? stride[1] : 1);
  const Axis window_rows = Axis::forward(h, kernel[0], stride[0], padding[0]);
  const Axis window_columns = Axis::forward(w, kernel[1], stride[1], padding[1]);
  const Axis rows = grad_of_x ? Axis::backward(h, kernel[0], stride[0], padding[0]) : window_rows;
  const Axis columns = grad_of_x ? Axis::backward(w, kernel[1], stride[1], padding[1]) : window_columns;
  int32_t failed = 0;
  PoolArgs args{};
  args.cells = in.size(0);
  args.in_h = in.size(1);
  args.in_w = in.size(2);
  args.out_h = grad_of_x ? h : h / stride[0];
  args.out_w = grad_of_x ? w : w / stride[1];
  args.channels = in.size(3);
  args.side = side_of(neighbours, args.cells);
  for (const Axis* axis : {&window_rows, &window_columns, &rows, &columns})
    MAEFAST_CHECK(axis->reach() <= args.side / 2, "pool: the windows reach beyond the table of neighbours");
  args.rows = rows.view();
  args.columns = columns.view();
  args.window_rows = window_rows.view();
  args.window_columns = window_columns.view();
  args.in = data(in, "x");
  args.argmax = argmax;
  args.table = plan_data(neighbours, "neighbours");
  args.failed = &failed;
  args.max = max;
  args.include_pad = include_pad;
  args.type = dtype_of(in);
  const int64_t bytes = element_size(args.type);
  const std::vector<char> zeros(grad_of_x ? 0 : args.channels * bytes, 0);
  args.zeros = zeros.data();
  Tensor out = empty({args.cells, args.out_h, args.out_w, args.channels}, in.scalar_type(), in);
  args.out = out.mutable_data_ptr();
  const auto kernel_function = grad_of_x ? pool_kernels_chosen().pool_backward : pool_kernels_chosen().pool;
  parallel_rows(args.cells * args.out_h,
                args.out_w * args.channels * bytes * (grad_of_x ? 1 : stride[0] * stride[1]),
                [&](int64_t begin, int64_t end) { kernel_function(args, begin, end); });
  check_plan(failed);
  return out;
}

// Cells of h x w sites that the stride divides.
void check_cells(const Tensor& x, const Sizes& stride) {
  MAEFAST_CHECK(x.dim() == 4 && x.size(1) % stride[0] == 0 && x.size(2) % stride[1] == 0,
                "pool: x must be [T, h, w, C], h and w multiples of the stride");
}

}  // namespace

std::tuple<Tensor, Tensor> max_pool_cells(const Tensor& x, const Tensor& neighbours, const Sizes& kernel,
                                          const Sizes& stride, const Sizes& padding) {
  check_window(kernel, stride, padding, true);
  check_cells(x, stride);
  Tensor argmax =
      empty({x.size(0), x.size(1) / stride[0], x.size(2) / stride[1], x.size(3)}, ScalarType::Byte, x);
  uint8_t* taps = static_cast<uint8_t*>(argmax.mutable_data_ptr());
  return {run(x, neighbours, kernel, stride, padding, taps, true, true, false), argmax};
}

Tensor max_pool_cells_backward(const Tensor& grad, const Tensor& argmax, const Tensor& neighbours,
                               const Sizes& kernel, const Sizes& stride, const Sizes& padding) {
  check_window(kernel, stride, padding, true);
  MAEFAST_CHECK(grad.dim() == 4 && argmax.scalar_type() == ScalarType::Byte && argmax.dim() == 4 &&
                    argmax.numel() == grad.numel(),
                "max_pool_cells_backward: argmax must be uint8 of grad's shape");
  uint8_t* taps = static_cast<uint8_t*>(const_cast<void*>(data(argmax, "argmax")));  // only read
  return run(grad, neighbours, kernel, stride, padding, taps, true, true, true);
}

Tensor avg_pool_cells(const Tensor& x, const Tensor& neighbours, const Sizes& kernel, const Sizes& stride,
                      const Sizes& padding, bool count_include_pad) {
  check_window(kernel, stride, padding, false);
  check_cells(x, stride);
  return run(x, neighbours, kernel, stride, padding, nullptr, false, count_include_pad, false);
}

Tensor avg_pool_cells_backward(const Tensor& grad, const Tensor& neighbours, const Sizes& kernel,
                               const Sizes& stride, const Sizes& padding, bool count_include_pad) {
  check_window(kernel, stride, padding, false);
  MAEFAST_CHECK(grad.dim() == 4, "avg_pool_cells_backward: grad must be [T, h, w, C]");
  return run(grad, neighbours, kernel, stride, padding, nullptr, false, count_include_pad, true);
}

}  // namespace maefast::cpu
