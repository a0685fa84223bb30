#include "cpu/embed_kernel.h"

#include <cstddef>

namespace maefast::MAEFAST_ISA {
namespace {

// Copies a row, or zeroes it when there is nothing valid to copy. The builtins reach libc, which has its own
// choice of instruction set.
void put_row(char* dst, const char* src, int64_t bytes, bool valid) {
  if (valid) {
    __builtin_memcpy(dst, src, static_cast<size_t>(bytes));
  } else {
    __builtin_memset(dst, 0, static_cast<size_t>(bytes));
  }
}

void gather_rows(const GatherArgs& a, int64_t begin, int64_t end) {
  const int64_t kept = a.keep_prefix ? a.prefix : 0;
  // The sample of the first row by bisection, of the others by stepping.
  int64_t b = 0;
  for (int64_t high = a.batch; b + 1 < high;) {
    const int64_t middle = (b + high) / 2;
    if (a.cu[middle] + middle * kept <= begin) {
      b = middle;
    } else {
      high = middle;
    }
  }
  for (int64_t r = begin; r < end; ++r) {
    while (b + 1 < a.batch && r >= a.cu[b + 1] + (b + 1) * kept) ++b;
    const int64_t within = r - a.cu[b] - b * kept;
    int64_t row = -1;  // row of x; a bad index leaves it negative and the output row zero
    if (within < kept) {
      if (within >= 0) row = b * (a.prefix + a.tokens) + within;
    } else {
      const int64_t t = r - (b + 1) * kept;
      const int64_t flat = t >= 0 && t < a.packed ? a.index[t] : -1;
      if (flat >= 0 && flat < a.batch * a.tokens) row = flat + (flat / a.tokens + 1) * a.prefix;
    }
    put_row(a.dst + r * a.row_bytes, a.src + row * a.row_bytes, a.row_bytes, row >= 0);
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
      if (t >= 0) row = t + (b + 1) * kept;
    }
    put_row(a.dst + r * a.row_bytes, a.src + row * a.row_bytes, a.row_bytes, row >= 0 && row < rows);
    if (++p == length) {
      p = 0;
      ++b;
    }
  }
}

}  // namespace

extern const EmbedKernels embed_kernels = {gather_rows, scatter_rows};

}  // namespace maefast::MAEFAST_ISA
