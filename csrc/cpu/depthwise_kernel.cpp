#include "cpu/depthwise_kernel.h"

#include "cpu/depthwise_vec.h"
#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

// ---- forward

// Calls f(c, site) for those of the NC + K - 1 inputs of NC adjacent outputs that are there. WHOLE: the
// middle NC lie in one cell, and so do the K / 2 on either side, so that three looks suffice.
template <int K, int NC, bool WHOLE, class F>
MAEFAST_INLINE void for_inputs(const int32_t* site, const F& f) {
  constexpr int P = K / 2;
  if constexpr (WHOLE) {
    const int64_t left = site[0], middle = site[P], right = site[P + NC];
    if (left >= 0) {
#pragma GCC unroll 4
      for (int c = 0; c < P; ++c) f(c, left + c);
    }
    if (middle >= 0) {
#pragma GCC unroll 8
      for (int c = 0; c < NC; ++c) f(P + c, middle + c);
    }
    if (right >= 0) {
#pragma GCC unroll 4
      for (int c = 0; c < P; ++c) f(P + NC + c, right + c);
    }
  } else {
#pragma GCC unroll 16
    for (int c = 0; c < NC + K - 1; ++c)
      if (site[c] >= 0) f(c, site[c]);
  }
}

// Calls f(j, Int<NC>, Int<WHOLE>) for the pieces of a row of w outputs.
template <int K, class F>
MAEFAST_INLINE void for_pieces(int64_t w, const F& f) {
  constexpr int64_t P = K / 2;
  const auto whole = [&](int64_t j, int64_t n) {
    return (j == 0 || j >= P) && (j + n == w || j + n + P <= w);
  };
  int64_t j = 0;
  for (; j + 8 <= w && whole(j, 8); j += 8) f(j, Int<8>{}, Int<1>{});
  for (; j + 4 <= w; j += 4) {
    if (whole(j, 4))
      f(j, Int<4>{}, Int<1>{});
    else
      f(j, Int<4>{}, Int<0>{});
  }
  for (; j < w; ++j) f(j, Int<1>{}, Int<0>{});
}

// NC adjacent outputs of one row, NV registers of channels each. `site`: of the first tap's row, `stride`
// sites a row.
template <class A, class X, int K, int NC, int NV, bool WHOLE>
MAEFAST_INLINE void row_piece(const DepthwiseArgs& a, const int32_t* site, int64_t stride, const A* taps,
                              const int64_t* start, X* y) {
  constexpr int L = kLanes<A>;
  const X* x = static_cast<const X*>(a.x);
  const A* bias = static_cast<const A*>(a.bias);
  const int64_t width = a.width, s0 = start[0], s1 = NV > 1 ? start[1] : 0;
  vec<A> acc[NC][NV];
#pragma GCC unroll 8
  for (int q = 0; q < NC; ++q)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[q][v] = bias ? load<A>(bias + start[v]) : vec<A>{};
  for (int ky = 0; ky < K; ++ky, site += stride, taps += K * NV * L) {
    vec<A> tap[K][NV];
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) tap[kx][v] = load<A>(taps + (kx * NV + v) * L);
    for_inputs<K, NC, WHOLE>(site, [&](int c, int64_t s) {
      const X* p = x + s * width;
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        const vec<A> in = load<A>(p + (v ? s1 : s0));
#pragma GCC unroll 8
        for (int q = 0; q < NC; ++q)
          if (c - q >= 0 && c - q < K) acc[q][v] = fma(in, tap[c - q][v], acc[q][v]);
      }
    });
  }
#pragma GCC unroll 8
  for (int q = 0; q < NC; ++q)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store<A>(y + q * width + start[v], acc[q][v]);
}

// Cells ahead that are fetched meanwhile: a cell's neighbours follow it within its sample, and lines this far
// apart are more than the hardware follows. Measured: 1.6x on cells of 8 x 8 sites in float32; 24 and 16 are
// no better.
constexpr int64_t kAhead = 12, kGradAhead = 8;

template <class X, int NV>
MAEFAST_INLINE void prefetch_sites(const X* x, const Group& g, int64_t width, int64_t site, int64_t count) {
  x += site * width;
  for (int64_t i = 0; i < count; ++i, x += width)
    for (int v = 0; v < NV; ++v) __builtin_prefetch(x + g.start[v], 0, 2);
}

