// Matrix products of bfloat16 pairs by AMX (Sapphire Rapids and later): one instruction multiplies 16 rows of
// 16 words with 16 rows of 16 lanes. The operands are those of attention_tile.h; what does not fill a tile is
// copied beside zeros, because what lies behind it may be NaN.
#pragma once

#if defined(__AMX_BF16__)
#include "cpu/attention_tile.h"

namespace maefast::MAEFAST_ISA {
namespace {

constexpr int64_t kSide = 16;  // rows and words of a tile
constexpr int64_t kTileFloats = kSide * kSide;
constexpr int64_t kMostBlocks = 8;   // tiles along the depth: 256 keys, or 128 channels
constexpr int64_t kMostVectors = 8;  // of a right operand: 128 channels

// As `Dot`, between begin and end.
struct TileDot {
  static MAEFAST_INLINE void begin() {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide};
    } shape;
    _tile_loadconfig(&shape);
  }
  static MAEFAST_INLINE void end() { _tile_release(); }  // a thread without tiles is cheaper to switch
};

// A tile in memory: `row` floats from one of its rows to the next.
struct TileAt {
  const float* p;
  int64_t row;
};

MAEFAST_INLINE void copy_words(const float* from, int64_t n, float* to) {
  _mm512_store_ps(to, _mm512_maskz_loadu_ps(n >= kSide ? __mmask16(-1) : __mmask16((1u << n) - 1), from));
}

// `rows` x `depth` words of a left operand, in place where they are a whole tile, else in `space`.
MAEFAST_INLINE TileAt left_tile(Left a, int64_t rows, int64_t depth, float* space) {
  if (a.depth == 1) {
    if (rows == kSide && depth == kSide) return {a.p, a.row};
    for (int64_t i = 0; i < kSide; ++i)
      copy_words(i < rows ? a.p + i * a.row : a.p, i < rows ? depth : 0, space + i * kSide);
    return {space, kSide};
  }
  vec_f32 x[kSide];  // columns of words; there are lanes for every row of the tile
#pragma GCC unroll 16
  for (int k = 0; k < kSide; ++k) x[k] = k < depth ? load<float>(a.p + k * a.depth) : vec_f32{};
  transpose(x);
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) store<float>(space + i * kSide, x[i]);
  return {space, kSide};
}

MAEFAST_INLINE int64_t byte_row(int64_t floats) {
  return floats * int64_t(sizeof(float));
}

// As `multiply`, for up to kMostBlocks * 16 words along the depth.
template <>
MAEFAST_INLINE void multiply<TileDot>(int64_t rows, int64_t vectors, int64_t depth, Left a, Right b, float* c,
                                      int64_t c_row, bool add, Ahead& ahead) {
  alignas(64) float left_space[2 * kMostBlocks * kTileFloats];
  alignas(64) float right_space[kMostVectors * kTileFloats];
  alignas(64) float results[4 * kTileFloats];
  const int64_t blocks = (depth + kSide - 1) / kSide, tail = depth % kSide;
  if (tail != 0) {  // the last rows of b, then zeros
    const float* from = b.p + (blocks - 1) * kSide * b.row;
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t k = 0; k < kSide; ++k)
        store<float>(right_space + v * kTileFloats + k * kSide,
                     k < tail ? load<float>(from + k * b.row + v * kSide) : vec_f32{});
  }
  const auto right_tile = [&](int64_t k, int64_t v) -> TileAt {
    if (tail != 0 && k == blocks - 1) return {right_space + v * kTileFloats, kSide};
    return {b.p + k * kSide * b.row + v * kSide, b.row};
  };
  for (int64_t i = 0; i < rows; i += 2 * kSide) {
    const int64_t here[2] = {least(kSide, rows - i), least(kSide, rows - i - kSide)};
    const bool low = here[1] > 0;  // whether there is a second tile of rows
    TileAt left[2][kMostBlocks];
    for (int64_t half = 0; half <= int64_t(low); ++half)
      for (int64_t k = 0; k < blocks; ++k)
        left[half][k] =
            left_tile({a.p + (i + half * kSide) * a.row + k * kSide * a.depth, a.row, a.depth}, here[half],
                      least(kSide, depth - k * kSide), left_space + (half * kMostBlocks + k) * kTileFloats);
    for (int64_t v = 0; v < vectors; v += 2) {
      const bool right = v + 1 < vectors;  // whether there is a second tile of lanes
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < blocks; ++k) {
        const TileAt b0 = right_tile(k, v), a0 = left[0][k];
        _tile_loadd(4, a0.p, byte_row(a0.row));
        _tile_loadd(6, b0.p, byte_row(b0.row));
        _tile_dpbf16ps(0, 4, 6);
        if (right) {
          const TileAt b1 = right_tile(k, v + 1);
          _tile_loadd(7, b1.p, byte_row(b1.row));
          _tile_dpbf16ps(1, 4, 7);
        }
        if (low) {
          const TileAt a1 = left[1][k];
          _tile_loadd(5, a1.p, byte_row(a1.row));
          _tile_dpbf16ps(2, 5, 6);
          if (right) _tile_dpbf16ps(3, 5, 7);
        }
      }
      ahead.some();
      ahead.some();
      float* const to = c + i * c_row + v * kSide;
      if (!add && here[low] == kSide) {  // whole tiles
        const int64_t row = byte_row(c_row);
        _tile_stored(0, to, row);
        if (right) _tile_stored(1, to + kSide, row);
        if (low) _tile_stored(2, to + kSide * c_row, row);
        if (low && right) _tile_stored(3, to + kSide * c_row + kSide, row);
        continue;
      }
      const int64_t row = byte_row(kSide);
      _tile_stored(0, results, row);
      if (right) _tile_stored(1, results + kTileFloats, row);
      if (low) _tile_stored(2, results + 2 * kTileFloats, row);
      if (low && right) _tile_stored(3, results + 3 * kTileFloats, row);
      for (int64_t half = 0; half <= int64_t(low); ++half)
        for (int64_t side = 0; side <= int64_t(right); ++side)
          for (int64_t r = 0; r < here[half]; ++r) {
            float* const at = to + (half * kSide + r) * c_row + side * kSide;
            const vec_f32 sum = load<float>(results + (2 * half + side) * kTileFloats + r * kSide);
            store<float>(at, add ? load<float>(at) + sum : sum);
          }
    }
  }
}

}  // namespace
}  // namespace maefast::MAEFAST_ISA
#endif
