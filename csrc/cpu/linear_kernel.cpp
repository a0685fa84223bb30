#include "cpu/linear_kernel.h"

#include "cpu/transpose_vec.h"
#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

constexpr int64_t kLane = kLanes<float>;

// The sums of 16 rows are added to those before: a column's error grows with rows / 16, and its value does
// not depend on which task or register it is in.
constexpr int64_t kGroup = 16;

MAEFAST_INLINE vec_f32 sum_group(const float* x, int64_t stride) {
  vec_f32 s[kGroup];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kGroup; ++i) s[i] = load<float>(x + i * stride);
#pragma GCC unroll 4
  for (int64_t half = kGroup / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) s[i] += s[i + half];
  }
  return s[0];
}

// Columns [first, last) of rows [r, r + count), one by one.
void transpose_some(const TransposeArgs& args, int64_t r, int64_t count, int64_t first, int64_t last) {
  for (int64_t c = first; c < last; ++c) {
    const float* const from = args.x + r * args.width + c;
    float* const to = args.out + c * args.rows + r;
    float s[kGroup];
    for (int64_t i = 0; i < count; ++i) to[i] = s[i] = from[i * args.width];
    for (int64_t i = count; i < kGroup; ++i) s[i] = 0.0f;
    if (args.sum == nullptr) continue;
    for (int64_t half = kGroup / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) s[i] += s[i + half];
    }
    args.sum[c] += s[0];
  }
}

void transpose_block(const TransposeArgs& args, int64_t first, int64_t last) {
  const int64_t width = args.width, whole = first + (last - first) / kLane * kLane;
  if (args.sum != nullptr) {
    for (int64_t c = first; c < last; ++c) args.sum[c] = 0.0f;
  }
  int64_t r = 0;
  for (; r + kGroup <= args.rows; r += kGroup) {
    for (int64_t c = first; c < whole; c += kLane) {
      const float* const corner = args.x + r * width + c;
      if (args.sum != nullptr) {
        store<float>(args.sum + c, load<float>(args.sum + c) + sum_group(corner, width));
      }
      for (int64_t g = 0; g < kGroup; g += kLane) {
        vec_f32 x[kLane];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLane; ++i) x[i] = load<float>(corner + (g + i) * width);
        transpose(x);
        float* const to = args.out + c * args.rows + r + g;
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLane; ++i) store<float>(to + i * args.rows, x[i]);
      }
    }
    transpose_some(args, r, kGroup, whole, last);
  }
  if (r < args.rows) transpose_some(args, r, args.rows - r, first, last);
}

void transpose_sum(const TransposeArgs& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * kTransposeColumns, next = first + kTransposeColumns;
    transpose_block(args, first, next < args.width ? next : args.width);
  }
}

}  // namespace

const LinearKernels linear_kernels = {transpose_sum};

}  // namespace maefast::MAEFAST_ISA