template <class A, class X, int K, int NV>
void forward_rows(const DepthwiseArgs& a, const Group& g, int64_t first, int64_t last) {
  constexpr int L = kLanes<A>;
  constexpr int P = K / 2;
  const int64_t wide = a.w + 2 * P;
  const A* taps = static_cast<const A*>(a.taps) + g.block * K * K * L;
  for (int64_t t = first; t < last; ++t) {
    const int32_t* table = a.table + t * (a.h + 2 * P) * wide;
    for (int64_t i = 0; i < a.h; ++i) {
      const int32_t* site = table + i * wide;
      X* y = static_cast<X*>(a.y) + (t * a.h + i) * a.w * a.width;
      if (t + kAhead < a.cells)
        prefetch_sites<X, NV>(static_cast<const X*>(a.x), g, a.width, ((t + kAhead) * a.h + i) * a.w, a.w);
      for_pieces<K>(a.w, [&](int64_t j, auto count, auto whole) {
        constexpr int NC = decltype(count)::value, WHOLE = decltype(whole)::value;
        row_piece<A, X, K, NC, NV, WHOLE>(a, site + j, wide, taps, g.start, y + j * a.width);
      });
    }
  }
}

// Small cells: N x N outputs from the list of the sites that are there, with taps in a border of zeros.
template <class A, class X, int K, int N, int NV>
void forward_list(const DepthwiseArgs& a, const Group& g, int64_t first, int64_t last) {
  constexpr int L = kLanes<A>;
  using S = ListShape<K, N>;
  const X* x = static_cast<const X*>(a.x);
  const A* bias = static_cast<const A*>(a.bias);
  const A* taps = static_cast<const A*>(a.taps) + g.block * S::taps * L;
  const int64_t down = a.h / N, across = a.w / N;
  for (int64_t tile = first * down * across; tile < last * down * across; ++tile) {
    const int32_t* list = a.table + tile * S::row;
    const int32_t count = *list++;
    vec<A> acc[N * N][NV];
    for (int v = 0; v < NV; ++v) {
      const vec<A> b = bias ? load<A>(bias + g.start[v]) : vec<A>{};
#pragma GCC unroll 4
      for (int q = 0; q < N * N; ++q) acc[q][v] = b;
    }
    for (int32_t e = 0; e < count; ++e, list += 2) {
      const X* p = x + int64_t(list[0]) * a.width;
      const A* tap = taps + int64_t(list[1]) * NV * L;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const vec<A> in = load<A>(p + g.start[v]);
#pragma GCC unroll 4
        for (int q = 0; q < N * N; ++q)
          acc[q][v] = fma(in, load<A>(tap + (v - (q / N * S::side + q % N) * NV) * L), acc[q][v]);
      }
    }
    const int64_t t = tile / (down * across), i = tile / across % down * N, j = tile % across * N;
    X* y = static_cast<X*>(a.y) + ((t * a.h + i) * a.w + j) * a.width;
#pragma GCC unroll 4
    for (int q = 0; q < N * N; ++q)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store<A>(y + (q / N * a.w + q % N) * a.width + g.start[v], acc[q][v]);
  }
}

// Items: chunk of cells x group of channels, the groups of a chunk one after another.
void forward(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  with_level(a, [&](auto type, auto size, auto tile) {
    using X = typename decltype(type)::type;
    using A = acc_t<X>;
    constexpr int K = decltype(size)::value, N = decltype(tile)::value;
    const Groups groups(blocks_of<A>(a), most_blocks(N));
    const int64_t chunk = chunk_of(a);
    for (int64_t u = begin; u < end; ++u) {
      const int64_t first = u / groups.count * chunk;
      const int64_t last = first + chunk < a.cells ? first + chunk : a.cells;
      const Group g = groups.at<A>(u % groups.count, a.width);
      if constexpr (N == 0) {
        if (g.blocks == 2)
          forward_rows<A, X, K, 2>(a, g, first, last);
        else
          forward_rows<A, X, K, 1>(a, g, first, last);
      } else {
        if (g.blocks == 4)
          forward_list<A, X, K, N, 4>(a, g, first, last);
        else if (g.blocks == 2)
          forward_list<A, X, K, N, 2>(a, g, first, last);
        else
          forward_list<A, X, K, N, 1>(a, g, first, last);
      }
    }
  });
}

// ---- gradient of the weight

