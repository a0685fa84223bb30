#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/host.h"
#include "cpu/ops.h"
#include "cpu/resize_kernel.h"

namespace maefast::cpu {
namespace {

// Keys' cubic with a = -1/2.
double cubic(double x) {
  x = std::abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * -0.5;
  return 0;
}

// The weights of `made` pixels that divide low..high of `size` ones.
class Weights {
 public:
  Weights(int64_t size, float low, float high, int64_t made, bool backwards)
      : taps_(std::min<int64_t>(size, taps(std::max(scale_of(low, high, made), 1.0)))),
        first_(made),
        count_(made),
        weights_(made * taps_) {
    const double scale = scale_of(low, high, made), wide = std::max(scale, 1.0);
    std::vector<double> values(taps_);
    for (int64_t i = 0; i < made; ++i) {
      const double center = double(low) + (double(i) + 0.5) * scale;
      const int64_t first = std::max<int64_t>(0, int64_t(center - 2 * wide + 0.5));
      const int64_t end = std::min<int64_t>(size, int64_t(center + 2 * wide + 0.5));
      double sum = 0;
      for (int64_t k = 0; k < end - first; ++k) {
        values[k] = cubic((double(first + k) - center + 0.5) * (1.0 / wide));
        sum += values[k];
      }
      const int64_t at = backwards ? made - 1 - i : i;
      first_[at] = int32_t(first);
      count_[at] = int32_t(end - first);
      for (int64_t k = 0; k < end - first; ++k) {
        const double value = values[k] / sum * double(1 << 22);
        weights_[at * taps_ + k] = int32_t(value + (value < 0 ? -0.5 : 0.5));
      }
    }
  }

  // The pixels that are needed, [begin, end): from here on they are counted from the first of them.
  std::pair<int64_t, int64_t> trim() {
    int64_t begin = first_[0], end = 0;
    for (size_t i = 0; i < first_.size(); ++i) {
      begin = std::min<int64_t>(begin, first_[i]);
      end = std::max<int64_t>(end, first_[i] + count_[i]);
    }
    for (int32_t& first : first_) first -= int32_t(begin);
    return {begin, end};
  }

  Filter filter() const { return {first_.data(), count_.data(), weights_.data(), taps_}; }

 private:
  // A box is float32, as Pillow's; so is the difference.
  static double scale_of(float low, float high, int64_t made) { return double(high - low) / double(made); }
  static int64_t taps(double wide) { return int64_t(std::ceil(2 * wide)) * 2 + 1; }

  int64_t taps_;
  std::vector<int32_t> first_, count_, weights_;
};

}  // namespace

void resize(const Tensor& image, double left, double top, double right, double bottom, bool flip,
            const Tensor& out) {
  const int64_t channels = image.dim() == 3 ? image.size(2) : 0;
  MAEFAST_CHECK(channels >= 1 && channels <= 4 && image.size(0) >= 1 && image.size(1) >= 1 &&
                    image.scalar_type() == ScalarType::Byte && (channels == 1 || image.stride(2) == 1) &&
                    (image.size(1) == 1 || image.stride(1) == channels),
                "image must be uint8 [H, W, C], its rows contiguous");
  MAEFAST_CHECK(out.dim() == 3 && out.scalar_type() == ScalarType::Byte && out.is_contiguous() &&
                    out.size(0) == channels && out.size(1) >= 1 && out.size(2) >= 1,
                "out must be uint8 [C, h, w], contiguous");
  MAEFAST_CHECK(0 <= left && left < right && right <= double(image.size(1)) && 0 <= top && top < bottom &&
                    bottom <= double(image.size(0)),
                "resize: the box leaves the image");
  ResizeArgs args;
  args.channels = channels;
  args.out_rows = out.size(1);
  args.out_width = out.size(2);
  args.padded = (args.out_width + kResizeRows - 1) / kResizeRows * kResizeRows;
  Weights across(image.size(1), float(left), float(right), args.out_width, flip);
  Weights down(image.size(0), float(top), float(bottom), args.out_rows, false);
  const auto columns = across.trim(), rows = down.trim();
  args.across = across.filter();
  args.down = down.filter();
  args.rows = rows.second - rows.first;
  args.width = columns.second - columns.first;
  args.row_bytes = image.stride(0);
  args.image = static_cast<const uint8_t*>(image.const_data_ptr()) + rows.first * args.row_bytes +
               columns.first * args.channels;
  const Workspace turned(kResizeRows * args.channels * (args.width + args.padded));
  const Workspace filtered(args.channels * args.rows * args.padded);
  args.turned = static_cast<uint8_t*>(turned.get());
  args.filtered = static_cast<uint8_t*>(filtered.get());
  args.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  resize_kernels_chosen().resize(args);
}

}  // namespace maefast::cpu
