// SIMD building blocks of the CPU kernels. A kernel file is compiled once per instruction set, so everything
// here has internal linkage: a function built for AVX-512 can never be merged with, and called in place of,
// the plain one.
//
// GCC/Clang vector types carry the arithmetic. A register holds kLanes<A> numbers of the arithmetic type A
// (float or double); `load` and `store` convert from and to the four storage types and round once, to nearest
// even, as torch does.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/dtype.h"

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define MAEFAST_INLINE inline __attribute__((always_inline))

namespace maefast::MAEFAST_ISA {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class X, class Y>
constexpr bool is_same = false;
template <class X>
constexpr bool is_same<X, X> = true;

template <bool condition, class X, class Y>
struct Either {
  using type = X;
};
template <class X, class Y>
struct Either<false, X, Y> {
  using type = Y;
};
template <bool condition, class X, class Y>
using either = typename Either<condition, X, Y>::type;

// The type that arithmetic on storage types X and Y is done in.
template <class X, class Y = X>
using acc_t = either<is_same<X, double> || is_same<Y, double>, double, float>;

template <class T>
struct Type {
  using type = T;
};

// Calls f with the Type<> of a run-time dtype.
template <class F>
MAEFAST_INLINE void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(Type<float>{});
    case DType::f64:
      return f(Type<double>{});
    case DType::f16:
      return f(Type<f16>{});
    case DType::bf16:
      return f(Type<bf16>{});
  }
}

// Calls f with the Types of (x, y) where y is x's dtype, or float32 while x has 16 bits.
template <class F>
MAEFAST_INLINE void with_widening(DType x, DType y, const F& f) {
  with_type(x, [&](auto type) {
    using X = typename decltype(type)::type;
    if constexpr (sizeof(X) == 2) {
      if (y == DType::f32) return f(type, Type<float>{});
    }
    f(type, type);
  });
}

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

typedef float vec_f32 __attribute__((vector_size(kVectorBytes)));
typedef double vec_f64 __attribute__((vector_size(kVectorBytes)));
typedef int32_t vec_i32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t vec_u32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t vec_i64 __attribute__((vector_size(kVectorBytes)));
typedef float half_f32 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t half_u16 __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
using vec = either<is_same<A, double>, vec_f64, vec_f32>;

template <class V>
MAEFAST_INLINE V load_raw(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
MAEFAST_INLINE vec<A> splat(A a) {
  return vec<A>{} + a;
}

// ---- lane by lane

// float rounds once where the instruction set has it; double, as it is written.
MAEFAST_INLINE vec_f32 fma(vec_f32 a, vec_f32 b, vec_f32 c) {
#if defined(__AVX512F__)
  return (vec_f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vec_f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
MAEFAST_INLINE vec_f64 fma(vec_f64 a, vec_f64 b, vec_f64 c) {
  return a * b + c;
}

MAEFAST_INLINE vec_f32 select(vec_i32 condition, vec_f32 yes, vec_f32 no) {
  return (vec_f32)(((vec_i32)yes & condition) | ((vec_i32)no & ~condition));
}

// The smaller and the larger of a and b; b where one is NaN.
MAEFAST_INLINE vec_f32 smaller(vec_f32 a, vec_f32 b) {
#if defined(__AVX512F__)
  return (vec_f32)_mm512_maskz_min_ps(-1, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vec_f32)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(a < b, a, b);
#endif
}
MAEFAST_INLINE vec_f32 larger(vec_f32 a, vec_f32 b) {
#if defined(__AVX512F__)
  return (vec_f32)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vec_f32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}

MAEFAST_INLINE vec_f32 magnitude(vec_f32 x) {
  return (vec_f32)((vec_i32)x & 0x7fffffff);
}

// ---- 16-bit formats

// The generic forms make GCC go through pairs of narrower registers.
#if defined(__AVX512F__)
MAEFAST_INLINE vec_f32 bf16_to_f32(half_u16 h) {
  return (vec_f32)_mm512_maskz_slli_epi32(-1, _mm512_maskz_cvtepu16_epi32(-1, (__m256i)h), 16);
}

MAEFAST_INLINE half_u16 f32_to_bf16(vec_f32 x) {
  const vec_u32 u = (vec_u32)x;
  const vec_u32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  const __m512i safe = _mm512_mask_mov_epi32((__m512i)rounded, nan, _mm512_set1_epi32(0x7fc0));
  return (half_u16)_mm512_maskz_cvtepi32_epi16(-1, safe);
}
#elif defined(__AVX2__) && defined(__F16C__)
MAEFAST_INLINE vec_f32 bf16_to_f32(half_u16 h) {
  return (vec_f32)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
}

MAEFAST_INLINE half_u16 f32_to_bf16(vec_f32 x) {
  const vec_u32 u = (vec_u32)x;
  const vec_u32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const __m256 nan = _mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q);
  const __m256i safe = (__m256i)_mm256_blendv_ps((__m256)rounded, (__m256)_mm256_set1_epi32(0x7fc0), nan);
  return (half_u16)_mm_packus_epi32(_mm256_castsi256_si128(safe), _mm256_extracti128_si256(safe, 1));
}
#else
MAEFAST_INLINE vec_f32 bf16_to_f32(half_u16 h) {
  return (vec_f32)(__builtin_convertvector(h, vec_u32) << 16);
}

MAEFAST_INLINE half_u16 f32_to_bf16(vec_f32 x) {
  const vec_u32 u = (vec_u32)x;
  const vec_u32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vec_u32 nan = (vec_u32)(x != x);
  return __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), half_u16);
}
#endif

