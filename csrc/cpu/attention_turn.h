// Rotary positions: x' = x * cos + turn(x) * sin, where turn gives (-b, a) for each pair (a, b) of elements.
#pragma once

#include "cpu/attention_kernel.h"
#include "cpu/attention_math.h"

namespace maefast::MAEFAST_ISA {
namespace {

constexpr int64_t kMostWidth = 128;

template <class T>
struct Rows {
  const T* p;
  int64_t stride;
};

// First row of cos and sin for the sequence that starts at row `first` of q.
MAEFAST_INLINE int64_t first_turn(const Sequences& s, int64_t first) {
  return s.shared_turn ? 0 : first;
}

// `count` rows rotated by the rows of cos and sin from `turn` on, rounded to T, one after another in `dst`.
template <class T>
Rows<T> rotate_rows(const Sequences& s, Rows<T> src, int64_t count, int64_t turn, float* space) {
  const int64_t width = s.width, half = width / 2;
  T* const start = reinterpret_cast<T*>(space);
  T* dst = start;
  float x[kMostWidth + kLane], turned[kMostWidth + kLane];
  for (int64_t r = 0; r < count; ++r, src.p += src.stride, dst += width) {
    const float* cos = s.cos + (turn + r) * width;
    const float* sin = s.sin + (turn + r) * width;
    widen_rows(src.p, 0, 1, width, x);
    if (s.interleaved) {
      for (int64_t i = 0; i < half; ++i) {
        turned[2 * i] = -x[2 * i + 1];
        turned[2 * i + 1] = x[2 * i];
      }
    } else {
      for (int64_t i = 0; i < half; ++i) {
        turned[i] = -x[half + i];
        turned[half + i] = x[i];
      }
    }
    for (int64_t i = 0; i < width; ++i) x[i] = x[i] * cos[i] + turned[i] * sin[i];
    scale_row(x, 1, dst, width);
  }
  return {start, width};
}

// The gradient of such a row from that of the rotated one, in place: the transpose of the rotation.
[[maybe_unused]] void rotate_back(const Sequences& s, float* x, int64_t turn) {
  const int64_t width = s.width, half = width / 2;
  const float* cos = s.cos + turn * width;
  const float* sin = s.sin + turn * width;
  float part[kMostWidth];
  for (int64_t i = 0; i < width; ++i) part[i] = x[i] * sin[i];
  for (int64_t i = 0; i < width; ++i) x[i] *= cos[i];
  if (s.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      x[2 * i] += part[2 * i + 1];
      x[2 * i + 1] -= part[2 * i];
    }
  } else {
    for (int64_t i = 0; i < half; ++i) {
      x[i] += part[half + i];
      x[half + i] -= part[i];
    }
  }
}

}  // namespace
}  // namespace maefast::MAEFAST_ISA
