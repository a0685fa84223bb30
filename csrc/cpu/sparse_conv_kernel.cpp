#include "cpu/sparse_conv_kernel.h"

#include <cstddef>

#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

// n = cell * size + site with 0 <= site < size.
struct Place {
  int64_t cell, site;
  Place(int64_t n, int64_t size)
      : cell(n >= 0 ? n / size : -((size - 1 - n) / size)), site(n - cell * size) {}
};

// Packed index of the cell (dz, dy, dx) away from cell t, or -1 where it is absent.
MAEFAST_INLINE int64_t neighbour(const CellTable& a, int64_t t, int64_t dz, int64_t dy, int64_t dx) {
  const int64_t radius = a.reach / 2, plane = t * a.planes + dz + a.planes / 2;
  const int64_t u = a.neighbours[(plane * a.reach + dy + radius) * a.reach + dx + radius];
  if (u < a.cells) return u < 0 ? -1 : u;
  fail(a.failed);
  return -1;
}

// dst = src, or zeros where there is none. The builtins reach libc, which has its own choice of instruction
// set.
MAEFAST_INLINE void put(char* dst, const char* src, int64_t bytes) {
  if (src != nullptr) {
    __builtin_memcpy(dst, src, static_cast<size_t>(bytes));
  } else {
    __builtin_memset(dst, 0, static_cast<size_t>(bytes));
  }
}

MAEFAST_INLINE int64_t size_of(DType type) {
  return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2;
}

// A line of a framed cell is a few runs, one for each column of cells that it crosses.
void halo(const HaloArgs& a, int64_t begin, int64_t end) {
  const int64_t site = a.channels * size_of(a.type), line = a.width * site;
  const int64_t lines = a.top + a.height + a.bottom, sites = a.left + a.width + a.right;
  const int64_t planes = a.front + a.depth + a.back;
  const char* const src = static_cast<const char*>(a.src);
  char* out = static_cast<char*>(a.dst) + begin * sites * site;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t t = r / (planes * lines);
    const Place plane(r / lines % planes - a.front, a.depth), row(r % lines - a.top, a.height);
    const int64_t above = plane.site * a.height + row.site;
    for (int64_t j = -a.left; j < a.width + a.right;) {
      const Place column(j, a.width);
      int64_t count = a.width - column.site;
      if (count > a.width + a.right - j) count = a.width + a.right - j;
      const int64_t u = neighbour(a, t, plane.cell, row.cell, column.cell);
      const int64_t from = (u * a.depth * a.height + above) * line + column.site * site;
      put(out, u < 0 ? nullptr : src + from, count * site);
      out += count * site;
      j += count;
    }
  }
}

// out = the sum of `count` rows, in their order, rounded once.
template <class T>
MAEFAST_INLINE void sum_rows(const T* const* rows, int64_t count, T* out, int64_t n) {
  using A = acc_t<T>;
  if (count == 1) return convert_row(rows[0], out, n);
  if (count == 0) return zero_row(out, n);
  for_lanes<A>(n, [&](int64_t i, auto lanes) {
    vec<A> sum = load<A>(rows[0] + i, lanes);
    for (int64_t k = 1; k < count; ++k) sum += load<A>(rows[k] + i, lanes);
    store<A>(out + i, sum, lanes);
  });
}

// A site collects its gradients from its own framed cell and from those whose frame it stands in.
template <class T>
void halo_backward_typed(const HaloArgs& a, int64_t begin, int64_t end) {
  const int64_t lines = a.top + a.height + a.bottom, sites = a.left + a.width + a.right;
  const int64_t planes = a.front + a.depth + a.back;
  const int64_t radius = a.reach / 2, deep = a.planes / 2, c = a.channels;
  const T* const grad = static_cast<const T*>(a.src);
  T* out = static_cast<T*>(a.dst) + begin * a.width * c;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t t = r / (a.depth * a.height), plane = r / a.height % a.depth, i = r % a.height;
    for (int64_t j = 0; j < a.width; ++j, out += c) {
      const T* rows[kMaxAround];
      int64_t count = 0;
      for (int64_t dz = -deep; dz <= deep; ++dz) {
        const int64_t z = plane - dz * a.depth + a.front;
        if (z < 0 || z >= planes) continue;
        for (int64_t dy = -radius; dy <= radius; ++dy) {
          const int64_t y = i - dy * a.height + a.top;
          if (y < 0 || y >= lines) continue;
          for (int64_t dx = -radius; dx <= radius; ++dx) {
            const int64_t x = j - dx * a.width + a.left;
            if (x < 0 || x >= sites) continue;
            const int64_t u = neighbour(a, t, dz, dy, dx);
            if (u >= 0) rows[count++] = grad + (((u * planes + z) * lines + y) * sites + x) * c;
          }
        }
      }
      sum_rows(rows, count, out, c);
    }
  }
}

