// Kernels of the resize family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace maefast {

constexpr int64_t kResizeRows = 16;  // that are filtered at a time, and the width that rows are padded to

// How pixels are made along one axis: pixel i is the sum of `count[i]` pixels from `first[i]` on, times the
// weights at i * taps, integers with 22 bits after the point.
struct Filter {
  const int32_t *first, *count, *weights;
  int64_t taps;
};

struct ResizeArgs {
  const uint8_t* image;  // rows of [width, channels], `row_bytes` apart
  int64_t row_bytes, rows, width, channels;
  Filter across, down;
  int64_t out_rows, out_width, padded;  // padded: out_width in whole kResizeRows
  uint8_t* turned;                      // workspace [width * channels, 16] and [channels * padded, 16]
  uint8_t* filtered;                    // workspace [channels, rows, padded]
  uint8_t* out;                         // [channels, out_rows, out_width]
};

struct ResizeKernels {
  void (*resize)(const ResizeArgs& args);
};

MAEFAST_KERNELS(ResizeKernels, resize_kernels)

}  // namespace maefast
