#include "cpu/cell_norm_kernel.h"

#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

constexpr int64_t kTile = 1024;  // columns whose sums stay in the first-level cache
constexpr int64_t kBlock = 128;  // rows summed in the arithmetic type before they go into doubles
constexpr int kRows = 4;         // rows whose columns are handled together where they stand apart in memory
// Tables of a tile lie so far apart that places of one never have the lower 12 address bits of what was just
// stored in another, which processors may take for the same. On an AMD EPYC of family 25 it made no
// difference.
constexpr int64_t kTable = kTile + 352;

// Rows of few channels leave lanes empty: `fold` consecutive rows are then handled as one, of `width`
// elements.
struct Fold {
  int64_t fold, width;
};

template <class A>
MAEFAST_INLINE Fold fold_of(int64_t channels) {
  int64_t fold = 1;
  while (fold * channels % kLanes<A> != 0) fold *= 2;
  return fold * channels <= kTile ? Fold{fold, fold * channels} : Fold{1, channels};
}

// A table [C] repeated for each row of a fold, or the table itself.
template <class A>
MAEFAST_INLINE const A* repeat(const A* table, int64_t channels, Fold f, A* room) {
  if (f.fold == 1) return table;
  for (int64_t k = 0; k < f.fold; ++k)
    for (int64_t c = 0; c < channels; ++c) room[k * channels + c] = table[c];
  return room;
}

// Calls f(row, group) for rows that lie one behind the other one by one (Full<1>): the processor reads ahead
// in one stream, where four side by side took twice as long. Of rows `apart` (column tiles of wider ones),
// which are no such stream, kRows share a load of the sums (Full<kRows>).
template <class F>
MAEFAST_INLINE void for_rows(int64_t begin, int64_t end, bool apart, const F& f) {
  int64_t r = begin;
  if (apart)
    for (; r + kRows <= end; r += kRows) f(r, Full<kRows>{});
  for (; r < end; ++r) f(r, Full<1>{});
}

// Calls f(segment, first, last) for the parts of [begin, end) in each segment.
template <class F>
MAEFAST_INLINE void for_segments(const Segments& s, int64_t begin, int64_t end, const F& f) {
  for (int64_t b = 0; b < s.count; ++b) {
    const RowRange rows = segment_rows(s, b);
    const int64_t first = rows.first > begin ? rows.first : begin;
    const int64_t last = rows.last < end ? rows.last : end;
    if (first < last) f(b, first, last);
  }
}

// ---- statistics

// Mean and sum of squared deviations of columns [0, width) of n rows that stand `stride` apart. Each block is
// summed relative to the median of three of its rows, so that a mean far from zero costs no digits, nor an
// outlier.
template <class A, class X>
void column_stats(const X* x, int64_t n, int64_t stride, int64_t width, double* mean, double* m2) {
  alignas(64) A pivot[kTable], sum[kTable], square[kTable];
  for (int64_t i = 0; i < width; ++i) mean[i] = m2[i] = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = n - start < kBlock ? n - start : kBlock;
    const X* rows = x + start * stride;
    for_lanes<A>(width, [&](int64_t i, auto lanes) {
      const vec<A> a = load<A>(rows + i, lanes), b = load<A>(rows + count / 2 * stride + i, lanes);
      const vec<A> c = load<A>(rows + (count - 1) * stride + i, lanes);
      const vec<A> low = a < b ? a : b, high = a < b ? b : a;
      const vec<A> rest = high < c ? high : c;
      store<A>(pivot + i, low > rest ? low : rest);
      store<A>(sum + i, vec<A>{});
      store<A>(square + i, vec<A>{});
    });
    for_rows(0, count, width < stride, [&](int64_t r, auto group) {
      for_lanes<A>(width, [&](int64_t i, auto lanes) {
        vec<A> s = load<A>(sum + i), q = load<A>(square + i);
        const vec<A> p = load<A>(pivot + i);
        for (int k = 0; k < group.n; ++k) {
          const vec<A> d = load<A>(rows + (r + k) * stride + i, lanes) - p;
          s += d;
          q += d * d;
        }
        store<A>(sum + i, s);
        store<A>(square + i, q);
      });
    });
    const double total = double(start + count), share = double(count) / total, inverse = 1.0 / double(count);
    for (int64_t i = 0; i < width; ++i) {
      const double s = sum[i];
      const double delta = double(pivot[i]) + s * inverse - mean[i];
      mean[i] += delta * share;
      m2[i] += double(square[i]) - s * s * inverse + delta * delta * share * double(start);
    }
  }
}

