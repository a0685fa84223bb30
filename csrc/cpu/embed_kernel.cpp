#include "cpu/embed_kernel.h"

#include <cstddef>

#include "cpu/patch_vec.h"
#include "cpu/units_vec.h"
#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

// ---- gather_tokens

// Copies row `row` of src, or writes zeros where it is negative. The builtins reach libc, which has its own
// choice of instruction set.
void put_row(char* dst, const char* src, int64_t row, int64_t bytes) {
  if (row >= 0) {
    __builtin_memcpy(dst, src + row * bytes, static_cast<size_t>(bytes));
  } else {
    __builtin_memset(dst, 0, static_cast<size_t>(bytes));
  }
}

void gather_rows(const GatherArgs& a, int64_t begin, int64_t end) {
  const int64_t kept = a.keep_prefix ? a.prefix : 0;
  const int64_t length = a.prefix + a.tokens;
  int64_t b = sample_of(a.cu, a.batch, kept, begin);
  for (int64_t r = begin; r < end; ++r) {
    while (b + 1 < a.batch && r >= a.cu[b + 1] + (b + 1) * kept) ++b;
    const int64_t within = r - a.cu[b] - b * kept;
    int64_t row = b * length + within;
    if (within >= kept) {
      const int64_t n = a.index[r - (b + 1) * kept] - b * a.tokens;
      row = n >= 0 && n < a.tokens ? b * length + a.prefix + n : -1;
      if (row < 0) fail(a.failed);
    }
    put_row(a.dst + r * a.row_bytes, a.src, row, a.row_bytes);
  }
}

void scatter_rows(const GatherArgs& a, int64_t begin, int64_t end) {
  const int64_t kept = a.keep_prefix ? a.prefix : 0;
  const int64_t rows = a.packed + a.batch * kept;
  const int64_t length = a.prefix + a.tokens;
  int64_t b = begin / length;
  int64_t p = begin % length;
  for (int64_t r = begin; r < end; ++r) {
    int64_t row = -1;  // packed row whose gradient belongs here
    if (p < a.prefix) {
      if (a.keep_prefix) row = a.cu[b] + b * kept + p;
    } else {
      const int64_t slot = a.index[b * a.tokens + p - a.prefix];
      const int64_t t = a.masked ? ~slot : slot;
      if (t >= 0 && slot != kAbsent) row = t + (b + 1) * kept;
    }
    if (row >= rows) {
      fail(a.failed);
      row = -1;
    }
    if (row >= 0 || !a.zeroed) put_row(a.dst + r * a.row_bytes, a.src, row, a.row_bytes);
    if (++p == length) {
      p = 0;
      ++b;
    }
  }
}

// ---- patch_rows

// PW is pw where it is known at compile time: a run of pixels is then a few registers; else 0.
template <int PW, class X, class Y>
void patch_rows_typed(const PatchRowsArgs& a, int64_t begin, int64_t end) {
  const Grid g(a.grid);
  const X* images = static_cast<const X*>(a.src);
  Y* out = static_cast<Y*>(a.dst) + begin * g.values;
  for (int64_t r = begin; r < end; ++r, out += g.values) {
    const int64_t flat = a.index[r];
    if (flat < 0 || flat >= a.grid.batch * g.tokens) {
      fail(a.failed);
      zero_row(out, g.values);
      continue;
    }
    const X* patch = images + g.origin(flat);
    for_runs(g, [&](int64_t pixel, int64_t k) { convert_row(patch + pixel, out + k, PW ? PW : g.pw); });
  }
}

template <class X, class Y>
void patch_rows_sized(const PatchRowsArgs& a, int64_t begin, int64_t end) {
  switch (a.grid.pw) {
    case 16:
      return patch_rows_typed<16, X, Y>(a, begin, end);
    case 14:
      return patch_rows_typed<14, X, Y>(a, begin, end);
    case 8:
      return patch_rows_typed<8, X, Y>(a, begin, end);
    default:
      return patch_rows_typed<0, X, Y>(a, begin, end);
  }
}

void patch_rows(const PatchRowsArgs& a, int64_t begin, int64_t end) {
  with_type(a.src_type, [&](auto x) {
    with_type(a.dst_type, [&](auto y) {
      using X = typename decltype(x)::type;
      using Y = typename decltype(y)::type;
      if constexpr (is_same<X, Y> || (is_same<X, float> && sizeof(Y) == 2)) {
        patch_rows_sized<X, Y>(a, begin, end);
      } else {
        patch_rows_typed<0, X, Y>(a, begin, end);
      }
    });
  });
}

// One unit is a strip of the image that holds a whole row of tokens, so that its lines are written from end
// to end.
template <int PW, class X, class Y>
void patch_rows_backward_typed(const PatchRowsArgs& a, int64_t begin, int64_t end) {
  const Grid g(a.grid);
  const X* grad = static_cast<const X*>(a.src);
  Y* images = static_cast<Y*>(a.dst);
  const int64_t pw = PW ? PW : g.pw;
  for (int64_t strip = begin; strip < end; ++strip) {
    const int32_t* slot = a.index + strip * g.gw;
    Y* origin = images + g.origin(strip * g.gw);
    for_runs(g, [&](int64_t pixel, int64_t k) {
      for (int64_t w = 0; w < g.gw; ++w) {
        const int64_t t = slot[w];
        Y* out = origin + pixel + w * pw;
        if (t >= 0 && t < a.rows) {
          convert_row(grad + t * g.values + k, out, pw);
        } else {
          if (t >= 0) fail(a.failed);
          zero_row(out, pw);
        }
      }
    });
  }
}

