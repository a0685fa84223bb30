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

using Sizes = std::vector<int64_t>;

// The sides of a table of neighbours [T, side^n], n = 2 or 3.
int64_t side_of(const Tensor& neighbours, int64_t cells, size_t sides) {
  MAEFAST_CHECK(neighbours.dim() == 2 && neighbours.size(0) == cells, "pool: neighbours must be [T, side^n]");
  int64_t side = 1;
  const auto around = [&] { return side * side * (sides == 3 ? side : 1); };
  while (around() < neighbours.size(1)) side += 2;
  MAEFAST_CHECK(around() == neighbours.size(1), "pool: neighbours must be [T, side^n], side odd");
  return side;
}

void check_window(const Tensor& x, const Sizes& kernel, const Sizes& stride, const Sizes& padding, bool max) {
  MAEFAST_CHECK(x.dim() == 4 || x.dim() == 5, "pool: x must be [T, h, w, C] or [T, d, h, w, C]");
  const size_t sides = static_cast<size_t>(x.dim()) - 2;
  bool ok = kernel.size() == sides && stride.size() == sides && padding.size() == sides;
  int64_t taps = 1;
  for (size_t d = 0; ok && d < sides; ++d) {
    ok = kernel[d] > 0 && kernel[d] <= kMaxTaps && stride[d] > 0 && padding[d] >= 0 &&
         kernel[d] - 2 * padding[d] > 0 && kernel[d] - 2 * padding[d] <= stride[d];
    taps *= ok ? kernel[d] : 1;
  }
  MAEFAST_CHECK(ok && taps <= (max ? 255 : kMaxTaps),
                "pool: this window does not divide the map by its stride");
}

// The windows along one side of cells of `size`; a flat map has windows of one plane.
struct Side {
  Axis window, axis;
  int64_t in, out;
};

Side side_axes(const Tensor& x, int64_t k, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
               bool grad_of_x) {
  const int64_t at = k - (5 - x.dim());  // of the sides that x has
  const bool flat = at < 0;
  const int64_t in = flat ? 1 : x.size(at + 1), s = flat ? 1 : stride[at];
  const int64_t size = in * (grad_of_x ? s : 1), p = flat ? 0 : padding[at], taps = flat ? 1 : kernel[at];
  Axis window = Axis::forward(size, taps, s, p);
  return {window, grad_of_x ? Axis::backward(size, taps, s, p) : window, in, grad_of_x ? size : size / s};
}

// y, or where `grad_of_x` the gradient of x from that of y.
Tensor run(const Tensor& in, const Tensor& neighbours, const Sizes& kernel, const Sizes& stride,
           const Sizes& padding, uint8_t* argmax, bool max, bool include_pad, bool grad_of_x) {
  const bool solid = in.dim() == 5;
  const Side planes = side_axes(in, 0, kernel, stride, padding, grad_of_x);
  const Side rows = side_axes(in, 1, kernel, stride, padding, grad_of_x);
  const Side columns = side_axes(in, 2, kernel, stride, padding, grad_of_x);
  int32_t failed = 0;
  PoolArgs args{};
  args.cells = in.size(0);
  args.in_d = planes.in;
  args.in_h = rows.in;
  args.in_w = columns.in;
  args.out_d = planes.out;
  args.out_h = rows.out;
  args.out_w = columns.out;
  args.channels = in.size(in.dim() - 1);
  args.side = side_of(neighbours, args.cells, kernel.size());
  args.deep = solid ? args.side : 1;
  for (const Side* side : {&planes, &rows, &columns})
    MAEFAST_CHECK(side->window.reach() <= args.side / 2 && side->axis.reach() <= args.side / 2,
                  "pool: the windows reach beyond the table of neighbours");
  args.planes = planes.axis.view();
  args.rows = rows.axis.view();
  args.columns = columns.axis.view();
  args.window_planes = planes.window.view();
  args.window_rows = rows.window.view();
  args.window_columns = columns.window.view();
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
  Sizes shape{args.cells, args.out_h, args.out_w, args.channels};
  if (solid) shape.insert(shape.begin() + 1, args.out_d);
  Tensor out = empty(shape, in.scalar_type(), in);
  args.out = out.mutable_data_ptr();
  const auto kernel_function = grad_of_x ? pool_kernels_chosen().pool_backward : pool_kernels_chosen().pool;
  int64_t work = 1;
  for (size_t d = 0; d < stride.size() && !grad_of_x; ++d) work *= stride[d];
  parallel_rows(args.cells * args.out_d * args.out_h, args.out_w * args.channels * bytes * work,
                [&](int64_t begin, int64_t end) { kernel_function(args, begin, end); });
  check_plan(failed);
  return out;
}

// Cells of sites that the stride divides.
void check_cells(const Tensor& x, const Sizes& stride) {
  bool ok = true;
  for (size_t d = 0; d < stride.size(); ++d) ok = ok && x.size(static_cast<int64_t>(d) + 1) % stride[d] == 0;
  MAEFAST_CHECK(ok, "pool: the sides of x must be multiples of the stride");
}

}  // namespace

std::tuple<Tensor, Tensor> max_pool_cells(const Tensor& x, const Tensor& neighbours, const Sizes& kernel,
                                          const Sizes& stride, const Sizes& padding) {
  check_window(x, kernel, stride, padding, true);
  check_cells(x, stride);
  Sizes shape{x.size(0)};
  for (size_t d = 0; d < stride.size(); ++d) shape.push_back(x.size(static_cast<int64_t>(d) + 1) / stride[d]);
  shape.push_back(x.size(x.dim() - 1));
  Tensor argmax = empty(shape, ScalarType::Byte, x);
  uint8_t* taps = static_cast<uint8_t*>(argmax.mutable_data_ptr());
  return {run(x, neighbours, kernel, stride, padding, taps, true, true, false), argmax};
}

Tensor max_pool_cells_backward(const Tensor& grad, const Tensor& argmax, const Tensor& neighbours,
                               const Sizes& kernel, const Sizes& stride, const Sizes& padding) {
  check_window(grad, kernel, stride, padding, true);
  MAEFAST_CHECK(argmax.scalar_type() == ScalarType::Byte && argmax.dim() == grad.dim() &&
                    argmax.numel() == grad.numel(),
                "max_pool_cells_backward: argmax must be uint8 of grad's shape");
  uint8_t* taps = static_cast<uint8_t*>(const_cast<void*>(data(argmax, "argmax")));  // only read
  return run(grad, neighbours, kernel, stride, padding, taps, true, true, true);
}

Tensor avg_pool_cells(const Tensor& x, const Tensor& neighbours, const Sizes& kernel, const Sizes& stride,
                      const Sizes& padding, bool count_include_pad) {
  check_window(x, kernel, stride, padding, false);
  check_cells(x, stride);
  return run(x, neighbours, kernel, stride, padding, nullptr, false, count_include_pad, false);
}

Tensor avg_pool_cells_backward(const Tensor& grad, const Tensor& neighbours, const Sizes& kernel,
                               const Sizes& stride, const Sizes& padding, bool count_include_pad) {
  check_window(grad, kernel, stride, padding, false);
  return run(grad, neighbours, kernel, stride, padding, nullptr, false, count_include_pad, true);
}

}  // namespace maefast::cpu
