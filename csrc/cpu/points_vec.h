// Squared distances of points that lie planar, a register at a time.
#pragma once

#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

constexpr int64_t kMaxCoordinates = 16;

// points [n, D] to planes [D, padded], the padding zero.
template <class A>
MAEFAST_INLINE void planar(const A* points, A* planes, int64_t n, int64_t padded, int64_t coordinates) {
  for (int64_t d = 0; d < coordinates; ++d) {
    for (int64_t i = 0; i < n; ++i) planes[d * padded + i] = points[i * coordinates + d];
    for (int64_t i = n; i < padded; ++i) planes[d * padded + i] = 0;
  }
}

// Of a register of points to one, summed coordinate by coordinate.
template <class A>
MAEFAST_INLINE vec<A> distances(const A* planes, int64_t stride, const A* center, int64_t coordinates) {
  vec<A> t = load<A>(planes) - splat(center[0]);
  vec<A> total = t * t;
  for (int64_t d = 1; d < coordinates; ++d) {
    t = load<A>(planes + d * stride) - splat(center[d]);
    total += t * t;
  }
  return total;
}

// Whether any lane of a comparison holds.
template <class M>
MAEFAST_INLINE bool any(M mask) {
  constexpr int n = sizeof(M) / sizeof(mask[0]);
  auto found = mask[0];
  for (int i = 1; i < n; ++i) found |= mask[i];
  return found != 0;
}

}  // namespace
}  // namespace maefast::MAEFAST_ISA