template <class X>
void stats_typed(const SegmentStatsArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<X>;
  const int64_t channels = a.width;
  const Fold f = fold_of<A>(channels);
  alignas(64) double mean[kTile], m2[kTile];
  for (int64_t unit = begin; unit < end; ++unit) {
    const RowRange range = unit_rows(a.segments, unit);
    const int64_t n = range.last - range.first;
    const X* x = static_cast<const X*>(a.x) + range.first * channels;
    double* out_mean = a.pieces + unit * 2 * channels;
    double* out_m2 = out_mean + channels;
    if (f.fold == 1) {
      for (int64_t c = 0; c < channels; c += kTile) {
        const int64_t width = channels - c < kTile ? channels - c : kTile;
        column_stats<A>(x + c, n, channels, width, out_mean + c, out_m2 + c);
      }
      continue;
    }
    const int64_t whole = n / f.fold, left = n % f.fold;
    column_stats<A>(x, whole, f.width, f.width, mean, m2);
    const X* rest = x + whole * f.width;
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0, square = 0;
      for (int64_t k = 0; k < f.fold; ++k) sum += mean[k * channels + c] * double(whole);
      for (int64_t k = 0; k < left; ++k) sum += double(load<A>(rest + k * channels + c, 1)[0]);
      const double average = n ? sum / double(n) : 0;
      for (int64_t k = 0; k < f.fold; ++k) {
        const double delta = mean[k * channels + c] - average;
        square += m2[k * channels + c] + delta * delta * double(whole);
      }
      for (int64_t k = 0; k < left; ++k) {
        const double delta = double(load<A>(rest + k * channels + c, 1)[0]) - average;
        square += delta * delta;
      }
      out_mean[c] = average;
      out_m2[c] = square;
    }
  }
}

template <class A>
void stats_total_typed(const SegmentStatsArgs& a, int64_t begin, int64_t end) {
  const Segments& s = a.segments;
  for (int64_t b = 0; b < s.count; ++b) {
    const RowRange all = segment_rows(s, b);
    const double n = double(all.last - all.first), inverse = n > 0 ? 1.0 / n : 0.0;
    A* mean = static_cast<A*>(a.mean) + b * a.width;
    A* var = static_cast<A*>(a.var) + b * a.width;
    const double* pieces = a.pieces + b * s.pieces * 2 * a.width;
    double average[64], square[64];
    for (int64_t c = begin; c < end; c += 64) {
      const int64_t width = end - c < 64 ? end - c : 64;
      for (int64_t i = 0; i < width; ++i) average[i] = square[i] = 0;
      for (int64_t p = 0; p < s.pieces; ++p) {
        const RowRange rows = unit_rows(s, b * s.pieces + p);
        const double share = double(rows.last - rows.first) * inverse;
        const double* piece = pieces + p * 2 * a.width + c;
        for (int64_t i = 0; i < width; ++i) average[i] += piece[i] * share;
      }
      for (int64_t p = 0; p < s.pieces; ++p) {
        const RowRange rows = unit_rows(s, b * s.pieces + p);
        const double count = double(rows.last - rows.first);
        const double* piece = pieces + p * 2 * a.width + c;
        for (int64_t i = 0; i < width; ++i) {
          const double delta = piece[i] - average[i];
          square[i] += piece[a.width + i] + delta * delta * count;
        }
      }
      for (int64_t i = 0; i < width; ++i) {
        mean[c + i] = A(average[i]);
        var[c + i] = A(square[i] > 0 ? square[i] * inverse : 0.0 * square[i]);  // NaN stays NaN
      }
    }
  }
}

// ---- forward