void halo_backward(const HaloArgs& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto type) { halo_backward_typed<typename decltype(type)::type>(a, begin, end); });
}

void taps(const TapsArgs& a, int64_t begin, int64_t end) {
  const ConvWindow& win = a.window;
  const int64_t site = a.channels * size_of(a.type), planes = a.depth / win.stride[0];
  const int64_t lines = a.height / win.stride[1], sites = a.width / win.stride[2];
  const int64_t taps_of_row = win.kernel[0] * win.kernel[1] * win.kernel[2];
  const char* const src = static_cast<const char*>(a.src);
  char* out = static_cast<char*>(a.dst) + begin * sites * taps_of_row * site;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t t = r / (planes * lines), front = r / lines % planes * win.stride[0] - win.padding[0];
    const int64_t top = r % lines * win.stride[1] - win.padding[1];
    for (int64_t j = 0; j < sites; ++j) {
      const int64_t left = j * win.stride[2] - win.padding[2];
      for (int64_t kz = 0; kz < win.kernel[0]; ++kz) {
        const Place plane(front + kz * win.dilation[0], a.depth);
        for (int64_t ky = 0; ky < win.kernel[1]; ++ky) {
          const Place row(top + ky * win.dilation[1], a.height);
          for (int64_t kx = 0; kx < win.kernel[2]; ++kx, out += site) {
            const Place column(left + kx * win.dilation[2], a.width);
            const int64_t u = neighbour(a, t, plane.cell, row.cell, column.cell);
            const int64_t from = ((u * a.depth + plane.site) * a.height + row.site) * a.width + column.site;
            put(out, u < 0 ? nullptr : src + from * site, site);
          }
        }
      }
    }
  }
}

template <class T>
void taps_backward_typed(const TapsArgs& a, int64_t begin, int64_t end) {
  const ConvWindow& win = a.window;
  const int64_t planes = a.depth / win.stride[0], lines = a.height / win.stride[1];
  const int64_t sites = a.width / win.stride[2], c = a.channels;
  const int64_t taps_of_row = win.kernel[0] * win.kernel[1] * win.kernel[2];
  const T* const grad = static_cast<const T*>(a.src);
  T* out = static_cast<T*>(a.dst) + begin * a.width * c;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t t = r / (a.depth * a.height), k = r / a.height % a.depth, i = r % a.height;
    for (int64_t j = 0; j < a.width; ++j, out += c) {
      const T* rows[kMaxAround];
      int64_t count = 0;
      for (int64_t kz = 0; kz < win.kernel[0]; ++kz) {
        const Place z(k + win.padding[0] - kz * win.dilation[0], win.stride[0]);  // cell: the output's plane
        if (z.site != 0) continue;
        const Place plane(z.cell, planes);
        for (int64_t ky = 0; ky < win.kernel[1]; ++ky) {
          const Place y(i + win.padding[1] - ky * win.dilation[1], win.stride[1]);
          if (y.site != 0) continue;
          const Place row(y.cell, lines);
          for (int64_t kx = 0; kx < win.kernel[2]; ++kx) {
            const Place x(j + win.padding[2] - kx * win.dilation[2], win.stride[2]);
            if (x.site != 0) continue;
            const Place column(x.cell, sites);
            const int64_t u = neighbour(a, t, plane.cell, row.cell, column.cell);
            const int64_t from = ((u * planes + plane.site) * lines + row.site) * sites + column.site;
            const int64_t tap = (kz * win.kernel[1] + ky) * win.kernel[2] + kx;
            if (u >= 0) rows[count++] = grad + (from * taps_of_row + tap) * c;
          }
        }
      }
      sum_rows(rows, count, out, c);
    }
  }
}

void taps_backward(const TapsArgs& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto type) { taps_backward_typed<typename decltype(type)::type>(a, begin, end); });
}

}  // namespace

extern const SparseConvKernels sparse_conv_kernels = {halo, halo_backward, taps, taps_backward};

}  // namespace maefast::MAEFAST_ISA