void patch_rows_backward(const PatchRowsArgs& a, int64_t begin, int64_t end) {
  with_type(a.src_type, [&](auto x) {
    with_type(a.dst_type, [&](auto y) {
      using X = typename decltype(x)::type;
      using Y = typename decltype(y)::type;
      if constexpr (is_same<X, Y> || (sizeof(X) == 2 && is_same<Y, float>)) {
        if (a.grid.pw == 16) return patch_rows_backward_typed<16, X, Y>(a, begin, end);
      }
      patch_rows_backward_typed<0, X, Y>(a, begin, end);
    });
  });
}

// ---- place_tokens

template <class X, class Y>
void place_tokens_typed(const PlaceArgs& a, int64_t begin, int64_t end) {
  const X* y = static_cast<const X*>(a.y);
  const Y* pos = static_cast<const Y*>(a.pos);
  const Y* lead = static_cast<const Y*>(a.lead);
  const int64_t d = a.width;
  int64_t b = sample_of(a.cu, a.batch, a.prefix, begin);
  for (int64_t r = begin; r < end; ++r) {
    while (b + 1 < a.batch && r >= a.cu[b + 1] + (b + 1) * a.prefix) ++b;
    const int64_t within = r - a.cu[b] - b * a.prefix;
    Y* out = static_cast<Y*>(a.out) + r * d;
    if (within < a.prefix) {
      convert_row(lead + within * d, out, d);
      continue;
    }
    const int64_t t = r - (b + 1) * a.prefix;
    if (pos == nullptr) {
      convert_row(y + t * d, out, d);
      continue;
    }
    const int64_t n = a.visible[t] - b * a.tokens;
    if (n >= 0 && n < a.tokens) {
      add_rows(y + t * d, pos + n * d, out, d);
    } else {
      fail(a.failed);
      zero_row(out, d);
    }
  }
}

void place_tokens(const PlaceArgs& a, int64_t begin, int64_t end) {
  with_widening(a.y_type, a.out_type, [&](auto x, auto y) {
    place_tokens_typed<typename decltype(x)::type, typename decltype(y)::type>(a, begin, end);
  });
}

template <class G, class X>
void place_tokens_backward_typed(const PlaceBackwardArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<G>;
  const G* grad = static_cast<const G*>(a.grad);
  X* grad_y = static_cast<X*>(a.grad_y);
  const int64_t d = a.width;
  for (int64_t index = begin; index < end; ++index) {
    const Unit<A> unit(a.units, index, a.batch, a.prefix, a.tokens, d);
    for (int64_t b = unit.from; b < unit.to; ++b) {
      for (int64_t p = unit.first; p < unit.last; ++p) {
        int64_t row = a.cu[b] + b * a.prefix + p;
        if (p >= a.prefix) {
          const int64_t t = a.slot[b * a.tokens + p - a.prefix];
          if (t < 0) continue;
          if (t >= a.packed) {
            fail(a.failed);
            continue;
          }
          row = t + (b + 1) * a.prefix;
          convert_row(grad + row * d, grad_y + t * d, d);
        }
        if (A* sum = unit.at(p)) accumulate_row(sum, grad + row * d, d);
      }
    }
  }
}

void place_tokens_backward(const PlaceBackwardArgs& a, int64_t begin, int64_t end) {
  with_widening(a.y_type, a.grad_type, [&](auto x, auto g) {
    place_tokens_backward_typed<typename decltype(g)::type, typename decltype(x)::type>(a, begin, end);
  });
}

// Packed rows without the prefix rows between the samples: a few long copies.
template <class G, class X>
void unplace_rows_typed(const PlaceBackwardArgs& a, int64_t begin, int64_t end) {
  const G* grad = static_cast<const G*>(a.grad);
  X* grad_y = static_cast<X*>(a.grad_y);
  const int64_t d = a.width;
  int64_t b = sample_of(a.cu, a.batch, 0, begin);
  for (int64_t t = begin; t < end; ++b) {
    const int64_t stop = a.cu[b + 1] < end ? a.cu[b + 1] : end;
    if (stop > t) convert_row(grad + (t + (b + 1) * a.prefix) * d, grad_y + t * d, (stop - t) * d);
    t = stop;
  }
}

void unplace_rows(const PlaceBackwardArgs& a, int64_t begin, int64_t end) {
  with_widening(a.y_type, a.grad_type, [&](auto x, auto g) {
    unplace_rows_typed<typename decltype(g)::type, typename decltype(x)::type>(a, begin, end);
  });
}

}  // namespace

extern const EmbedKernels embed_kernels = {
    gather_rows,  scatter_rows,          patch_rows,   patch_rows_backward,
    place_tokens, place_tokens_backward, unplace_rows, sum_pieces,
};

}  // namespace maefast::MAEFAST_ISA
