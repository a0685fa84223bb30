#include "cpu/pool_kernel.h"

#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

constexpr int32_t kOutside = -2;

template <class A>
using lane_int = either<is_same<A, double>, int64_t, int32_t>;
template <class A>
using vec_int = either<is_same<A, double>, vec_i64, vec_i32>;
typedef uint8_t bytes_f32 __attribute__((vector_size(kLanes<float>)));
typedef uint8_t bytes_f64 __attribute__((vector_size(kLanes<double>)));
template <class A>
using vec_bytes = either<is_same<A, double>, bytes_f64, bytes_f32>;

template <class A, int L>
MAEFAST_INLINE void store_bytes(uint8_t* p, vec_int<A> v, Full<L>) {
  const vec_bytes<A> b = __builtin_convertvector(v, vec_bytes<A>);
  __builtin_memcpy(p, &b, sizeof b);
}
template <class A>
MAEFAST_INLINE void store_bytes(uint8_t* p, vec_int<A> v, int n) {
  const vec_bytes<A> b = __builtin_convertvector(v, vec_bytes<A>);
  __builtin_memcpy(p, &b, size_t(n));
}
template <class A, int L>
MAEFAST_INLINE vec_int<A> load_bytes(const uint8_t* p, Full<L>) {
  return __builtin_convertvector(load_raw<vec_bytes<A>>(p), vec_int<A>);
}
template <class A>
MAEFAST_INLINE vec_int<A> load_bytes(const uint8_t* p, int n) {
  vec_bytes<A> b{};
  __builtin_memcpy(&b, p, size_t(n));
  return __builtin_convertvector(b, vec_int<A>);
}

// The table's entries around cell t, the middle one first.
MAEFAST_INLINE const int32_t* around(const PoolArgs& a, int64_t t) {
  return a.table + ((t * a.deep + a.deep / 2) * a.side + a.side / 2) * a.side + a.side / 2;
}

// Sites of window (k, i, j) of cell t that lie in the image: a product, as the image is a rectangle.
MAEFAST_INLINE int64_t in_image(const PoolArgs& a, int64_t t, int64_t k, int64_t i, int64_t j) {
  const int32_t* middle = around(a, t);
  int64_t planes = 0, rows = 0, columns = 0;
  for (int64_t n = k * a.window_planes.taps; n < (k + 1) * a.window_planes.taps; ++n)
    planes += middle[a.window_planes.cell[n] * a.side * a.side] != kOutside;
  for (int64_t n = i * a.window_rows.taps; n < (i + 1) * a.window_rows.taps; ++n)
    rows += middle[a.window_rows.cell[n] * a.side] != kOutside;
  for (int64_t n = j * a.window_columns.taps; n < (j + 1) * a.window_columns.taps; ++n)
    columns += middle[a.window_columns.cell[n]] != kOutside;
  return planes * rows * columns;
}

// The sites that one output site reads, each with the number of its tap.
template <class X>
struct Taps {
  const X* at[kMaxTaps];
  int32_t tap[kMaxTaps];
  int64_t offset[kMaxTaps];  // backward: element in y's layout
  float divisor[kMaxTaps];   // backward of the average
  int64_t count;
};

