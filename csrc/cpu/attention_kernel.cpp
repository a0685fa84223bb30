// Forward: online softmax over blocks of keys (Milakov and Gimelshein, 2018; Dao et al., 2022). A sequence of
// up to kMostKeys keys is one block.
#include "cpu/attention_format.h"

namespace maefast::MAEFAST_ISA {
namespace {

struct Space {
  float *queries, *scores, *k, *v, *out;
  float *turned_q, *turned_k;  // rows, rotated
  // of each query: running maximum, sum of exponentials, sum of p t with t relative to the maximum, sum of p
  // over marked keys, and what earlier sums are multiplied with
  float *max, *sum, *entropy, *mass, *rescale;
  int64_t size;

  MAEFAST_INLINE Space(const AttentionArgs& a, float* scratch) {
    const int64_t keys = least(a.max_k, kMostKeys) + 1;
    const int64_t padded = round_up(a.width, kLane);
    Cutter cut{scratch};
    queries = cut(a.width * kRowFloats);
    scores = cut(keys * kRowFloats);
    k = cut(keys * padded);
    v = cut(keys * padded);
    out = cut(kQueries * padded);
    turned_q = cut(a.cos ? least(a.max_q, a.chunk) * a.width : 0);
    turned_k = cut(a.cos ? a.max_k * a.width : 0);
    max = cut(kQueries);
    sum = cut(kQueries);
    entropy = cut(kQueries);
    mass = cut(kQueries);
    rescale = cut(kQueries);
    size = cut.at - scratch;
  }
};

// Of base 2, from which on a score less the maximum is taken before the factor. Without fma the factor rounds
// it.
#if defined(__AVX2__) && defined(__FMA__)
constexpr float kLargeScore = 1 << 24;
#else
constexpr float kLargeScore = 64;
#endif

// Turns the scores of a vector of queries, rows s[key * ld], into the words of their exponentials.
template <class Format>
MAEFAST_INLINE void softmax_column(float* s, int64_t ld, int64_t keys, int64_t lane, const Scores& scores,
                                   const uint8_t* marked, const Space& space, bool stats) {
  s += lane;
  vec_f32 top = all(-kInfinity), product = top;  // the largest score of these keys, and the product it is of
  float factor = scores.factor;
  if (scores.plain()) {
    vec_f32 other = top;  // two chains: each step waits for the last
    int64_t j = 0;
    for (; j + 1 < keys; j += 2) {
      top = larger(top, load<float>(s + j * ld));
      other = larger(other, load<float>(s + (j + 1) * ld));
    }
    if (j < keys) top = larger(top, load<float>(s + j * ld));
    product = larger(top, other);
    top = product * all(factor);
  } else {
    for (int64_t j = 0; j < keys; ++j) {
      const vec_f32 t = scores.of(load<float>(s + j * ld), j, lane);
      store<float>(s + j * ld, t);
      top = larger(top, t);
    }
    factor = 1;
  }
  const vec_f32 before = load<float>(space.max + lane);
  const vec_f32 own = top;
  top = larger(before, top);
  const vec_f32 base = top == -kInfinity ? vec_f32{} : top;  // every key ruled out so far
  const vec_f32 rescale = exp2(before - base);
  const vec_f32 old_sum = load<float>(space.sum + lane);
  store<float>(space.max + lane, top);
  store<float>(space.rescale + lane, rescale);
  vec_f32 sum = old_sum * rescale;
  const vec_f32 f = all(factor);

  const auto exponentials = [&](const auto& each) {
    const float* from = s;
    float* to = s;
    int64_t j = 0;
#if defined(__AVX512BF16__)
    if constexpr (Format::kPair == 2) {  // row j / 2 is written after it was read
      for (; j + 1 < keys; j += 2, from += 2 * ld, to += ld) {
        const vec_f32 first = each(j, load<float>(from));
        store_pairs(to, round_both(first, each(j + 1, load<float>(from + ld))));
      }
      if (j < keys) store_pairs(to, round_both(each(j, load<float>(from)), vec_f32{}));
      return;
    }
#endif
    for (; j < keys; ++j, from += ld, to += ld) store<float>(to, each(j, load<float>(from)));
  };
  // In the last of these forms the maximum's exponent is what base was rounded by, in the end more than exp2
  // takes.
  if (!stats && scores.plain() && any(magnitude(base) > kLargeScore)) {
    const vec_f32 from = product == -kInfinity ? vec_f32{} : product, rest = own - base;
    exponentials([&](int64_t, vec_f32 score) {
      const vec_f32 p = exp2(fma(score - from, f, rest));
      sum = sum + p;
      return p;
    });
  } else if (!stats) {
    exponentials([&](int64_t, vec_f32 score) {
      const vec_f32 p = exp2(fma(score, f, -base));
      sum = sum + p;
      return p;
    });
  } else {
    const vec_f32 moved = before == -kInfinity ? vec_f32{} : before - base;
    vec_f32 entropy = fma(moved, old_sum, load<float>(space.entropy + lane)) * rescale;
    vec_f32 mass = load<float>(space.mass + lane) * rescale;
    exponentials([&](int64_t j, vec_f32 score) {
      const vec_f32 t = score * f - base;  // exactly 0 for the maximum, so that no entropy is negative
      const vec_f32 p = exp2(t);
      sum = sum + p;
      entropy = p == 0.f ? entropy : fma(p, t, entropy);
      if (marked && marked[j]) mass = mass + p;
      return p;
    });
    store<float>(space.entropy + lane, entropy);
    store<float>(space.mass + lane, mass);
  }
  store<float>(space.sum + lane, sum);
}

// The results of n queries from their running sums.
template <class T>
MAEFAST_INLINE void finish(const AttentionArgs& a, const Space& space, int64_t first, int64_t n, int64_t h) {
  const bool stats = a.entropy != nullptr;
  for (int64_t i = 0; i < n; i += kLane) {
    const vec_f32 sum = load<float>(space.sum + i);
    const vec_f32 inverse = sum == 0.f ? vec_f32{} : 1.f / sum;  // no keys: zeros
    const vec_f32 log_sum = log(sum);
    const vec_f32 lse = fma(load<float>(space.max + i), all(kLn2), log_sum);
    store<float>(space.max + i, lse);
    store<float>(space.sum + i, inverse);
    if (stats) {
      const vec_f32 mean = load<float>(space.entropy + i) * inverse;  // of t
      store<float>(space.entropy + i, sum == 0.f ? vec_f32{} : log_sum - mean * kLn2);
      store<float>(space.mass + i, load<float>(space.mass + i) * inverse);
    }
  }
  const int64_t padded = round_up(a.width, kLane);
  T* out = static_cast<T*>(a.out) + first * a.out_row + h * a.width;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = (first + i) * a.heads + h;
    a.lse[row] = space.max[i];
    if (stats) a.entropy[row] = space.entropy[i];
    if (a.mass) a.mass[row] = space.mass[i];
    scale_row(space.out + i * padded, space.sum[i], out + i * a.out_row, a.width);
  }
}

template <class Format>
void forward_task(const AttentionArgs& a, int64_t task, float* scratch) {
  using T = typename Format::Element;
  using Step = typename Format::Step;
  const auto [b, h, chunk] = place_of(a, task, a.chunks);
  const Head<T> head(a, b, h);
  const int64_t from = chunk * a.chunk;
  const int64_t to = least(head.nq, from + a.chunk);
  if (from >= to) return;
  Step::begin();
  const Space space(a, scratch);
  const int64_t width = a.width, padded = round_up(width, kLane);
  const bool stats = a.entropy != nullptr;
  const int64_t block = block_size(to - from, kQueries, kLane);
  const int64_t key_block = block_size(head.nk, kMostKeys, 1);
  Ahead ahead(width * int64_t(sizeof(T)));
  if (task + 1 < a.batch * a.heads && a.chunks == 1) {
    const Place place = place_of(a, task + 1, 1);
    const Head<T> next(a, place.b, place.h);
    ahead.add(next.q, a.q_row * int64_t(sizeof(T)), next.nq, false);
    ahead.add(next.k, a.k_row * int64_t(sizeof(T)), next.nk, false);
    ahead.add(next.v, a.k_row * int64_t(sizeof(T)), next.nk, false);
    ahead.add(static_cast<T*>(a.out) + next.q0 * a.out_row + next.offset, a.out_row * int64_t(sizeof(T)),
              next.nq, true);
  }
  Rows<T> queries{head.q + from * a.q_row, a.q_row}, key_rows{head.k, a.k_row};
  if (a.cos) {
    const int64_t turn = first_turn(a, head.q0);
    queries = rotate_rows(a, queries, to - from, turn + from, space.turned_q);
    key_rows = rotate_rows(a, key_rows, head.nk, turn, space.turned_k);
  }
  Left k{};
  Right v{};
  int64_t at_keys = -1;  // first of the keys in k and v
  for (int64_t i0 = from; i0 < to; i0 += block) {
    const int64_t n = least(block, to - i0);
    const int64_t lanes = round_up(n, kLane), ld = row_stride(lanes);
    Format::columns(queries.p + (i0 - from) * queries.stride, queries.stride, n, width, space.queries, ld);
    for (int64_t i = 0; i < lanes; i += kLane) {
      store<float>(space.max + i, all(-kInfinity));
      store<float>(space.sum + i, vec_f32{});
      store<float>(space.entropy + i, vec_f32{});
      store<float>(space.mass + i, vec_f32{});
    }
    const int64_t end = a.causal ? least(head.nk, i0 + n) : head.nk;
    for (int64_t j0 = 0; j0 < end; j0 += key_block) {
      const int64_t keys = least(key_block, head.nk - j0);
      if (at_keys != j0) {
        const auto [first, stride] = key_rows;
        const T* rows = first + j0 * stride;
        const Right wide = Format::kPair == 1 ? Format::right(rows, stride, keys, width, space.k) : Right{};
        k = Format::left(rows, stride, wide);
        v = Format::right(head.v + j0 * a.k_row, a.k_row, keys, width, space.v);
        at_keys = j0;
      }
      multiply<Step>(keys, lanes / kLane, words<Format>(width), k, {space.queries, ld}, space.scores, ld,
                     false, ahead);
      const Scores scores(a, b, head.k0 + j0, head.h, j0, i0);
      const uint8_t* marked = a.marked ? a.marked + head.k0 + j0 : nullptr;
      for (int64_t lane = 0; lane < lanes; lane += kLane)
        softmax_column<Format>(space.scores, ld, keys, lane, scores, marked, space, stats);
      if (j0 > 0)
        for (int64_t i = 0; i < n; ++i)
          scale_row(space.out + i * padded, space.rescale[i], space.out + i * padded, padded);
      multiply<Step>(n, padded / kLane, words<Format>(keys), {space.scores, 1, ld}, v, space.out, padded,
                     j0 > 0, ahead);
    }
    if (end == 0) zero_row(space.out, n * padded);
    finish<T>(a, space, head.q0 + i0, n, head.h);
  }
  Step::end();
}

void forward(const AttentionArgs& a, int64_t task, float* scratch) {
  if (a.type == DType::f32) return forward_task<Wide<float>>(a, task, scratch);
  if (a.type == DType::f16) return forward_task<Wide<f16>>(a, task, scratch);
  forward_task<BFloat16>(a, task, scratch);
}

int64_t scratch_floats(const AttentionArgs& a) {
  return Space(a, nullptr).size;
}

}  // namespace

extern const AttentionKernels attention_kernels = {scratch_floats, forward};

}  // namespace maefast::MAEFAST_ISA