template <Act act, class A>
MAEFAST_INLINE vec<A> activate(vec<A> z) {  // lets NaN through, as torch does
  const vec<A> zero{}, six = splat<A>(6);
  if constexpr (act != Act::none) z = z < zero ? zero : z;
  if constexpr (act == Act::relu6) z = z > six ? six : z;
  return z;
}

template <Act act, class A>
MAEFAST_INLINE vec<A> gated(vec<A> g, vec<A> z) {
  const vec<A> zero{}, six = splat<A>(6);
  if constexpr (act != Act::none) g = z > zero ? g : zero;
  if constexpr (act == Act::relu6) g = z < six ? g : zero;
  return g;
}

// Rows [first, last) of one segment as `whole` rows of a fold and what is left of one.
struct FoldedRows {
  int64_t whole, left;
  FoldedRows(int64_t rows, int64_t channels, Fold f) : whole(rows / f.fold), left(rows % f.fold * channels) {}
};

template <Act act, bool add, class X>
void norm_act_typed(const NormActArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<X>;
  const int64_t channels = a.width;
  const Fold f = fold_of<A>(channels);
  alignas(64) A room[3][kTile];
  for_segments(a.segments, begin, end, [&](int64_t b, int64_t first, int64_t last) {
    const A* mean = repeat(static_cast<const A*>(a.mean) + b * channels, channels, f, room[0]);
    const A* scale = repeat(static_cast<const A*>(a.scale) + b * channels, channels, f, room[1]);
    const A* bias = repeat(static_cast<const A*>(a.bias), channels, f, room[2]);
    const X* x = static_cast<const X*>(a.x) + first * channels;
    const X* residual = add ? static_cast<const X*>(a.residual) + first * channels : nullptr;
    X* y = static_cast<X*>(a.y) + first * channels;
    const auto row = [&](int64_t r, int64_t width) {
      for_lanes<A>(width, [&](int64_t i, auto lanes) {
        const vec<A> m = load<A>(mean + i, lanes), w = load<A>(scale + i, lanes),
                     s = load<A>(bias + i, lanes);
        const int64_t at = r * f.width + i;
        vec<A> z = (load<A>(x + at, lanes) - m) * w + s;
        if constexpr (add) z += load<A>(residual + at, lanes);
        store<A>(y + at, activate<act, A>(z), lanes);
      });
    };
    const FoldedRows n(last - first, channels, f);
    for (int64_t r = 0; r < n.whole; ++r) row(r, f.width);
    if (n.left) row(n.whole, n.left);
  });
}

// ---- backward

// Sums of the gradient g behind the activation, and of g * (x - mean), over columns [0, width) of n rows that
// stand `stride` apart; `at` is the first row's offset.
template <Act act, bool gate, class X>
void column_sums(const NormActSumsArgs& a, int64_t at, int64_t n, int64_t stride, int64_t width,
                 const acc_t<X>* mean, const acc_t<X>* scale, const acc_t<X>* bias, double* totals,
                 double* products) {
  using A = acc_t<X>;
  const X* grad = static_cast<const X*>(a.grad) + at;
  const X* x = static_cast<const X*>(a.x) + at;
  const X* other = gate ? static_cast<const X*>(a.gate) + at : nullptr;
  X* passed = gate ? static_cast<X*>(a.passed) + at : nullptr;
  alignas(64) A sum[kTable], product[kTable];
  for (int64_t i = 0; i < width; ++i) totals[i] = products[i] = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = n - start < kBlock ? n - start : kBlock;
    for_lanes<A>(width, [&](int64_t i, auto) {
      store<A>(sum + i, vec<A>{});
      store<A>(product + i, vec<A>{});
    });
    for_rows(start, start + count, width < stride, [&](int64_t r, auto group) {
      for_lanes<A>(width, [&](int64_t i, auto lanes) {
        vec<A> s = load<A>(sum + i), p = load<A>(product + i);
        const vec<A> m = load<A>(mean + i, lanes);
        vec<A> w{}, shift{};
        if constexpr (act != Act::none && !(gate && act == Act::relu)) {
          w = load<A>(scale + i, lanes);
          shift = load<A>(bias + i, lanes);
        }
        for (int k = 0; k < group.n; ++k) {
          const int64_t to = (r + k) * stride + i;
          vec<A> g = load<A>(grad + to, lanes);  // zero in missing lanes
          const vec<A> centred = load<A>(x + to, lanes) - m;
          if constexpr (gate && act == Act::relu) {
            g = gated<act, A>(g, load<A>(other + to, lanes));
          } else if constexpr (act != Act::none) {
            vec<A> z = centred * w + shift;
            if constexpr (gate) z += load<A>(other + to, lanes);
            g = gated<act, A>(g, z);
          }
          if constexpr (gate) store<A>(passed + to, g, lanes);
          s += g;
          p += g * centred;
        }
        store<A>(sum + i, s);
        store<A>(product + i, p);
      });
    });
    for (int64_t i = 0; i < width; ++i) {
      totals[i] += double(sum[i]);
      products[i] += double(product[i]);
    }
  }
}

