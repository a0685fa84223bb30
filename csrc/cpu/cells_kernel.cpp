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

// Three planes and their sites one behind the other, a register of sites at a time. As 3 and the number of
// lanes L have no common divisor, the elements of one plane end in L different lanes of the three registers
// of sites: one permutation of each plane, then lanes are picked.
struct Three {
  alignas(64) uint32_t to[3][kLanes<float>], from[3][kLanes<float>];  // sources of each lane, by plane
  alignas(64) int32_t picked[3][3][kLanes<float>];  // [register][plane]: -1 in the plane's lanes
};

constexpr Three three_planes() {
  Three t{};
  constexpr int lanes = kLanes<float>;
  for (int plane = 0; plane < 3; ++plane) {
    for (int s = 0; s < lanes; ++s) {
      const int at = 3 * s + plane;
      t.to[plane][at % lanes] = uint32_t(s);
      t.from[plane][s] = uint32_t(at % lanes);
      t.picked[at / lanes][plane][at % lanes] = -1;
    }
  }
  return t;
}
constexpr Three kThree = three_planes();

template <class X>
MAEFAST_INLINE vec_u32 load_bits(const X* p) {
  if constexpr (sizeof(X) == 4)
    return load_raw<vec_u32>(p);
  else
    return __builtin_convertvector(load_raw<half_u16>(p), vec_u32);
}

template <class X>
MAEFAST_INLINE void store_bits(X* p, vec_u32 v) {
  if constexpr (sizeof(X) == 4) {
    __builtin_memcpy(p, &v, sizeof v);
  } else {
    const half_u16 h = __builtin_convertvector(v, half_u16);
    __builtin_memcpy(p, &h, sizeof h);
  }
}

// Of three registers the lanes that the masks pick; those of neither mask from the last.
MAEFAST_INLINE vec_u32 pick(const vec_u32* v, const int32_t* first, const int32_t* second) {
  const vec_u32 rest = load_raw<vec_i32>(second) ? v[1] : v[2];
  return load_raw<vec_i32>(first) ? v[0] : rest;
}

// Whether registers permute their lanes; where they do not, a plain loop serves.
#if defined(__AVX2__)
template <class X>
constexpr bool kPermutes = sizeof(X) <= 4;
#else
template <class X>
constexpr bool kPermutes = false;
#endif

// Packed and map sites of one row of a cell, [w][C] against [C][w]. The three channels of an image go through
// registers; of many, a packed cache line is written or read whole while the map lines of its sites stay
// cached.
template <class X>
MAEFAST_INLINE void from_planes(const X* __restrict map, int64_t plane, X* __restrict cell, int64_t w,
                                int64_t channels) {
  int64_t j = 0;
  if constexpr (kPermutes<X>) {
    constexpr int lanes = kLanes<float>;
    for (; channels == 3 && j + lanes <= w; j += lanes) {
      vec_u32 v[3];
      for (int c = 0; c < 3; ++c)
        v[c] = __builtin_shuffle(load_bits(map + c * plane + j), load_raw<vec_u32>(kThree.to[c]));
      for (int k = 0; k < 3; ++k)
        store_bits(cell + 3 * j + k * lanes, pick(v, kThree.picked[k][0], kThree.picked[k][1]));
    }
  }
  for (; j < w; ++j)
    for (int64_t c = 0; c < channels; ++c) cell[j * channels + c] = map[c * plane + j];
}

template <class X>
MAEFAST_INLINE void to_planes(const X* __restrict cell, X* __restrict map, int64_t plane, int64_t w,
                              int64_t channels) {
  int64_t done = 0;
  if constexpr (kPermutes<X>) {
    constexpr int lanes = kLanes<float>;
    for (; channels == 3 && done + lanes <= w; done += lanes) {
      vec_u32 v[3];
      for (int k = 0; k < 3; ++k) v[k] = load_bits(cell + 3 * done + k * lanes);
      for (int c = 0; c < 3; ++c) {
        const vec_u32 plane_c = pick(v, kThree.picked[0][c], kThree.picked[1][c]);
        store_bits(map + c * plane + done, __builtin_shuffle(plane_c, load_raw<vec_u32>(kThree.from[c])));
      }
    }
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = done; j < w; ++j) map[c * plane + j] = cell[j * channels + c];
}

template <class X>
void pack_cells_typed(const CellsArgs& a, int64_t begin, int64_t end) {
  const X* map = static_cast<const X*>(a.in);
  const int64_t row = a.w * a.channels, rows = a.d * a.h;
  const int64_t step = a.columns * a.w * (a.channels_last ? a.channels : 1);  // to the next row of the map
  const int64_t next_plane = (a.rows * a.h - a.h + 1) * step;  // from a cell's last row of a plane
  for (int64_t r = begin; r < end;) {
    X* out = static_cast<X*>(a.out) + r * row;
    const int64_t cell = a.index[r / rows], first = r % rows;
    const int64_t last = rows - first < end - r ? rows : first + end - r;
    r += last - first;
    if (cell < 0 || cell >= a.limit) {
      fail(a.failed);
      zero_row(out, (last - first) * row);
      continue;
    }
    const int64_t q = cell / a.columns, z = q / a.rows * a.d + first / a.h;
    const Place p = place_of(a, (z * a.rows + q % a.rows) * a.h + first % a.h, cell % a.columns);
    const X* in = map + p.start;
    int64_t y = first % a.h;
    for (int64_t k = first; k < last; ++k, out += row) {
      if (a.channels_last) {
        convert_row(in, out, row);
      } else {
        from_planes(in, p.channel, out, a.w, a.channels);
      }
      const bool turn = ++y == a.h;
      in += turn ? next_plane : step;
      if (turn) y = 0;
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