// Row ky of taps, for NC adjacent outputs of every row of the cells [first, last): sums stay in registers.
// `grad`: [sites of these cells, NV, L] in the arithmetic type.
template <class A, class X, int K, int NC, int NV, bool WHOLE>
MAEFAST_INLINE void grad_row(const DepthwiseArgs& a, const Group& g, int64_t first, int64_t last, int64_t j,
                             int ky, const A* grad, A* sums) {
  constexpr int L = kLanes<A>;
  constexpr int P = K / 2;
  const int64_t wide = a.w + 2 * P;
  const X* x = static_cast<const X*>(a.x);
  const int64_t width = a.width, s0 = g.start[0], s1 = g.start[1];
  vec<A> acc[K][NV];
  sums += ky * K * NV * L;
#pragma GCC unroll 8
  for (int kx = 0; kx < K; ++kx)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[kx][v] = load<A>(sums + (kx * NV + v) * L);
  for (int64_t t = first; t < last; ++t) {
    const int32_t* site = a.table + (t * (a.h + 2 * P) + ky) * wide + j;
    const A* here = grad + ((t - first) * a.h * a.w + j) * NV * L;
    for (int64_t i = 0; i < a.h; ++i, site += wide, here += a.w * NV * L) {
      for_inputs<K, NC, WHOLE>(site, [&](int c, int64_t s) {
        const X* p = x + s * width;
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
          const vec<A> in = load<A>(p + (v ? s1 : s0));
#pragma GCC unroll 8
          for (int kx = 0; kx < K; ++kx)
            if (c - kx >= 0 && c - kx < NC)
              acc[kx][v] = fma(in, load<A>(here + ((c - kx) * NV + v) * L), acc[kx][v]);
        }
      });
    }
  }
#pragma GCC unroll 8
  for (int kx = 0; kx < K; ++kx)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store<A>(sums + (kx * NV + v) * L, acc[kx][v]);
}

// Copies the gradient of sites [first, last) for this group, and adds it up.
template <class A, class X, int NV>
void grad_tile(const DepthwiseArgs& a, const Group& g, int64_t first, int64_t last, A* tile, A* sum) {
  constexpr int L = kLanes<A>;
  const int64_t ahead = kGradAhead * a.h * a.w;
  vec<A> acc[NV];
  for (int v = 0; v < NV; ++v) acc[v] = load<A>(sum + v * L);
  for (int64_t s = first; s < last; ++s, tile += NV * L)
    for (int v = 0; v < NV; ++v) {
      const vec<A> value = load<A>(static_cast<const X*>(a.grad) + s * a.width + g.start[v]);
      store<A>(tile + v * L, value);
      acc[v] += value;
      if (s + ahead < a.cells * a.h * a.w) {
        __builtin_prefetch(static_cast<const X*>(a.grad) + (s + ahead) * a.width + g.start[v], 0, 2);
        __builtin_prefetch(static_cast<const X*>(a.x) + (s + ahead) * a.width + g.start[v], 0, 2);
      }
    }
  for (int v = 0; v < NV; ++v) store<A>(sum + v * L, acc[v]);
}

template <class A, class X, int K, int NV>
void grad_rows(const DepthwiseArgs& a, const Group& g, int64_t first, int64_t last, A* tile, A* sums) {
  const int64_t chunk = chunk_of(a), sites = a.h * a.w;
  for (int64_t t = first; t < last; t += chunk) {
    const int64_t to = t + chunk < last ? t + chunk : last;
    grad_tile<A, X, NV>(a, g, t * sites, to * sites, tile, sums + K * K * NV * kLanes<A>);
    for (int ky = 0; ky < K; ++ky) {
      for_pieces<K>(a.w, [&](int64_t j, auto count, auto whole) {
        constexpr int NC = decltype(count)::value, WHOLE = decltype(whole)::value;
        grad_row<A, X, K, NC, NV, WHOLE>(a, g, t, to, j, ky, tile, sums);
      });
    }
  }
}

template <class A, class X, int K, int N, int NV>
void grad_list(const DepthwiseArgs& a, const Group& g, int64_t first, int64_t last, A* sums) {
  constexpr int L = kLanes<A>;
  using S = ListShape<K, N>;
  const X* x = static_cast<const X*>(a.x);
  const int64_t down = a.h / N, across = a.w / N;
  vec<A> total[NV] = {};
  for (int64_t tile = first * down * across; tile < last * down * across; ++tile) {
    const int64_t t = tile / (down * across), i = tile / across % down * N, j = tile % across * N;
    const X* here = static_cast<const X*>(a.grad) + ((t * a.h + i) * a.w + j) * a.width;
    vec<A> grad[N * N][NV];
#pragma GCC unroll 4
    for (int q = 0; q < N * N; ++q)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        grad[q][v] = load<A>(here + (q / N * a.w + q % N) * a.width + g.start[v]);
        total[v] += grad[q][v];
      }
    const int32_t* list = a.table + tile * S::row;
    const int32_t count = *list++;
    for (int32_t e = 0; e < count; ++e, list += 2) {
      const X* p = x + int64_t(list[0]) * a.width;
      A* sum = sums + int64_t(list[1]) * NV * L;
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        const vec<A> in = load<A>(p + g.start[v]);
#pragma GCC unroll 4
        for (int q = 0; q < N * N; ++q) {
          A* at = sum + (v - (q / N * S::side + q % N) * NV) * L;
          store<A>(at, fma(in, grad[q][v], load<A>(at)));
        }
      }
    }
  }
  A* sum = sums + S::taps * NV * L;
  for (int v = 0; v < NV; ++v) store<A>(sum + v * L, total[v]);
}