template <Act act, bool gate, class X>
void sums_typed(const NormActSumsArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<X>;
  const int64_t channels = a.width;
  const Fold f = fold_of<A>(channels);
  alignas(64) A room[3][kTile];
  alignas(64) double totals[kTile], products[kTile];
  for (int64_t unit = begin; unit < end; ++unit) {
    const RowRange range = unit_rows(a.segments, unit);
    const int64_t n = range.last - range.first, at = range.first * channels;
    const int64_t table = unit / a.segments.pieces * channels;
    const A* mean = repeat(static_cast<const A*>(a.mean) + table, channels, f, room[0]);
    const A* scale = repeat(static_cast<const A*>(a.scale) + table, channels, f, room[1]);
    const A* bias = repeat(static_cast<const A*>(a.bias), channels, f, room[2]);
    double* out = a.pieces + unit * 2 * channels;
    if (f.fold == 1) {
      for (int64_t c = 0; c < channels; c += kTile) {
        const int64_t width = channels - c < kTile ? channels - c : kTile;
        column_sums<act, gate, X>(a, at + c, n, channels, width, mean + c, scale + c, bias + c, out + c,
                                  out + channels + c);
      }
      continue;
    }
    for (int64_t c = 0; c < 2 * channels; ++c) out[c] = 0;
    const auto add = [&](int64_t rows) {
      for (int64_t k = 0; k < rows; ++k)
        for (int64_t c = 0; c < channels; ++c) {
          out[c] += totals[k * channels + c];
          out[channels + c] += products[k * channels + c];
        }
    };
    const FoldedRows rows(n, channels, f);
    column_sums<act, gate, X>(a, at, rows.whole, f.width, f.width, mean, scale, bias, totals, products);
    add(f.fold);
    if (rows.left) {
      column_sums<act, gate, X>(a, at + rows.whole * f.width, 1, f.width, rows.left, mean, scale, bias,
                                totals, products);
      add(rows.left / channels);
    }
  }
}

template <class A>
void sums_total_typed(const NormActSumsArgs& a, int64_t begin, int64_t end) {
  const Segments& s = a.segments;
  for (int64_t b = 0; b < s.count; ++b) {
    for (int64_t half = 0; half < 2; ++half) {
      A* out = static_cast<A*>(a.sums) + (half * s.count + b) * a.width;
      double total[64];
      for (int64_t c = begin; c < end; c += 64) {
        const int64_t width = end - c < 64 ? end - c : 64;
        for (int64_t i = 0; i < width; ++i) total[i] = 0;
        for (int64_t p = 0; p < s.pieces; ++p) {
          const double* piece = a.pieces + ((b * s.pieces + p) * 2 + half) * a.width + c;
          for (int64_t i = 0; i < width; ++i) total[i] += piece[i];
        }
        for (int64_t i = 0; i < width; ++i) out[c + i] = A(total[i]);
      }
    }
  }
}

