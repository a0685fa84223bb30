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

// A distance and its index in one number, ordered as (distance, index): no distance is negative. `keys` [k]
// ascend.
MAEFAST_INLINE void insert(int64_t* keys, int64_t k, int64_t key) {
  constexpr int w = kVectorBytes / 8;
  const auto lower = [](auto x, auto y) { return x < y ? x : y; };
  const auto higher = [](auto x, auto y) { return x > y ? x : y; };
  // new[i] = min(old[i], max(old[i - 1], key)), from the end.
  int64_t i = k - 1;
  for (; i % w != 0; --i) keys[i] = lower(keys[i], higher(keys[i - 1], key));
  const vec_i64 each = vec_i64{} + key;
  for (; i > 0; i -= w) {
    const vec_i64 here = load_raw<vec_i64>(keys + i - w + 1), before = load_raw<vec_i64>(keys + i - w);
    const vec_i64 next = lower(here, higher(before, each));
    __builtin_memcpy(keys + i - w + 1, &next, sizeof next);
  }
  keys[0] = lower(keys[0], key);
}

// Most points are turned away a register at a time.
void knn_float(const KnnArgs& a, int64_t begin, int64_t end) {
  constexpr int w = kLanes<float>;
  for (int64_t q = begin; q < end; ++q) {
    const float* planes = static_cast<const float*>(a.planes) + q / a.queries_each * a.coordinates * a.padded;
    const float* query = static_cast<const float*>(a.queries) + q * a.coordinates;
    int64_t* keys = a.index + q * a.k;
    for (int64_t i = 0; i < a.k; ++i) keys[i] = INT64_MAX;
    for (int64_t n = 0; n < a.padded; n += w) {
      const vec_i32 bits = (vec_i32)distances<float>(planes + n, a.padded, query, a.coordinates);
      int32_t most = int32_t(keys[a.k - 1] >> 32);
      if (!any(bits < most)) continue;
      for (int i = 0; i < w && n + i < a.size; ++i) {
        if (bits[i] >= most) continue;
        insert(keys, a.k, int64_t(bits[i]) << 32 | (n + i));
        most = int32_t(keys[a.k - 1] >> 32);
      }
    }
    int32_t* distance = static_cast<int32_t*>(a.distance) + q * a.k;
    for (int64_t i = 0; i < a.k; ++i) {
      distance[i] = int32_t(keys[i] >> 32);
      keys[i] &= 0xffffffff;
    }
  }
}

void knn_double(const KnnArgs& a, int64_t begin, int64_t end) {
  using A = double;
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
  a.wide ? knn_double(a, begin, end) : knn_float(a, begin, end);
}

}  // namespace

extern const PointsKernels points_kernels = {to_planes, farthest_points, knn};

}  // namespace maefast::MAEFAST_ISA
