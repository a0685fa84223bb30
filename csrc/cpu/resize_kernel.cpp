// Rows are filtered sixteen at a time, a lane for each: turned so that the sixteen values of a column lie
// together, a weight is one number for all lanes. Turned back, columns are filtered sixteen pixels at a time.
// Integers all through, so that every instruction set gives the same.
#include "cpu/resize_kernel.h"

#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

constexpr int kBits = 22;

typedef uint8_t u8x16 __attribute__((vector_size(16)));

#if defined(__GNUC__) && !defined(__clang__)
MAEFAST_INLINE u8x16 low(u8x16 a, u8x16 b) {
  return __builtin_shuffle(a, b, u8x16{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
}
MAEFAST_INLINE u8x16 high(u8x16 a, u8x16 b) {
  return __builtin_shuffle(a, b, u8x16{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}
#else
MAEFAST_INLINE u8x16 low(u8x16 a, u8x16 b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
MAEFAST_INLINE u8x16 high(u8x16 a, u8x16 b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#endif

// Sixteen sums of pixels times weights. `value` rounds and clips them to 0..255.
#if defined(__AVX512F__)
struct Sums {
  __m512i sum = _mm512_set1_epi32(1 << (kBits - 1));

  MAEFAST_INLINE void add(int32_t weight, const uint8_t* p) {
    const __m512i x = _mm512_maskz_cvtepu8_epi32(-1, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    sum = (__m512i)((vec_i32)sum + weight * (vec_i32)x);
  }
  MAEFAST_INLINE u8x16 value() const {
    const __m512i shifted = (__m512i)((vec_i32)sum >> kBits);
    return (u8x16)_mm512_maskz_cvtusepi32_epi8(-1,
                                               _mm512_maskz_max_epi32(-1, shifted, _mm512_setzero_si512()));
  }
};
#elif defined(__AVX2__)
struct Sums {
  __m256i sum[2] = {_mm256_set1_epi32(1 << (kBits - 1)), _mm256_set1_epi32(1 << (kBits - 1))};

  MAEFAST_INLINE void add(int32_t weight, const uint8_t* p) {
    const __m256i w = _mm256_set1_epi32(weight);
    for (int i = 0; i < 2; ++i) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i));
      sum[i] = _mm256_add_epi32(sum[i], _mm256_mullo_epi32(w, _mm256_cvtepu8_epi32(bytes)));
    }
  }
  MAEFAST_INLINE u8x16 value() const {
    const __m256i pairs =
        _mm256_packus_epi32(_mm256_srai_epi32(sum[0], kBits), _mm256_srai_epi32(sum[1], kBits));
    const __m256i words = _mm256_permute4x64_epi64(pairs, 0xd8);  // packing goes by halves
    return (u8x16)_mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
};
#else
struct Sums {
  int32_t sum[16];

  MAEFAST_INLINE Sums() {
    for (int32_t& one : sum) one = 1 << (kBits - 1);
  }
  MAEFAST_INLINE void add(int32_t weight, const uint8_t* p) {
    for (int i = 0; i < 16; ++i) sum[i] += weight * p[i];
  }
  MAEFAST_INLINE u8x16 value() const {
    u8x16 out{};
    for (int i = 0; i < 16; ++i) {
      const int32_t x = sum[i] >> kBits;
      out[i] = uint8_t(x < 0 ? 0 : x > 255 ? 255 : x);
    }
    return out;
  }
};
#endif

// x[i][j] becomes x[j][i]: four times, rows i and i + 8 are dealt together.
MAEFAST_INLINE void turn(u8x16 (&x)[16]) {
  u8x16 y[16];
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = low(x[i], x[i + 8]);
      y[2 * i + 1] = high(x[i], x[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
}

// Sixteen rows of `bytes` from `rows` on -> [bytes, 16]. Where there are fewer rows, the last stands for
// them.
void turn_rows(const uint8_t* const (&rows)[16], int64_t bytes, uint8_t* out) {
  int64_t at = 0;
  for (; at + 16 <= bytes; at += 16) {
    u8x16 x[16];
    for (int i = 0; i < 16; ++i) x[i] = load_raw<u8x16>(rows[i] + at);
    turn(x);
    for (int i = 0; i < 16; ++i) __builtin_memcpy(out + 16 * (at + i), &x[i], 16);
  }
  for (; at < bytes; ++at)
    for (int i = 0; i < 16; ++i) out[16 * at + i] = rows[i][at];
}

template <int C>
void across(const ResizeArgs& a, const uint8_t* turned, uint8_t* made) {
  const Filter& f = a.across;
  for (int64_t x = 0; x < a.out_width; ++x) {
    const int32_t* weights = f.weights + x * f.taps;
    const uint8_t* from = turned + 16 * C * f.first[x];
    Sums sums[C];
    for (int32_t k = 0; k < f.count[x]; ++k)
      for (int c = 0; c < C; ++c) sums[c].add(weights[k], from + 16 * (C * k + c));
    for (int c = 0; c < C; ++c) {
      const u8x16 value = sums[c].value();
      __builtin_memcpy(made + 16 * (c * a.padded + x), &value, 16);
    }
  }
}

void down(const ResizeArgs& a) {
  const Filter& f = a.down;
  for (int64_t c = 0; c < a.channels; ++c) {
    const uint8_t* plane = a.filtered + c * a.rows * a.padded;
    for (int64_t y = 0; y < a.out_rows; ++y) {
      const int32_t* weights = f.weights + y * f.taps;
      const uint8_t* from = plane + f.first[y] * a.padded;
      uint8_t* to = a.out + (c * a.out_rows + y) * a.out_width;
      int64_t x = 0;
      for (; x + 32 <= a.out_width; x += 32) {
        Sums one, other;
        for (int32_t k = 0; k < f.count[y]; ++k) {
          one.add(weights[k], from + k * a.padded + x);
          other.add(weights[k], from + k * a.padded + x + 16);
        }
        const u8x16 made[2] = {one.value(), other.value()};
        __builtin_memcpy(to + x, made, 32);
      }
      for (; x < a.out_width; x += 16) {
        Sums one;
        for (int32_t k = 0; k < f.count[y]; ++k) one.add(weights[k], from + k * a.padded + x);
        const u8x16 made = one.value();
        const int64_t left = a.out_width - x;
        __builtin_memcpy(to + x, &made, size_t(left < 16 ? left : 16));
      }
    }
  }
}

void resize(const ResizeArgs& a) {
  uint8_t* made = a.turned + 16 * a.width * a.channels;
  for (int64_t row = 0; row < a.rows; row += 16) {
    const uint8_t* rows[16];
    for (int i = 0; i < 16; ++i) {
      const int64_t at = row + i < a.rows ? row + i : a.rows - 1;
      rows[i] = a.image + at * a.row_bytes;
    }
    turn_rows(rows, a.width * a.channels, a.turned);
    switch (a.channels) {
      case 1:
        across<1>(a, a.turned, made);
        break;
      case 2:
        across<2>(a, a.turned, made);
        break;
      case 3:
        across<3>(a, a.turned, made);
        break;
      default:
        across<4>(a, a.turned, made);
    }
    const int64_t many = a.rows - row < 16 ? a.rows - row : 16;
    for (int64_t c = 0; c < a.channels; ++c) {
      for (int64_t x = 0; x < a.padded; x += 16) {
        u8x16 tile[16];
        for (int i = 0; i < 16; ++i) tile[i] = load_raw<u8x16>(made + 16 * (c * a.padded + x + i));
        turn(tile);
        uint8_t* to = a.filtered + (c * a.rows + row) * a.padded + x;
        for (int64_t i = 0; i < many; ++i) __builtin_memcpy(to + i * a.padded, &tile[i], 16);
      }
    }
  }
  down(a);
}

}  // namespace

extern const ResizeKernels resize_kernels = {resize};

}  // namespace maefast::MAEFAST_ISA