// grad_x = g * scale - offset - (x - mean) * slope, g the gradient behind the activation.
template <Act act, bool moving, class X>
void norm_act_backward_typed(const NormActBackwardArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<X>;
  const int64_t channels = a.width;
  const Fold f = fold_of<A>(channels);
  alignas(64) A room[5][kTile];
  for_segments(a.segments, begin, end, [&](int64_t b, int64_t first, int64_t last) {
    const auto table = [&](const void* p, int64_t at, int slot) {
      return p ? repeat(static_cast<const A*>(p) + at, channels, f, room[slot]) : nullptr;
    };
    const A* mean = table(a.mean, b * channels, 0);
    const A* scale = table(a.scale, b * channels, 1);
    const A* bias = table(a.bias, 0, 2);
    const A* offset = table(a.offset, b * channels, 3);
    const A* slope = table(a.slope, b * channels, 4);
    const X* x = static_cast<const X*>(a.x) + first * channels;
    const X* grad = static_cast<const X*>(a.grad) + first * channels;
    X* grad_x = static_cast<X*>(a.grad_x) + first * channels;
    const auto row = [&](int64_t r, int64_t width) {
      for_lanes<A>(width, [&](int64_t i, auto lanes) {
        const vec<A> m = load<A>(mean + i, lanes), w = load<A>(scale + i, lanes);
        vec<A> shift{}, k0{}, k1{};
        if constexpr (act != Act::none) shift = load<A>(bias + i, lanes);
        if constexpr (moving) {
          k0 = load<A>(offset + i, lanes);
          k1 = load<A>(slope + i, lanes);
        }
        const int64_t at = r * f.width + i;
        vec<A> g = load<A>(grad + at, lanes), centred{};
        if constexpr (act != Act::none || moving) centred = load<A>(x + at, lanes) - m;
        if constexpr (act != Act::none) g = gated<act, A>(g, centred * w + shift);
        g = g * w;
        if constexpr (moving) g = g - k0 - centred * k1;
        store<A>(grad_x + at, g, lanes);
      });
    };
    const FoldedRows n(last - first, channels, f);
    for (int64_t r = 0; r < n.whole; ++r) row(r, f.width);
    if (n.left) row(n.whole, n.left);
  });
}

// ---- tables

template <Act value>
struct ActIs {
  static constexpr Act act = value;
};

template <class F>
MAEFAST_INLINE void with_act(Act act, const F& f) {
  switch (act) {
    case Act::none:
      return f(ActIs<Act::none>{});
    case Act::relu:
      return f(ActIs<Act::relu>{});
    case Act::relu6:
      return f(ActIs<Act::relu6>{});
  }
}

void stats(const SegmentStatsArgs& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto x) { stats_typed<typename decltype(x)::type>(a, begin, end); });
}

void stats_total(const SegmentStatsArgs& a, int64_t begin, int64_t end) {
  if (a.type == DType::f64) return stats_total_typed<double>(a, begin, end);
  stats_total_typed<float>(a, begin, end);
}

void norm_act(const NormActArgs& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto x) {
    with_act(a.act, [&](auto act) {
      using X = typename decltype(x)::type;
      constexpr Act kAct = decltype(act)::act;
      if (a.residual) return norm_act_typed<kAct, true, X>(a, begin, end);
      norm_act_typed<kAct, false, X>(a, begin, end);
    });
  });
}

void sums(const NormActSumsArgs& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto x) {
    with_act(a.act, [&](auto act) {
      using X = typename decltype(x)::type;
      constexpr Act kAct = decltype(act)::act;
      if constexpr (kAct != Act::none) {
        if (a.gate) return sums_typed<kAct, true, X>(a, begin, end);
      }
      sums_typed<kAct, false, X>(a, begin, end);
    });
  });
}

void sums_total(const NormActSumsArgs& a, int64_t begin, int64_t end) {
  if (a.type == DType::f64) return sums_total_typed<double>(a, begin, end);
  sums_total_typed<float>(a, begin, end);
}

void norm_act_backward(const NormActBackwardArgs& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto x) {
    with_act(a.act, [&](auto act) {
      using X = typename decltype(x)::type;
      constexpr Act kAct = decltype(act)::act;
      if (a.slope) return norm_act_backward_typed<kAct, true, X>(a, begin, end);
      norm_act_backward_typed<kAct, false, X>(a, begin, end);
    });
  });
}

}  // namespace

extern const CellNormKernels cell_norm_kernels = {stats, stats_total, norm_act,
                                                  sums,  sums_total,  norm_act_backward};

}  // namespace maefast::MAEFAST_ISA
