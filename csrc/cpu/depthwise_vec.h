// What the depthwise kernels share: groups of channels, which sites a cell reads, taps in the order they are
// read.
#pragma once

#include "cpu/depthwise_kernel.h"
#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

template <int n>
struct Int {
  static constexpr int value = n;
};

// Outputs are made N x N at a time from lists of sites where cells are small (N = 2 or 1), else row by row (N
// = 0).
MAEFAST_INLINE int tile_of(const DepthwiseArgs& a) {
  if (a.w >= 4) return 0;
  return a.h % 2 == 0 && a.w % 2 == 0 ? 2 : 1;
}

// Blocks of channels that the forward pass works on together.
constexpr int most_blocks(int tile) {
  return tile == 0 ? 2 : 4;
}

// Cells of one item: about 64 sites.
MAEFAST_INLINE int64_t chunk_of(const DepthwiseArgs& a) {
  const int64_t sites = a.h * a.w;
  return sites >= 64 ? 1 : 64 / sites;
}

template <class A>
MAEFAST_INLINE int64_t blocks_of(const DepthwiseArgs& a) {
  return (a.width + kLanes<A> - 1) / kLanes<A>;
}

struct Group {
  int64_t block;     // the first one
  int blocks;        // 1, 2 or 4
  int64_t start[4];  // first channel of each
};

struct Groups {
  int64_t blocks, most, count;
  MAEFAST_INLINE Groups(int64_t blocks_, int64_t most_)
      : blocks(blocks_), most(most_), count(blocks_ / most_) {
    const int64_t rest = blocks % most;
    count += (rest & 1) + (rest >> 1);
  }

  // The rest comes first: 1, then 2, then groups of `most`.
  template <class A>
  MAEFAST_INLINE Group at(int64_t index, int64_t width) const {
    Group g{};
    const int64_t rest = blocks % most, small = (rest & 1) + (rest >> 1);
    if (index >= small) {
      g.block = rest + (index - small) * most;
      g.blocks = int(most);
    } else if (index == 0 && (rest & 1)) {
      g.block = 0;
      g.blocks = 1;
    } else {
      g.block = rest & 1;
      g.blocks = 2;
    }
    for (int v = 0; v < g.blocks; ++v) {
      const int64_t start = (g.block + v) * kLanes<A>;
      g.start[v] = start + kLanes<A> <= width ? start : width - kLanes<A>;
    }
    return g;
  }
};

// A list of sites that feed N x N outputs: {count, (site, tap) ...}; tap is the place, in taps with a border
// of N - 1 zeros, that meets the first output; output (o, q) meets the one o rows and q columns before.
template <int K, int N>
struct ListShape {
  static constexpr int reach = K + N - 1;       // sites read, a side
  static constexpr int side = K + 2 * (N - 1);  // taps with their border
  static constexpr int taps = side * side;
  static constexpr int row = 1 + 2 * reach * reach;  // int32 values of a list
};
template <int K>
struct ListShape<K, 0> {
  static constexpr int side = K, taps = K * K, row = 0;
};

// Calls f with Type<X>, Int<k> and Int<tile>.
template <class F>
MAEFAST_INLINE void with_size(const DepthwiseArgs& a, const F& f) {
  const auto sized = [&](auto size) {
    const int tile = tile_of(a);
    if (tile == 0) return f(size, Int<0>{});
    if (tile == 2) return f(size, Int<2>{});
    f(size, Int<1>{});
  };
  if (a.size == 3) return sized(Int<3>{});
  if (a.size == 5) return sized(Int<5>{});
  sized(Int<7>{});
}

template <class F>
MAEFAST_INLINE void with_level(const DepthwiseArgs& a, const F& f) {
  with_type(a.type, [&](auto type) { with_size(a, [&](auto size, auto tile) { f(type, size, tile); }); });
}

// The packed index of the neighbour (cy, cx) of cell t, negative where it is absent.
MAEFAST_INLINE int64_t neighbour(const DepthwiseArgs& a, int64_t t, int64_t cy, int64_t cx) {
  const int64_t side = 2 * a.radius + 1;
  const int32_t n = a.neighbours[(t * side + cy + a.radius) * side + cx + a.radius];
  if (n >= a.cells) {
    fail(a.failed);
    return -1;
  }
  return n;
}