// Sums of one piece: from [taps with border + 1, NV, L] to [blocks, k * k + 1, L].
template <class A, int K, int N>
void keep_sums(const DepthwiseArgs& a, const Group& g, int64_t piece, const A* sums) {
  constexpr int L = kLanes<A>, border = N > 1 ? N - 1 : 0;
  using S = ListShape<K, N>;
  for (int v = 0; v < g.blocks; ++v) {
    A* out = static_cast<A*>(a.sums) + (piece * blocks_of<A>(a) + g.block + v) * (K * K + 1) * L;
    for (int tap = 0; tap <= K * K; ++tap) {
      const int from = tap == K * K ? S::taps : (tap / K + border) * S::side + tap % K + border;
      store<A>(out + tap * L, load<A>(sums + (from * g.blocks + v) * L));
    }
  }
}

// Items: piece of the cells x group of channels.
void grad_weight(const DepthwiseArgs& a, int64_t begin, int64_t end, void* work) {
  with_level(a, [&](auto type, auto size, auto tile) {
    using X = typename decltype(type)::type;
    using A = acc_t<X>;
    constexpr int K = decltype(size)::value, N = decltype(tile)::value, L = kLanes<A>;
    constexpr int64_t count = (ListShape<K, N>::taps + 1) * 2 * L;
    const Groups groups(blocks_of<A>(a), 2);
    A* sums = static_cast<A*>(work);
    for (int64_t u = begin; u < end; ++u) {
      const int64_t piece = u / groups.count;
      const int64_t first = a.cells * piece / a.pieces, last = a.cells * (piece + 1) / a.pieces;
      const Group g = groups.at<A>(u % groups.count, a.width);
      zero_row(sums, count);
      if constexpr (N == 0) {
        if (g.blocks == 2)
          grad_rows<A, X, K, 2>(a, g, first, last, sums + count, sums);
        else
          grad_rows<A, X, K, 1>(a, g, first, last, sums + count, sums);
      } else {
        if (g.blocks == 2)
          grad_list<A, X, K, N, 2>(a, g, first, last, sums);
        else
          grad_list<A, X, K, N, 1>(a, g, first, last, sums);
      }
      keep_sums<A, K, N>(a, g, piece, sums);
    }
  });
}

// Items: taps, then the bias. Pieces are added in order.
void grad_weight_finish(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  const auto typed = [&](auto type) {
    using A = typename decltype(type)::type;
    constexpr int L = kLanes<A>;
    const int64_t taps = a.size * a.size, blocks = blocks_of<A>(a);
    for (int64_t tap = begin; tap < end; ++tap) {
      A* out = tap < taps ? static_cast<A*>(a.grad_weight) + tap * a.width : static_cast<A*>(a.grad_bias);
      for (int64_t b = 0; b < blocks; ++b) {
        const A* sums = static_cast<const A*>(a.sums) + (b * (taps + 1) + tap) * L;
        vec<A> sum = load<A>(sums);
        for (int64_t p = 1; p < a.pieces; ++p) sum += load<A>(sums + p * blocks * (taps + 1) * L);
        store<A>(out + (b * L + L <= a.width ? b * L : a.width - L), sum);
      }
    }
  };
  if (a.type == DType::f64) return typed(Type<double>{});
  typed(Type<float>{});
}

DepthwisePlan plan(const DepthwiseArgs& a) {
  DepthwisePlan p{};
  with_level(a, [&](auto type, auto size, auto tile) {
    using A = acc_t<typename decltype(type)::type>;
    constexpr int K = decltype(size)::value, N = decltype(tile)::value, L = kLanes<A>;
    using S = ListShape<K, N>;
    p.lanes = L;
    p.blocks = blocks_of<A>(a);
    p.groups = Groups(p.blocks, most_blocks(N)).count;
    p.grad_groups = Groups(p.blocks, 2).count;
    p.chunk = chunk_of(a);
    if constexpr (N == 0)
      p.table_row = (a.h + K - 1) * (a.w + K - 1);
    else
      p.table_row = (a.h / N) * (a.w / N) * S::row;
    p.taps = S::taps * p.blocks * L;
    p.work = ((S::taps + 1) * 2 * L + (N == 0 ? p.chunk * a.h * a.w * 2 * L : 0)) * int64_t(sizeof(A));
  });
  return p;
}

}  // namespace

extern const DepthwiseKernels depthwise_kernels = {plan,    sites,       pack,
                                                   forward, grad_weight, grad_weight_finish};

}  // namespace maefast::MAEFAST_ISA
