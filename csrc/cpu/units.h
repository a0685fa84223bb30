// Deterministic sums over the batch, for the gradients of positions, mask token and prefix tokens;
// torch-free.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace maefast {

// The P+N positions are cut into chunks and the batch into pieces; unit u = (piece u / chunks, chunk u %
// chunks) sums its samples in order. The cut depends on the sizes alone, so the number of threads never
// changes a result.
struct Units {
  int64_t chunk;   // positions in a chunk
  int64_t chunks;  // ceil((P + N) / chunk)
  int64_t pieces;
  // Sums over a piece of the batch in the arithmetic type: [pieces, P, D] and [pieces, N, D], or null.
  // `*_stride` is the distance of two pieces in elements.
  void* prefix_sums;
  void* token_sums;
  int64_t prefix_stride, token_stride;
};

// out[i] = sum over k of pieces[k * stride + i], converted.
struct SumArgs {
  const void* pieces;
  void* out;
  int64_t count, stride;
  DType out_type;
};

}  // namespace maefast
