#include "cpu/points_kernel.h"

#include "cpu/points_vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

template <class A>
void to_planes_typed(const PlanesArgs& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const A* points = static_cast<const A*>(a.points) + b * a.size * a.coordinates;
    A* planes = static_cast<A*>(a.planes) + b * a.coordinates * a.padded;
    planar(points, planes, a.size, a.padded, a.coordinates);
  }
}

template <class A>
void farthest_typed(const FarthestArgs& a, int64_t begin, int64_t end) {
  constexpr int w = kLanes<A>;
  for (int64_t b = begin; b < end; ++b) {
    const A* planes = static_cast<const A*>(a.planes) + b * a.coordinates * a.padded;
    A* nearest = static_cast<A*>(a.nearest) + b * a.padded;
    int64_t* out = a.out + b * a.count;
    for (int64_t n = 0; n < a.padded; ++n) nearest[n] = n < a.size ? A(__builtin_inf()) : A(-1);
    int64_t at = a.start;
    for (int64_t s = 0; s < a.count; ++s) {
      out[s] = at;
      if (s + 1 == a.count) break;
      A center[kMaxCoordinates];
      for (int64_t d = 0; d < a.coordinates; ++d) center[d] = planes[d * a.padded + at];
      vec<A> most = splat(A(-1));
      for (int64_t n = 0; n < a.padded; n += w) {
        const vec<A> distance = distances<A>(planes + n, a.padded, center, a.coordinates);
        vec<A> least = load<A>(nearest + n);
        least = distance < least ? distance : least;
        store<A>(nearest + n, least);
        most = least > most ? least : most;
      }
      A top = most[0];
      for (int i = 1; i < w; ++i) top = most[i] > top ? most[i] : top;
      at = 0;
      while (at + 1 < a.size && nearest[at] != top) ++at;
    }
  }
}

// The list of the nearest so far is kept in order; most points are turned away a register at a time.
template <class A>
void knn_typed(const KnnArgs& a, int64_t begin, int64_t end) {
  constexpr int w = kLanes<A>;
  for (int64_t q = begin; q < end; ++q) {
    const A* planes = static_cast<const A*>(a.planes) + q / a.queries_each * a.coordinates * a.padded;
    const A* query = static_cast<const A*>(a.queries) + q * a.coordinates;
    int64_t* index = a.index + q * a.k;
    A* best = static_cast<A*>(a.distance) + q * a.k;
    int64_t held = 0;
    for (int64_t n = 0; n < a.padded; n += w) {
      const vec<A> distance = distances<A>(planes + n, a.padded, query, a.coordinates);
      if (held == a.k && !any(distance < splat(best[a.k - 1]))) continue;
      for (int i = 0; i < w && n + i < a.size; ++i) {
        const A value = distance[i];
        if (held == a.k && !(value < best[a.k - 1])) continue;
        int64_t place = held < a.k ? held++ : a.k - 1;
        for (; place > 0 && best[place - 1] > value; --place) {
          best[place] = best[place - 1];
          index[place] = index[place - 1];
        }
        best[place] = value;
        index[place] = n + i;
      }
    }
  }
}

void to_planes(const PlanesArgs& a, int64_t begin, int64_t end) {
  a.wide ? to_planes_typed<double>(a, begin, end) : to_planes_typed<float>(a, begin, end);
}

void farthest_points(const FarthestArgs& a, int64_t begin, int64_t end) {
  a.wide ? farthest_typed<double>(a, begin, end) : farthest_typed<float>(a, begin, end);
}

void knn(const KnnArgs& a, int64_t begin, int64_t end) {
  a.wide ? knn_typed<double>(a, begin, end) : knn_typed<float>(a, begin, end);
}

}  // namespace

extern const PointsKernels points_kernels = {to_planes, farthest_points, knn};

}  // namespace maefast::MAEFAST_ISA