// table [T, h + k - 1, w + k - 1]: the site (its row in [T*h*w, C]) that each place of a cell's halo reads,
// or -1.
template <int K>
void sites_of_rows(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t P = K / 2;
  const int64_t wide = a.w + 2 * P, high = a.h + 2 * P;
  for (int64_t t = begin; t < end; ++t) {
    int32_t* out = a.table + t * high * wide;
    for (int64_t cy = -a.radius; cy <= a.radius; ++cy)
      for (int64_t cx = -a.radius; cx <= a.radius; ++cx) {
        const int64_t y0 = cy * a.h + P, x0 = cx * a.w + P;  // where this cell starts in the halo
        const int64_t r0 = y0 < 0 ? 0 : y0, r1 = y0 + a.h < high ? y0 + a.h : high;
        const int64_t c0 = x0 < 0 ? 0 : x0, c1 = x0 + a.w < wide ? x0 + a.w : wide;
        const int64_t n = neighbour(a, t, cy, cx);
        for (int64_t r = r0; r < r1; ++r) {
          const int64_t site = (n * a.h + r - y0) * a.w - x0;
          for (int64_t c = c0; c < c1; ++c) out[r * wide + c] = int32_t(n < 0 ? -1 : site + c);
        }
      }
  }
}

// table [tiles of all cells, ListShape::row].
template <int K, int N>
void sites_of_lists(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  using S = ListShape<K, N>;
  constexpr int64_t P = K / 2;
  int32_t* list = a.table + begin * (a.h / N) * (a.w / N) * S::row;
  for (int64_t t = begin; t < end; ++t)
    for (int64_t i = 0; i < a.h; i += N)
      for (int64_t j = 0; j < a.w; j += N, list += S::row) {
        int32_t* out = list + 1;
        int64_t y = i - P + a.radius * a.h, cy = y / a.h - a.radius, ii = y % a.h;
        for (int r = 0; r < S::reach; ++r) {
          int64_t x = j - P + a.radius * a.w, cx = x / a.w - a.radius, jj = x % a.w;
          for (int c = 0; c < S::reach; ++c) {
            const int64_t n = neighbour(a, t, cy, cx);
            out[0] = int32_t((n * a.h + ii) * a.w + jj);
            out[1] = (r + N - 1) * S::side + c + N - 1;
            out += n < 0 ? 0 : 2;
            if (++jj == a.w) jj = 0, ++cx;
          }
          if (++ii == a.h) ii = 0, ++cy;
        }
        list[0] = int32_t((out - list - 1) / 2);
      }
}

void sites(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  with_size(a, [&](auto size, auto tile) {
    constexpr int K = decltype(size)::value, N = decltype(tile)::value;
    if constexpr (N == 0)
      sites_of_rows<K>(a, begin, end);
    else
      sites_of_lists<K, N>(a, begin, end);
  });
}

// taps: group after group [taps with border, blocks of the group, L], so that a kernel reads them in order.
void pack(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  with_level(a, [&](auto type, auto size, auto tile) {
    using A = acc_t<typename decltype(type)::type>;
    constexpr int K = decltype(size)::value, N = decltype(tile)::value, L = kLanes<A>;
    using S = ListShape<K, N>;
    constexpr int border = N > 1 ? N - 1 : 0;
    const Groups groups(blocks_of<A>(a), most_blocks(N));
    for (int64_t index = begin; index < end; ++index) {
      const Group g = groups.at<A>(index, a.width);
      A* out = static_cast<A*>(a.taps) + g.block * S::taps * L;
      zero_row(out, int64_t(S::taps) * g.blocks * L);
      for (int tap = 0; tap < K * K; ++tap) {
        const int from = a.flip ? K * K - 1 - tap : tap;
        const int to = (tap / K + border) * S::side + tap % K + border;
        for (int v = 0; v < g.blocks; ++v)
          store<A>(out + (to * g.blocks + v) * L,
                   load<A>(static_cast<const A*>(a.weight) + from * a.width + g.start[v]));
      }
    }
  });
}

}  // namespace
}  // namespace maefast::MAEFAST_ISA
