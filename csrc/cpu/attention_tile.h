// Small matrix products for the attention kernels: a tile of the result stays in registers over the whole
// depth.
#pragma once

#include "cpu/attention_math.h"

namespace maefast::MAEFAST_ISA {
namespace {

// One step along the depth: sums += a * b for float32 words.
struct Fma {
  static MAEFAST_INLINE void begin() {}  // before the products of a task, and after them
  static MAEFAST_INLINE void end() {}
  static MAEFAST_INLINE vec_f32 step(vec_f32 sum, vec_f32 a, vec_f32 b) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
// The same for pairs of bfloat16.
struct Dot {
  static MAEFAST_INLINE void begin() {}
  static MAEFAST_INLINE void end() {}
  static MAEFAST_INLINE vec_f32 step(vec_f32 sum, vec_f32 a, vec_f32 b) { return dot(sum, a, b); }
};
#endif

// Left operand: word (row i, depth k) at p[i * row + k * depth], broadcast. Right: vectors at p[k * row +
// lane].
struct Left {
  const float* p;
  int64_t row, depth;
};
struct Right {
  const float* p;
  int64_t row;
};

// Memory of another type, at any address.
MAEFAST_INLINE float word(const float* p) {
  float x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

// Rows that are needed next: fetched a few at a time between tiles. Those of one head lie a row of all heads
// apart, which the hardware does not guess.
class Ahead {
 public:
  MAEFAST_INLINE explicit Ahead(int64_t row_bytes) : bytes_(row_bytes) {}

  MAEFAST_INLINE void add(const void* rows, int64_t stride_bytes, int64_t count, bool write) {
    if (count > 0) list_[size_++] = {static_cast<const char*>(rows), stride_bytes, count, write};
  }

  MAEFAST_INLINE void some() {
    for (int64_t i = 0; i < kRowsAtOnce && at_ < size_; ++i) {
      Rows& r = list_[at_];
      for (int64_t c = 0; c < bytes_; c += 64) {
        if (r.write) {
          __builtin_prefetch(r.p + c, 1, 2);
        } else {
          __builtin_prefetch(r.p + c, 0, 2);
        }
      }
      r.p += r.stride;
      if (--r.count == 0) ++at_;
    }
  }

 private:
  static constexpr int64_t kRowsAtOnce = 12;
  struct Rows {
    const char* p;
    int64_t stride, count;
    bool write;
  };
  Rows list_[7];
  int size_ = 0, at_ = 0;
  int64_t bytes_;
};

using TileFunction = void (*)(Left a, Right b, int64_t depth, float* c, int64_t c_row, bool add);

// Most rows of a tile of 1, 2, ... vectors: the sums, one row of b and a broadcast fill the registers.
#if defined(__AVX512F__)
constexpr int kTileRows[] = {12, 12, 8, 6};
#elif defined(__AVX2__)
constexpr int kTileRows[] = {10, 6};
#else
constexpr int kTileRows[] = {8, 5};
#endif
constexpr int kTileVectors = sizeof(kTileRows) / sizeof(int);

template <class Step, int R, int C>
void tile(Left a, Right b, int64_t depth, float* c, int64_t c_row, bool add) {
  vec_f32 sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) sum[r][v] = vec_f32{};
  const float* pa = a.p;
  const float* pb = b.p;
  for (int64_t k = 0; k < depth; ++k, pa += a.depth, pb += b.row) {
    vec_f32 vb[C];
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) vb[v] = load<float>(pb + v * kLane);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vec_f32 va = all(word(pa + r * a.row));
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) sum[r][v] = Step::step(sum[r][v], va, vb[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) {
      float* to = c + r * c_row + v * kLane;
      store<float>(to, add ? load<float>(to) + sum[r][v] : sum[r][v]);
    }
}

template <class Step, int R, int C>
constexpr TileFunction tile_or_null() {
  if constexpr (C <= kTileVectors) {
    if constexpr (R <= kTileRows[C - 1]) return tile<Step, R, C>;
  }
  return nullptr;
}

template <class Step, int C>
constexpr TileFunction kTilesOf[12] = {
    tile_or_null<Step, 1, C>(),  tile_or_null<Step, 2, C>(),  tile_or_null<Step, 3, C>(),
    tile_or_null<Step, 4, C>(),  tile_or_null<Step, 5, C>(),  tile_or_null<Step, 6, C>(),
    tile_or_null<Step, 7, C>(),  tile_or_null<Step, 8, C>(),  tile_or_null<Step, 9, C>(),
    tile_or_null<Step, 10, C>(), tile_or_null<Step, 11, C>(), tile_or_null<Step, 12, C>()};

template <class Step>
constexpr const TileFunction* kTiles[] = {kTilesOf<Step, 1>, kTilesOf<Step, 2>, kTilesOf<Step, 3>,
                                          kTilesOf<Step, 4>};

// c[i, lane] = (or += with add) the sum over k < depth of a[i, k] * b[k, lane], for `rows` rows and `vectors`
// vectors.
template <class Step>
MAEFAST_INLINE void multiply(int64_t rows, int64_t vectors, int64_t depth, Left a, Right b, float* c,
                             int64_t c_row, bool add, Ahead& ahead) {
  while (vectors > 0) {
    const int64_t panels = (vectors + kTileVectors - 1) / kTileVectors;
    const int64_t width = (vectors + panels - 1) / panels;
    const TileFunction* tiles = kTiles<Step>[width - 1];
    const int64_t most = kTileRows[width - 1];
    int64_t left = (rows + most - 1) / most;
    for (int64_t i = 0; i < rows; --left) {  // even heights: a last tile of one row would wait on its sums
      const int64_t height = (rows - i + left - 1) / left;
      tiles[height - 1]({a.p + i * a.row, a.row, a.depth}, b, depth, c + i * c_row, c_row, add);
      i += height;
      ahead.some();
    }
    vectors -= width;
    b.p += width * kLane;
    c += width * kLane;
  }
}

}  // namespace
}  // namespace maefast::MAEFAST_ISA