template <class X, bool backward>
MAEFAST_INLINE void collect(const PoolArgs& a, int64_t line, int64_t j, Taps<X>& taps) {
  const X* in = static_cast<const X*>(a.in);
  const int64_t t = line / (a.out_d * a.out_h), k = line / a.out_h % a.out_d, i = line % a.out_h;
  const int32_t* middle = around(a, t);
  const int64_t first_plane = k * a.planes.taps, last_plane = first_plane + a.planes.count[k];
  const int64_t first_row = i * a.rows.taps, last_row = first_row + a.rows.count[i];
  const int64_t first_column = j * a.columns.taps, last_column = first_column + a.columns.count[j];
  int64_t count = 0;
  for (int64_t p = first_plane; p < last_plane; ++p) {
    for (int64_t r = first_row; r < last_row; ++r) {
      const int32_t* cells = middle + (a.planes.cell[p] * a.side + a.rows.cell[r]) * a.side;
      const int32_t above =
          (a.planes.tap[p] * int32_t(a.window_rows.taps) + a.rows.tap[r]) * int32_t(a.window_columns.taps);
      for (int64_t c = first_column; c < last_column; ++c) {
        int64_t cell = cells[a.columns.cell[c]];
        if (cell >= a.cells) {
          fail(a.failed);
          cell = -1;  // read as masked, so that a window is never empty
        }
        if (cell < 0 && (backward || cell == kOutside)) continue;
        const int64_t row = (cell * a.in_d + a.planes.at[p]) * a.in_h + a.rows.at[r];
        const int64_t offset = cell < 0 ? 0 : (row * a.in_w + a.columns.at[c]) * a.channels;
        taps.at[count] = cell < 0 ? static_cast<const X*>(a.zeros) : in + offset;
        taps.tap[count] = above + a.columns.tap[c];
        if constexpr (backward) {
          taps.offset[count] = offset;
          if (!a.max)
            taps.divisor[count] =
                float(a.include_pad ? a.window_planes.taps * a.window_rows.taps * a.window_columns.taps
                                    : in_image(a, cell, a.planes.at[p], a.rows.at[r], a.columns.at[c]));
        }
        ++count;
      }
    }
  }
  taps.count = count;
}

template <class X>
void pool_typed(const PoolArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<X>;
  Taps<X> taps;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t j = 0; j < a.out_w; ++j) {
      collect<X, false>(a, r, j, taps);
      const int64_t site = (r * a.out_w + j) * a.channels;
      X* y = static_cast<X*>(a.out) + site;
      if (a.max) {
        uint8_t* argmax = a.argmax + site;
        for_lanes<A>(a.channels, [&](int64_t i, auto lanes) {
          vec<A> best = load<A>(taps.at[0] + i, lanes);
          vec_int<A> arg = vec_int<A>{} + lane_int<A>(taps.tap[0]);
          for (int64_t n = 1; n < taps.count; ++n) {
            const vec<A> v = load<A>(taps.at[n] + i, lanes);
            const vec_int<A> wins = vec_int<A>(v > best) | vec_int<A>(v != v);  // a NaN wins, as in PyTorch
            best = wins ? v : best;
            arg = wins ? vec_int<A>{} + lane_int<A>(taps.tap[n]) : arg;
          }
          store<A>(y + i, best, lanes);
          store_bytes<A>(argmax + i, arg, lanes);
        });
      } else {
        const A divisor = A(a.include_pad ? a.planes.taps * a.rows.taps * a.columns.taps : taps.count);
        for_lanes<A>(a.channels, [&](int64_t i, auto lanes) {
          vec<A> sum = load<A>(taps.at[0] + i, lanes);
          for (int64_t n = 1; n < taps.count; ++n) sum += load<A>(taps.at[n] + i, lanes);
          store<A>(y + i, sum / divisor, lanes);
        });
      }
    }
  }
}

template <class X>
void pool_backward_typed(const PoolArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<X>;
  Taps<X> taps;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t j = 0; j < a.out_w; ++j) {
      collect<X, true>(a, r, j, taps);
      X* grad_x = static_cast<X*>(a.out) + (r * a.out_w + j) * a.channels;
      for_lanes<A>(a.channels, [&](int64_t i, auto lanes) {
        vec<A> sum{};
        for (int64_t n = 0; n < taps.count; ++n) {
          const vec<A> g = load<A>(taps.at[n] + i, lanes);
          if (a.max) {
            const vec_int<A> chosen = load_bytes<A>(a.argmax + taps.offset[n] + i, lanes);
            sum += chosen == vec_int<A>{} + lane_int<A>(taps.tap[n]) ? g : vec<A>{};
          } else {
            sum += g / A(taps.divisor[n]);
          }
        }
        store<A>(grad_x + i, sum, lanes);
      });
    }
  }
}

void pool(const PoolArgs& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto x) { pool_typed<typename decltype(x)::type>(a, begin, end); });
}

void pool_backward(const PoolArgs& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto x) { pool_backward_typed<typename decltype(x)::type>(a, begin, end); });
}

}  // namespace

extern const PoolKernels pool_kernels = {pool, pool_backward};

}  // namespace maefast::MAEFAST_ISA