#if defined(__AVX512F__)
MAEFAST_INLINE vec_f32 f16_to_f32(half_u16 h) {
  return (vec_f32)_mm512_maskz_cvtph_ps(-1, (__m256i)h);
}
MAEFAST_INLINE half_u16 f32_to_f16(vec_f32 x) {
  return (half_u16)_mm512_maskz_cvtps_ph(-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__AVX2__) && defined(__F16C__)
MAEFAST_INLINE vec_f32 f16_to_f32(half_u16 h) {
  return (vec_f32)_mm256_cvtph_ps((__m128i)h);
}
MAEFAST_INLINE half_u16 f32_to_f16(vec_f32 x) {
  return (half_u16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// Branch-free integer forms. Subnormals lean on one float addition that aligns the mantissa (and rounds it,
// going down).
MAEFAST_INLINE vec_f32 f16_to_f32(half_u16 h) {
  const vec_u32 u = __builtin_convertvector(h, vec_u32);
  const vec_u32 sign = (u & 0x8000u) << 16;
  const vec_u32 body = (u & 0x7fffu) << 13;
  const vec_u32 exponent = body & 0x0f800000u;
  const vec_u32 normal = body + (112u << 23);
  const vec_u32 special = body + (224u << 23);  // inf and NaN
  const vec_f32 magic = (vec_f32)(vec_u32{} + (113u << 23));
  const vec_u32 subnormal = (vec_u32)((vec_f32)(body + (113u << 23)) - magic);
  const vec_u32 is_special = (vec_u32)(exponent == 0x0f800000u);
  const vec_u32 is_subnormal = (vec_u32)(exponent == 0u);
  const vec_u32 r =
      (normal & ~is_special & ~is_subnormal) | (special & is_special) | (subnormal & is_subnormal);
  return (vec_f32)(r | sign);
}

MAEFAST_INLINE half_u16 f32_to_f16(vec_f32 x) {
  const vec_u32 bits = (vec_u32)x;
  const vec_u32 sign = (bits & 0x80000000u) >> 16;
  const vec_u32 u = bits & 0x7fffffffu;
  const vec_f32 magic = (vec_f32)(vec_u32{} + (126u << 23));
  const vec_u32 subnormal = (vec_u32)((vec_f32)u + magic) - (126u << 23);
  const vec_u32 normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;  // rebias by -112, round to even
  const vec_u32 is_nan = (vec_u32)((vec_i32)u > (vec_i32{} + 0x7f800000));
  const vec_u32 is_big = (vec_u32)((vec_i32)u >= (vec_i32{} + 0x47800000)) & ~is_nan;  // >= 2^16: infinity
  const vec_u32 is_small = (vec_u32)((vec_i32)u < (vec_i32{} + 0x38800000));  // < 2^-14: subnormal or zero
  const vec_u32 is_normal = ~(is_nan | is_big | is_small);
  const vec_u32 r = (normal & is_normal) | (subnormal & is_small) | (0x7c00u & is_big) | (0x7e00u & is_nan);
  return __builtin_convertvector(r | sign, half_u16);
}
#endif

// ---- load and store

template <class A, class T>
MAEFAST_INLINE vec<A> load(const T* p) {
  if constexpr (is_same<A, T>) {
    return load_raw<vec<A>>(p);
  } else if constexpr (is_same<A, float> && is_same<T, bf16>) {
    return bf16_to_f32(load_raw<half_u16>(p));
  } else if constexpr (is_same<A, float> && is_same<T, f16>) {
    return f16_to_f32(load_raw<half_u16>(p));
  } else if constexpr (is_same<A, double> && is_same<T, float>) {
    return __builtin_convertvector(load_raw<half_f32>(p), vec_f64);
  } else {  // 16 bits to double, float from double: rare, through a float register
    constexpr int n = kLanes<A>;
    if constexpr (is_same<A, double>) {
      uint16_t wide[kLanes<float>] = {};
      __builtin_memcpy(wide, p, n * sizeof(uint16_t));
      const vec_f32 f =
          is_same<T, bf16> ? bf16_to_f32(load_raw<half_u16>(wide)) : f16_to_f32(load_raw<half_u16>(wide));
      vec_f64 r;
      for (int i = 0; i < n; ++i) r[i] = f[i];
      return r;
    } else {
      vec_f32 r;
      for (int i = 0; i < n; ++i) r[i] = float(p[i]);
      return r;
    }
  }
}

template <class A, class T>
MAEFAST_INLINE void store(T* p, vec<A> v) {
  if constexpr (is_same<A, T>) {
    __builtin_memcpy(p, &v, sizeof v);
  } else if constexpr (is_same<A, float> && is_same<T, bf16>) {
    const half_u16 h = f32_to_bf16(v);
    __builtin_memcpy(p, &h, sizeof h);
  } else if constexpr (is_same<A, float> && is_same<T, f16>) {
    const half_u16 h = f32_to_f16(v);
    __builtin_memcpy(p, &h, sizeof h);
  } else if constexpr (is_same<A, double> && is_same<T, float>) {
    const half_f32 h = __builtin_convertvector(v, half_f32);
    __builtin_memcpy(p, &h, sizeof h);
  } else {
    constexpr int n = kLanes<A>;
    if constexpr (is_same<A, double>) {  // torch goes through float here as well
      vec_f32 f{};
      for (int i = 0; i < n; ++i) f[i] = float(v[i]);
      const half_u16 h = is_same<T, bf16> ? f32_to_bf16(f) : f32_to_f16(f);
      __builtin_memcpy(p, &h, n * sizeof(uint16_t));
    } else {
      for (int i = 0; i < n; ++i) p[i] = v[i];
    }
  }
}

// The same for the n < kLanes<A> elements at the end of a row; the missing lanes read as zero.
template <class A, class T>
MAEFAST_INLINE vec<A> load(const T* p, int n) {
  T wide[kLanes<A>] = {};
  __builtin_memcpy(wide, p, n * sizeof(T));
  return load<A>(wide);
}

template <class A, class T>
MAEFAST_INLINE void store(T* p, vec<A> v, int n) {
  T wide[kLanes<A>];
  store<A>(wide, v);
  __builtin_memcpy(p, wide, n * sizeof(T));
}

template <int L>
struct Full {
  static constexpr int n = L;
};
template <class A, class T, int L>
MAEFAST_INLINE vec<A> load(const T* p, Full<L>) {
  return load<A>(p);
}
template <class A, class T, int L>
MAEFAST_INLINE void store(T* p, vec<A> v, Full<L>) {
  store<A>(p, v);
}

// Calls f(i, lanes) for the vectors of a row of n elements; `lanes` goes to load and store.
template <class A, class F>
MAEFAST_INLINE void for_lanes(int64_t n, const F& f) {
  constexpr int w = kLanes<A>;
  int64_t i = 0;
  for (; i + w <= n; i += w) f(i, Full<w>{});
  if (i < n) f(i, int(n - i));
}

// Zero in the lanes beyond the end of the row, v elsewhere.
template <class A>
MAEFAST_INLINE vec<A> keep_lanes(vec<A> v, int n) {
  for (int i = n; i < kLanes<A>; ++i) v[i] = 0;
  return v;
}
template <class A, int L>
MAEFAST_INLINE vec<A> keep_lanes(vec<A> v, Full<L>) {
  return v;
}

// Lane i ^ w of a register for each lane i, as a constant.
template <class I, int L, int w>
struct Swap {
  I from[L];
  constexpr Swap() : from{} {
    for (int i = 0; i < L; ++i) from[i] = i ^ w;
  }
};
template <class I, int L, int w>
constexpr Swap<I, L, w> kSwap{};

// Halves are added to each other, then quarters, and so on; in registers, because a round through memory
// costs more than a pass over a short row.
template <class A, int w = kLanes<A> / 2>
MAEFAST_INLINE A sum_lanes(vec<A> v) {
  if constexpr (w == 0) {
    return v[0];
  } else {
#if defined(__GNUC__) && !defined(__clang__)
    using I = either<is_same<A, double>, int64_t, int32_t>;
    using V = either<is_same<A, double>, vec_i64, vec_i32>;
    v += __builtin_shuffle(v, load_raw<V>(kSwap<I, kLanes<A>, w>.from));
#else
    for (int i = 0; i < w; ++i) v[i] += v[i + w];
#endif
    return sum_lanes<A, w / 2>(v);
  }
}

// ---- rows

// Sum of f(i, lanes) over the vectors of a row, in four independent chains.
template <class A, class F>
MAEFAST_INLINE A sum_row(int64_t n, const F& f) {
  constexpr int w = kLanes<A>;
  vec<A> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w)
    for (int j = 0; j < 4; ++j) sum[j] += f(i + j * w, Full<w>{});
  for (; i + w <= n; i += w) sum[0] += f(i, Full<w>{});
  if (i < n) sum[1] += f(i, int(n - i));
  return sum_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// y = x, converted.
template <class X, class Y>
MAEFAST_INLINE void convert_row(const X* __restrict x, Y* __restrict y, int64_t n) {
  if constexpr (is_same<X, Y>) {
    __builtin_memcpy(y, x, size_t(n) * sizeof(X));
  } else {
    using A = acc_t<X, Y>;
    for_lanes<A>(n, [&](int64_t i, auto lanes) { store<A>(y + i, load<A>(x + i, lanes), lanes); });
  }
}

template <class Y>
MAEFAST_INLINE void zero_row(Y* y, int64_t n) {
  __builtin_memset(y, 0, size_t(n) * sizeof(Y));
}

// y = a + b, rounded once.
template <class X, class Z, class Y>
MAEFAST_INLINE void add_rows(const X* __restrict a, const Z* __restrict b, Y* __restrict y, int64_t n) {
  using A = acc_t<Y>;
  for_lanes<A>(n, [&](int64_t i, auto lanes) {
    store<A>(y + i, load<A>(a + i, lanes) + load<A>(b + i, lanes), lanes);
  });
}

// sum += x.
template <class A, class X>
MAEFAST_INLINE void accumulate_row(A* __restrict sum, const X* __restrict x, int64_t n) {
  for_lanes<A>(n, [&](int64_t i, auto lanes) {
    store<A>(sum + i, load<A>(sum + i, lanes) + load<A>(x + i, lanes), lanes);
  });
}

// Marks that a plan does not fit its tensors; the host raises once the threads are done.
MAEFAST_INLINE void fail(int32_t* failed) {
  __atomic_store_n(failed, 1, __ATOMIC_RELAXED);
}

// Sample whose packed rows hold row r, where sample b's rows start at cu[b] + b * prefix.
MAEFAST_INLINE int64_t sample_of(const int32_t* cu, int64_t batch, int64_t prefix, int64_t r) {
  int64_t b = 0;
  for (int64_t high = batch; b + 1 < high;) {
    const int64_t middle = (b + high) / 2;
    if (cu[middle] + middle * prefix <= r) {
      b = middle;
    } else {
      high = middle;
    }
  }
  return b;
}

}  // namespace
}  // namespace maefast::MAEFAST_ISA
