// The kernel side of units.h.
#pragma once

#include "cpu/units.h"
#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

// One unit: its positions [first, last), its samples [from, to), and where the sums of its piece are.
template <class A>
struct Unit {
  int64_t first, last, from, to;
  A* prefix_sums;
  A* token_sums;
  int64_t prefix, width;

  Unit(const Units& u, int64_t index, int64_t batch, int64_t prefix_, int64_t tokens, int64_t width_)
      : prefix(prefix_), width(width_) {
    const int64_t piece = index / u.chunks;
    const int64_t length = prefix + tokens;
    first = index % u.chunks * u.chunk;
    last = first + u.chunk < length ? first + u.chunk : length;
    from = batch * piece / u.pieces;
    to = batch * (piece + 1) / u.pieces;
    prefix_sums = u.prefix_sums ? static_cast<A*>(u.prefix_sums) + piece * u.prefix_stride : nullptr;
    token_sums = u.token_sums ? static_cast<A*>(u.token_sums) + piece * u.token_stride : nullptr;
    for (int64_t p = first; p < last; ++p)
      if (A* sum = at(p)) zero_row(sum, width);
  }

  // The sum for position p, or null where none is wanted.
  A* at(int64_t p) const {
    if (p < prefix) return prefix_sums ? prefix_sums + p * width : nullptr;
    return token_sums ? token_sums + (p - prefix) * width : nullptr;
  }
};

template <class A, class Y>
void sum_pieces_typed(const SumArgs& a, int64_t begin, int64_t end) {
  const A* pieces = static_cast<const A*>(a.pieces) + begin;
  Y* out = static_cast<Y*>(a.out) + begin;
  for_lanes<A>(end - begin, [&](int64_t i, auto lanes) {
    vec<A> sum = load<A>(pieces + i, lanes);
    for (int64_t k = 1; k < a.count; ++k) sum += load<A>(pieces + k * a.stride + i, lanes);
    store<A>(out + i, sum, lanes);
  });
}

void sum_pieces(const SumArgs& a, int64_t begin, int64_t end) {
  with_type(a.out_type, [&](auto y) {
    using Y = typename decltype(y)::type;
    sum_pieces_typed<acc_t<Y>, Y>(a, begin, end);
  });
}

}  // namespace
}  // namespace maefast::MAEFAST_ISA
