// Row copies of the embed family: one warp copies one row, in the widest words that its alignment allows.
#include "cuda/common.cuh"
#include "cuda/ops.h"
#include "plan.h"

namespace maefast::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 8;

struct Rows {
  const char* src;
  char* dst;
  const int32_t* index;                   // forward: flat token of packed row t, [T]; backward: slot [B*N]
  const int32_t* cu;                      // [B+1], read by the backward only
  int64_t words;                          // words of a row
  int64_t batch, tokens, prefix, packed;  // B, N, P, T
  int64_t kept;                           // prefix rows of a packed sample
  bool masked;
};

template <class Word>
__device__ void copy_row(Word* dst, const Word* src, int64_t words) {
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < words; i += kWarp) dst[i] = src[i];
}

// Work items: the kept prefix rows of all samples, then the packed tokens. A token's sample follows from its
// flat index, so nobody searches cu. An index out of range is not followed; its row stays unwritten.
template <class Word>
__global__ void gather_kernel(Rows a) {
  const Word* src = reinterpret_cast<const Word*>(a.src);
  Word* dst = reinterpret_cast<Word*>(a.dst);
  const int64_t prefix_rows = a.batch * a.kept;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y;
       item < prefix_rows + a.packed; item += step) {
    int64_t from, to;
    if (item < prefix_rows) {
      const int64_t b = item / a.kept;
      const int64_t p = item - b * a.kept;
      from = b * (a.prefix + a.tokens) + p;
      to = a.cu[b] + item;
      if (to < 0 || to >= prefix_rows + a.packed) continue;
    } else {
      const int64_t t = item - prefix_rows;
      const int32_t flat = a.index[t];
      if (flat < 0 || flat >= a.batch * a.tokens) continue;
      const int64_t b = flat / static_cast<int32_t>(a.tokens);
      from = flat + (b + 1) * a.prefix;
      to = t + (b + 1) * a.kept;
    }
    copy_row(dst + to * a.words, src + from * a.words, a.words);
  }
}

// Work items: the rows of grad_x [B, P+N]; each is written exactly once.
template <class Word>
__global__ void scatter_kernel(Rows a) {
  const Word* src = reinterpret_cast<const Word*>(a.src);
  Word* dst = reinterpret_cast<Word*>(a.dst);
  const int64_t length = a.prefix + a.tokens;
  const int64_t rows = a.packed + a.batch * a.kept;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y; item < a.batch * length;
       item += step) {
    const int64_t b = item / length;
    const int64_t p = item - b * length;
    int64_t from = -1;
    if (p < a.prefix) {
      if (a.kept > 0) from = a.cu[b] + b * a.kept + p;
    } else {
      const int32_t slot = a.index[b * a.tokens + p - a.prefix];
      const int32_t t = a.masked ? ~slot : slot;
      if (t >= 0 && slot != kAbsent) from = t + (b + 1) * a.kept;
    }
    Word* out = dst + item * a.words;
    if (from >= 0 && from < rows) {
      copy_row(out, src + from * a.words, a.words);
    } else {
      for (int64_t i = threadIdx.x; i < a.words; i += kWarp) out[i] = Word{};
    }
  }
}

template <class Word>
void launch(Rows rows, int64_t row_bytes, int64_t items, bool backward, cudaStream_t stream) {
  rows.words = row_bytes / static_cast<int64_t>(sizeof(Word));
  const dim3 block(kWarp, kRowsPerBlock);
  const unsigned grid = grid_size(items, kRowsPerBlock);
  if (backward) {
    scatter_kernel<Word><<<grid, block, 0, stream>>>(rows);
  } else {
    gather_kernel<Word><<<grid, block, 0, stream>>>(rows);
  }
}

// Rows may start anywhere in a storage, so the word follows from the addresses as well as from the row's
// size.
void launch_widest(const Rows& rows, int64_t row_bytes, int64_t items, bool backward, const Tensor& like) {
  if (items == 0 || row_bytes == 0) return;
  const Launch on(like);
  const uint64_t bits = reinterpret_cast<uint64_t>(rows.src) | reinterpret_cast<uint64_t>(rows.dst) |
                        static_cast<uint64_t>(row_bytes);
  if (bits % 16 == 0) {
    launch<uint4>(rows, row_bytes, items, backward, on.stream);
  } else if (bits % 8 == 0) {
    launch<uint2>(rows, row_bytes, items, backward, on.stream);
  } else if (bits % 4 == 0) {
    launch<uint32_t>(rows, row_bytes, items, backward, on.stream);
  } else if (bits % 2 == 0) {
    launch<uint16_t>(rows, row_bytes, items, backward, on.stream);
  } else {
    launch<uint8_t>(rows, row_bytes, items, backward, on.stream);
  }
  check_launch(backward ? "gather_tokens_backward" : "gather_tokens");
}

}  // namespace

Tensor gather_tokens(const Tensor& x, const Tensor& index, const Tensor& cu, int64_t /*max_count*/,
                     int64_t prefix, bool keep_prefix) {
  Rows rows{};
  rows.batch = x.size(0);
  rows.prefix = prefix;
  rows.tokens = x.size(1) - prefix;
  rows.packed = index.numel();
  rows.kept = keep_prefix ? prefix : 0;
  const int64_t items = rows.packed + rows.batch * rows.kept;
  Tensor out = empty({items, x.size(2)}, x.scalar_type(), x);
  rows.src = static_cast<const char*>(x.const_data_ptr());
  rows.dst = static_cast<char*>(out.mutable_data_ptr());
  rows.index = index.const_data_ptr<int32_t>();
  rows.cu = cu.const_data_ptr<int32_t>();
  launch_widest(rows, x.size(2) * static_cast<int64_t>(x.element_size()), items, false, x);
  return out;
}

Tensor gather_tokens_backward(const Tensor& grad, const Tensor& slot, const Tensor& cu, int64_t prefix,
                              bool keep_prefix, bool masked) {
  Rows rows{};
  rows.batch = cu.numel() - 1;
  rows.prefix = prefix;
  rows.tokens = rows.batch > 0 ? slot.numel() / rows.batch : 0;
  rows.kept = keep_prefix ? prefix : 0;
  rows.packed = grad.size(0) - rows.batch * rows.kept;
  rows.masked = masked;
  Tensor out = empty({rows.batch, prefix + rows.tokens, grad.size(1)}, grad.scalar_type(), grad);
  rows.src = static_cast<const char*>(grad.const_data_ptr());
  rows.dst = static_cast<char*>(out.mutable_data_ptr());
  rows.index = slot.const_data_ptr<int32_t>();
  rows.cu = cu.const_data_ptr<int32_t>();
  launch_widest(rows, grad.size(1) * static_cast<int64_t>(grad.element_size()),
                rows.batch * (prefix + rows.tokens), true, grad);
  return out;
}

}  // namespace maefast::cuda
