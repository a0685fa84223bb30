#include "cpu/restore_kernel.h"

#include "cpu/units_vec.h"
#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

template <class X, class Y>
MAEFAST_INLINE void put_row(const X* x, const Y* pos, Y* out, int64_t width) {
  if (pos) {
    add_rows(x, pos, out, width);
  } else {
    convert_row(x, out, width);
  }
}

// Where a sample's masked tokens start in their list; without cu_masked every token is visible or masked.
template <class Args>
MAEFAST_INLINE int64_t first_masked(const Args& a, int64_t b) {
  return a.cu_masked ? a.cu_masked[b] : b * a.tokens - a.cu[b];
}

// The first row of a sample, counted [prefix | visible | masked].
template <class Args>
MAEFAST_INLINE int64_t first_row(const Args& a, int64_t b) {
  return a.cu[b] + first_masked(a, b) + b * a.prefix;
}

// The sample that row r belongs to.
int64_t sample_of(const RestoreArgs& a, int64_t r) {
  int64_t low = 0, high = a.batch;  // first_row(low) <= r < first_row(high)
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first_row(a, middle) <= r ? low : high) = middle;
  }
  return low;
}

template <class X, class Y>
void restore_tokens_typed(const RestoreArgs& a, int64_t begin, int64_t end) {
  const X* x = static_cast<const X*>(a.x);
  const Y* mask_token = static_cast<const Y*>(a.mask_token);
  const Y* prefix_pos = static_cast<const Y*>(a.prefix_pos);
  const Y* pos = static_cast<const Y*>(a.pos);
  Y* out = static_cast<Y*>(a.out);
  const int64_t d = a.width;
  if (begin >= end) return;
  int64_t b = sample_of(a, begin);
  int64_t i = begin - first_row(a, b);
  int64_t next = first_row(a, b + 1);
  for (int64_t r = begin; r < end; ++r, ++i) {
    while (r == next) {  // a sample may be empty
      i = 0;
      next = first_row(a, ++b + 1);
    }
    const int64_t start = a.cu[b];
    const int64_t count = a.cu[b + 1] - start;
    if (i < a.prefix) {
      put_row(x + (start + b * a.prefix + i) * d, prefix_pos ? prefix_pos + i * d : nullptr, out + r * d, d);
    } else {
      const bool is_visible = i < a.prefix + count;
      const int64_t flat =
          is_visible ? a.visible[start + i - a.prefix] : a.masked[first_masked(a, b) + i - a.prefix - count];
      const int64_t n = flat - b * a.tokens;
      if (n < 0 || n >= a.tokens) {
        fail(a.failed);
        zero_row(out + r * d, d);
      } else {
        Y* row = out + (a.visible_first ? r : b * (a.prefix + a.tokens) + a.prefix + n) * d;
        const Y* add = pos ? pos + n * d : nullptr;
        if (is_visible) {
          put_row(x + (start + b * a.prefix + i) * d, a.pos_on_masked ? nullptr : add, row, d);
        } else {
          put_row(mask_token, add, row, d);
        }
      }
    }
  }
}

void restore_tokens(const RestoreArgs& a, int64_t begin, int64_t end) {
  with_widening(a.x_type, a.out_type, [&](auto x, auto y) {
    restore_tokens_typed<typename decltype(x)::type, typename decltype(y)::type>(a, begin, end);
  });
}

template <class G, class X>
void restore_tokens_backward_typed(const RestoreBackwardArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<G>;
  const G* grad = static_cast<const G*>(a.grad);
  X* grad_x = static_cast<X*>(a.grad_x);
  const int64_t d = a.width;
  for (int64_t index = begin; index < end; ++index) {
    const Unit<A> unit(a.units, index, a.batch, a.prefix, a.tokens, d);
    A* mask_sum = a.mask_sums ? static_cast<A*>(a.mask_sums) + index * d : nullptr;
    if (mask_sum) zero_row(mask_sum, d);
    for (int64_t b = unit.from; b < unit.to; ++b) {
      const int64_t start = a.cu[b];
      const int64_t length = first_row(a, b + 1) - first_row(a, b);
      const G* sample = grad + first_row(a, b) * d;
      for (int64_t p = unit.first; p < unit.last; ++p) {
        int64_t position = p;                    // where the forward put the row
        int64_t row = start + b * a.prefix + p;  // packed row, or -1 for a masked token
        if (p >= a.prefix) {
          const int64_t slot = a.slot[b * a.tokens + p - a.prefix];
          if (slot == kAbsent && a.cu_masked) continue;
          const int64_t rank = slot >= 0 ? slot - start : ~slot - first_masked(a, b) + a.cu[b + 1] - start;
          if (rank < 0 || rank >= length - a.prefix || slot >= a.packed) {
            fail(a.failed);
            continue;
          }
          if (a.visible_first) position = a.prefix + rank;
          row = slot >= 0 ? slot + (b + 1) * a.prefix : -1;
        }
        const G* g = sample + position * d;
        if (row >= 0) {
          convert_row(g, grad_x + row * d, d);
        } else if (mask_sum) {
          accumulate_row(mask_sum, g, d);
        }
        if (row < 0 || !a.pos_on_masked)
          if (A* sum = unit.at(p)) accumulate_row(sum, g, d);
      }
    }
  }
}

void restore_tokens_backward(const RestoreBackwardArgs& a, int64_t begin, int64_t end) {
  with_widening(a.x_type, a.grad_type, [&](auto x, auto g) {
    restore_tokens_backward_typed<typename decltype(g)::type, typename decltype(x)::type>(a, begin, end);
  });
}

}  // namespace

extern const RestoreKernels restore_kernels = {restore_tokens, restore_tokens_backward, sum_pieces};

}  // namespace maefast::MAEFAST_ISA
