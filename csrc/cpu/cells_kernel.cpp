#include "cpu/cells_kernel.h"

#include "cpu/units_vec.h"
#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

// Where a row of a cell's sites stands in the map: its first site, and how far the next channel and site are.
struct Place {
  int64_t start, channel, site;
};

// `line`: row of sites of the whole batch, (b * D + z) * H + y; x: the cell's column.
MAEFAST_INLINE Place place_of(const CellsArgs& a, int64_t line, int64_t x) {
  const int64_t width = a.columns * a.w;
  if (a.channels_last) return {(line * width + x * a.w) * a.channels, 1, a.channels};
  const int64_t lines = a.planes * a.d * a.rows * a.h;  // of a sample
  const int64_t plane = lines * width;
  const int64_t b = line / lines;
  return {b * a.channels * plane + (line % lines) * width + x * a.w, plane, 1};
}

// Where a row of the map's sites crosses the cells: the first one's index on the grid, and which row of a
// cell it is.
struct Line {
  int64_t first, row;
};

template <class Args>
MAEFAST_INLINE Line line_of(const Args& a, int64_t line) {
  const int64_t height = a.rows * a.h, z = line / height, y = line % height;
  return {(z / a.d * a.rows + y / a.h) * a.columns, z % a.d * a.h + y % a.h};
}

// Packed and map sites of one row of a cell, [w][C] against [C][w]. The few channels of an image are
// unrolled, so that the compiler interleaves registers; of many, a packed cache line is written or read whole
// while the map lines of its sites stay cached.
template <class X>
MAEFAST_INLINE void from_planes(const X* __restrict map, int64_t plane, X* __restrict cell, int64_t w,
                                int64_t channels) {
  if (channels == 3) {
    const X *a = map, *b = map + plane, *c = map + 2 * plane;
    for (int64_t j = 0; j < w; ++j) {
      cell[3 * j] = a[j];
      cell[3 * j + 1] = b[j];
      cell[3 * j + 2] = c[j];
    }
    return;
  }
  for (int64_t j = 0; j < w; ++j)
    for (int64_t c = 0; c < channels; ++c) cell[j * channels + c] = map[c * plane + j];
}

template <class X>
MAEFAST_INLINE void to_planes(const X* __restrict cell, X* __restrict map, int64_t plane, int64_t w,
                              int64_t channels) {
  if (channels == 3) {
    X *a = map, *b = map + plane, *c = map + 2 * plane;
    for (int64_t j = 0; j < w; ++j) {
      a[j] = cell[3 * j];
      b[j] = cell[3 * j + 1];
      c[j] = cell[3 * j + 2];
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = 0; j < w; ++j) map[c * plane + j] = cell[j * channels + c];
}

template <class X>
void pack_cells_typed(const CellsArgs& a, int64_t begin, int64_t end) {
  const X* map = static_cast<const X*>(a.in);
  const int64_t row = a.w * a.channels;
  for (int64_t r = begin; r < end; ++r) {
    X* out = static_cast<X*>(a.out) + r * row;
    const int64_t cell = a.index[r / (a.d * a.h)];
    if (cell < 0 || cell >= a.limit) {
      fail(a.failed);
      zero_row(out, row);
      continue;
    }
    const int64_t q = cell / a.columns, z = q / a.rows * a.d + r / a.h % a.d;
    const Place p = place_of(a, (z * a.rows + q % a.rows) * a.h + r % a.h, cell % a.columns);
    if (a.channels_last) {
      convert_row(map + p.start, out, row);
    } else {
      from_planes(map + p.start, p.channel, out, a.w, a.channels);
    }
  }
}

template <class X>
void unpack_cells_typed(const CellsArgs& a, int64_t begin, int64_t end) {
  const X* in = static_cast<const X*>(a.in);
  const X* fill = static_cast<const X*>(a.fill);
  X* map = static_cast<X*>(a.out);
  const int64_t row = a.w * a.channels;
  for (int64_t line = begin; line < end; ++line) {
    const Line at = line_of(a, line);
    const int32_t* slots = a.index + at.first;
    for (int64_t x = 0; x < a.columns; ++x) {
      const int64_t slot = slots[x];
      const Place p = place_of(a, line, x);
      X* out = map + p.start;
      if (slot >= a.limit) fail(a.failed);
      if (slot >= 0 && slot < a.limit) {
        const X* cell = in + (slot * a.d * a.h + at.row) * row;
        if (a.channels_last) {
          convert_row(cell, out, row);
        } else {
          to_planes(cell, out, p.channel, a.w, a.channels);
        }
      } else if (a.channels_last) {
        if (!fill) zero_row(out, row);
        for (int64_t j = 0; fill && j < a.w; ++j) convert_row(fill, out + j * p.site, a.channels);
      } else {
        for (int64_t c = 0; c < a.channels; ++c) {
          X* row_of_plane = out + c * p.channel;
          if (!fill) zero_row(row_of_plane, a.w);
          for (int64_t j = 0; fill && j < a.w; ++j) row_of_plane[j] = fill[c];
        }
      }
    }
  }
}

template <class F>
MAEFAST_INLINE void with_bytes(int64_t bytes, const F& f) {
  if (bytes == 2) return f(Type<uint16_t>{});
  if (bytes == 4) return f(Type<uint32_t>{});
  f(Type<uint64_t>{});
}

void pack_cells(const CellsArgs& a, int64_t begin, int64_t end) {
  with_bytes(a.bytes, [&](auto x) { pack_cells_typed<typename decltype(x)::type>(a, begin, end); });
}

void unpack_cells(const CellsArgs& a, int64_t begin, int64_t end) {
  with_bytes(a.bytes, [&](auto x) { unpack_cells_typed<typename decltype(x)::type>(a, begin, end); });
}

template <class G>
void fill_sum_typed(const FillSumArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<G>;
  const int64_t row = a.w * a.channels;
  for (int64_t unit = begin; unit < end; ++unit) {
    A* sum = static_cast<A*>(a.sums) + unit * a.channels;
    zero_row(sum, a.channels);
    const int64_t last = a.map_rows * (unit + 1) / a.units;
    for (int64_t line = a.map_rows * unit / a.units; line < last; ++line) {
      const int32_t* slots = a.slot + line_of(a, line).first;
      const G* grad = static_cast<const G*>(a.grad) + line * a.columns * row;
      for (int64_t x = 0; x < a.columns; ++x) {
        if (slots[x] >= 0) continue;
        const G* g = grad + x * row;
        for_lanes<A>(a.channels, [&](int64_t i, auto lanes) {
          vec<A> total = load<A>(g + i, lanes);
          for (int64_t j = 1; j < a.w; ++j) total += load<A>(g + j * a.channels + i, lanes);
          store<A>(sum + i, load<A>(sum + i, lanes) + total, lanes);
        });
      }
    }
  }
}

void fill_sum(const FillSumArgs& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto g) { fill_sum_typed<typename decltype(g)::type>(a, begin, end); });
}

}  // namespace

extern const CellsKernels cells_kernels = {pack_cells, unpack_cells, fill_sum, sum_pieces};

}  // namespace maefast::MAEFAST_ISA
