// Backward: scores and probabilities are computed again from lse. Keys in the outer loop, so that their
// gradients stay in the cache; those of the queries are summed in scratch memory, block after block. One task
// owns a sequence and head, or those of its group one after another: every sum has one order.
#include "cpu/attention_format.h"

namespace maefast::MAEFAST_ISA {
namespace {

struct Space {
  float *queries, *grads;  // columns of q and of the gradient, for a block of queries
  float *p, *ds;           // a row for each key
  float *p_rows, *ds_rows,
      *ds_pairs;            // the same as bfloat16: neighbours are queries in *_rows, keys in ds_pairs
  float *q, *grad, *k, *v;  // rows
  float *grad_q, *grad_k, *grad_v;
  float *turned_q, *turned_k;  // rows, rotated
  float* key_bias;
  float *lse, *constant, *entropy, *mass;  // of each query
  int64_t size;

  MAEFAST_INLINE Space(const AttentionBackwardArgs& a, float* scratch) {
    const int64_t keys = least(a.max_k, kMostKeys) + 1;
    const int64_t padded = round_up(a.width, kLane);
    const int64_t pairs = kHasPairs && a.type == DType::bf16 ? keys * kRowFloats / 2 : 0;
    const int64_t all_queries = round_up(a.max_q, kLane);
    Cutter cut{scratch};
    queries = cut(a.width * kRowFloats);
    grads = cut(a.width * kRowFloats);
    p = cut(keys * kRowFloats);
    ds = cut(keys * kRowFloats);
    p_rows = cut(pairs);
    ds_rows = cut(pairs);
    ds_pairs = cut(pairs);
    q = cut(kQueries * padded);
    grad = cut(kQueries * padded);
    k = cut(keys * padded);
    v = cut(keys * padded);
    grad_q = cut(all_queries * padded);
    grad_k = cut(keys * padded);
    grad_v = cut(keys * padded);
    turned_q = cut(a.cos ? a.max_q * a.width : 0);
    turned_k = cut(a.cos ? a.max_k * a.width : 0);
    key_bias = cut(keys);
    lse = cut(all_queries);
    constant = cut(all_queries);
    entropy = cut(all_queries);
    mass = cut(all_queries);
    size = cut.at - scratch;
  }
};

// dS = P * (dP + c - g_entropy * logP + g_mass * marked) with
// c = -delta + g_lse - g_entropy * entropy - g_mass * mass and delta = sum of P dP.
// `constant` is c, without delta where a block holds all keys and finds delta itself, as that is cheaper.

template <class T>
MAEFAST_INLINE void read_rows(const AttentionBackwardArgs& a, const Head<T>& head, const Space& space,
                              bool with_delta) {
  const int64_t end = round_up(head.nq, kLane);
  for (int64_t i = 0; i < end; ++i) {
    const int64_t row = (head.q0 + i) * a.heads + head.h;
    const float lse = i < head.nq ? a.lse[row] : -kInfinity;
    // P = 0 in the lanes beyond the last query and for a query that sees no key, whose statistics' gradients
    // may be infinite: 0 times them would be NaN.
    if (lse == -kInfinity) {
      space.lse[i] = kInfinity;
      space.constant[i] = space.entropy[i] = space.mass[i] = 0;
      continue;
    }
    space.lse[i] = lse * kLog2E;
    float c = a.grad_lse ? a.grad_lse[row] : 0;
    if (a.grad_entropy) {
      space.entropy[i] = a.grad_entropy[row];
      c -= a.grad_entropy[row] * a.entropy[row];
    }
    if (a.grad_mass) {
      space.mass[i] = a.grad_mass[row];
      c -= a.grad_mass[row] * a.mass[row];
    }
    if (with_delta) {
      const int64_t start = (head.q0 + i) * a.out_row + head.offset;
      c -= dot_rows(static_cast<const T*>(a.out) + start, static_cast<const T*>(a.grad) + start, a.width);
    }
    space.constant[i] = c;
  }
}

// lse has 24 bits, so that P is off by |lse| * 1e-7: 6e-6 from here on (base 2).
constexpr float kLargeSum = 64 * kLog2E;

// Products become log2 P where lse is large. Of all keys: but for a constant, by which their sum is not 1. Of
// some of them lse has to do, but no P exceeds 1.
void to_exponents(float* p, int64_t ld, int64_t keys, int64_t lane, const Scores& scores, const vec_f32& lse,
                  bool some) {
  const bool plain = scores.plain();
  const vec_f32 f = all(plain ? scores.factor : 1.f);
  const auto score = [&](int64_t j) {
    const vec_f32 product = load<float>(p + j * ld);
    return plain ? product : scores.of(product, j, lane);
  };
  vec_f32 top = all(-kInfinity);
  for (int64_t j = 0; j < keys; ++j) top = larger(top, score(j));
  top = top == -kInfinity ? vec_f32{} : top;
  for (int64_t j = 0; j < keys; ++j) {
    vec_f32 t = some ? fma(score(j), f, -lse) : (score(j) - top) * f;
    t = t > 0.f ? vec_f32{} : t;
    store<float>(p + j * ld, lse == kInfinity ? all(-kInfinity) : t);
  }
}

// From the products of a vector of queries, p = q k and ds = dP, to P and dS.
template <class Format>
MAEFAST_INLINE void gradient_column(const AttentionBackwardArgs& a, const Space& space, int64_t first_query,
                                    int64_t ld, int64_t keys, int64_t lane, const Scores& scores,
                                    const uint8_t* marked, bool with_delta) {
  float* p = space.p + lane;
  float* ds = space.ds + lane;
  const vec_f32 lse = load<float>(space.lse + first_query + lane);
  const bool large = any((magnitude(lse) > kLargeSum) & (lse < kInfinity));
  if (large) to_exponents(p, ld, keys, lane, scores, lse, with_delta);
  vec_f32 delta{}, sum{};
  const auto probability = [&](int64_t j, vec_f32 t) {
    const vec_f32 e = exp2(t);
    store<float>(p + j * ld, e);
    sum = sum + e;
    delta = fma(e, load<float>(ds + j * ld), delta);
    return e;
  };
  if (a.grad_entropy || a.grad_mass) {
    const vec_f32 g_entropy = a.grad_entropy ? load<float>(space.entropy + first_query + lane) : vec_f32{};
    const vec_f32 g_mass = a.grad_mass ? load<float>(space.mass + first_query + lane) : vec_f32{};
    for (int64_t j = 0; j < keys; ++j) {
      const vec_f32 product = load<float>(p + j * ld);
      const vec_f32 t = large ? product : scores.of(product, j, lane) - lse;
      const vec_f32 e = probability(j, t);
      vec_f32 more = e == 0.f ? vec_f32{} : g_entropy * t * -kLn2;
      if (marked && marked[j]) more = more + g_mass;
      store<float>(ds + j * ld, load<float>(ds + j * ld) + more);
    }
  } else if (large) {
    for (int64_t j = 0; j < keys; ++j) probability(j, load<float>(p + j * ld));
  } else if (!scores.plain()) {
    for (int64_t j = 0; j < keys; ++j) probability(j, scores.of(load<float>(p + j * ld), j, lane) - lse);
  } else {
    const vec_f32 f = all(scores.factor);
    for (int64_t j = 0; j < keys; ++j) probability(j, fma(load<float>(p + j * ld), f, -lse));
  }
  vec_f32 c = load<float>(space.constant + first_query + lane);
  // The sum of P is 1 but for the rounding of lse; with it a row of dS sums to zero as closely as it can.
  if (!with_delta) c = c - delta / larger(all(1e-30f), sum);
  if (large && !with_delta) {
    const vec_f32 inverse = 1.f / larger(all(1e-30f), sum);
    for (int64_t j = 0; j < keys; ++j) store<float>(p + j * ld, load<float>(p + j * ld) * inverse);
    if (a.grad_entropy) {  // the constant was not in log P
      const vec_f32 g_entropy = load<float>(space.entropy + first_query + lane);
      c = c + (sum == 0.f ? vec_f32{} : g_entropy * log(sum));
    }
  }
  const auto gradient = [c](const float* p, const float* ds) {
    return load<float>(p) * (load<float>(ds) + c);
  };
  const bool summed = a.grad_key_bias || a.grad_bias;
  if (Format::kPair == 1 || summed)
    for (int64_t j = 0; j < keys; ++j) store<float>(ds + j * ld, gradient(p + j * ld, ds + j * ld));
#if defined(__AVX512BF16__)
  if constexpr (Format::kPair == 2) {
    if (keys % 2 != 0) {  // a row more, of zeros
      store<float>(p + keys * ld, vec_f32{});
      store<float>(ds + keys * ld, vec_f32{});
    }
    bf16* p_rows = reinterpret_cast<bf16*>(space.p_rows) + lane;
    bf16* ds_rows = reinterpret_cast<bf16*>(space.ds_rows) + lane;
    float* ds_pairs = space.ds_pairs + lane;
    for (int64_t j = 0; j < keys; j += 2, p += 2 * ld, ds += 2 * ld, p_rows += 2 * ld, ds_rows += 2 * ld) {
      const __m512i both = summed ? round_both(load<float>(ds), load<float>(ds + ld))
                                  : round_both(gradient(p, ds), gradient(p + ld, ds + ld));
      store_rows(p_rows, p_rows + ld, round_both(load<float>(p), load<float>(p + ld)));
      store_rows(ds_rows, ds_rows + ld, both);
      store_pairs(ds_pairs, both);
      ds_pairs += ld;
    }
  }
#endif
}

// sums = dS, or += with `add`, a row for each key.
MAEFAST_INLINE void add_scores(const float* ds, int64_t ld, int64_t keys, int64_t lanes, float* sums,
                               int64_t row, bool add) {
  for (int64_t j = 0; j < keys; ++j, ds += ld, sums += row)
    for (int64_t i = 0; i < lanes; i += kLane) {
      const vec_f32 x = load<float>(ds + i);
      store<float>(sums + i, add ? load<float>(sums + i) + x : x);
    }
}

// Sequence b and head h. `sums`: those of the bias' gradient for its group and head, or null; `add`: to what
// is there.
template <class Format>
void backward_sequence(const AttentionBackwardArgs& a, int64_t b, int64_t h, float* sums, bool add,
                       float* scratch) {
  using T = typename Format::Element;
  using Step = typename Format::Step;
  const Head<T> head(a, b, h);
  Step::begin();
  const Space space(a, scratch);
  const int64_t width = a.width, padded = round_up(width, kLane), vectors = padded / kLane;
  const int64_t block = block_size(head.nq, kQueries, kLane);
  const int64_t key_block = block_size(head.nk, kMostKeys, 1);
  const bool with_delta = key_block < head.nk;
  Ahead ahead(width * int64_t(sizeof(T)));
  const int64_t next_b = a.bias ? b + a.groups : b + (h + 1) / a.heads;
  if (next_b < a.batch && !with_delta) {
    const int64_t row = a.q_row * int64_t(sizeof(T)), k_row = a.k_row * int64_t(sizeof(T)),
                  out_row = a.out_row * int64_t(sizeof(T));
    const Head<T> next(a, next_b, a.bias ? h : (h + 1) % a.heads);
    ahead.add(next.q, row, next.nq, false);
    ahead.add(static_cast<const T*>(a.grad) + next.q0 * a.out_row + next.offset, out_row, next.nq, false);
    ahead.add(next.k, k_row, next.nk, false);
    ahead.add(next.v, k_row, next.nk, false);
    ahead.add(static_cast<T*>(a.grad_q) + next.q0 * a.q_row + next.offset, row, next.nq, true);
    ahead.add(static_cast<T*>(a.grad_k) + next.k0 * a.k_row + next.offset, k_row, next.nk, true);
    ahead.add(static_cast<T*>(a.grad_v) + next.k0 * a.k_row + next.offset, k_row, next.nk, true);
  }
  read_rows(a, head, space, with_delta);
  Rows<T> queries{head.q, a.q_row}, key_rows{head.k, a.k_row};
  const int64_t turn = first_turn(a, head.q0);
  if (a.cos) {
    queries = rotate_rows(a, queries, head.nq, turn, space.turned_q);
    key_rows = rotate_rows(a, key_rows, head.nk, turn, space.turned_k);
  }
  if (head.nk == 0) zero_row(space.grad_q, head.nq * padded);
  T* grad_q = static_cast<T*>(a.grad_q) + head.q0 * a.q_row + head.offset;
  T* grad_k = static_cast<T*>(a.grad_k) + head.k0 * a.k_row + head.offset;
  T* grad_v = static_cast<T*>(a.grad_v) + head.k0 * a.k_row + head.offset;
  for (int64_t j0 = 0; j0 < head.nk; j0 += key_block) {
    const int64_t keys = least(key_block, head.nk - j0);
    const T* k_rows = key_rows.p + j0 * key_rows.stride;
    const T* v_rows = head.v + j0 * a.k_row;
    const Right k = Format::right(k_rows, key_rows.stride, keys, width, space.k);
    const Right wide_v = Format::kPair == 1 ? Format::right(v_rows, a.k_row, keys, width, space.v) : Right{};
    const Left k_words = Format::left(k_rows, key_rows.stride, k);
    const Left v_words = Format::left(v_rows, a.k_row, wide_v);
    const uint8_t* marked = a.marked ? a.marked + head.k0 + j0 : nullptr;
    zero_row(space.key_bias, a.grad_key_bias ? keys : 0);
    // With `causal`, queries before these keys do not see them; a block more costs little.
    const int64_t start = a.causal ? j0 / (block > 0 ? block : 1) * block : 0;
    if (start >= head.nq) {
      zero_row(space.grad_k, keys * padded);
      zero_row(space.grad_v, keys * padded);
    }
    for (int64_t i0 = start; i0 < head.nq; i0 += block) {
      const int64_t n = least(block, head.nq - i0);
      const int64_t lanes = round_up(n, kLane), ld = row_stride(lanes);
      const T* q_rows = queries.p + i0 * queries.stride;
      const T* grad_rows = static_cast<const T*>(a.grad) + (head.q0 + i0) * a.out_row + head.offset;
      Format::columns(q_rows, queries.stride, n, width, space.queries, ld);
      Format::columns(grad_rows, a.out_row, n, width, space.grads, ld);
      const Right q = Format::right(q_rows, queries.stride, n, width, space.q);
      const Right grad = Format::right(grad_rows, a.out_row, n, width, space.grad);
      multiply<Step>(keys, lanes / kLane, words<Format>(width), k_words, {space.queries, ld}, space.p, ld,
                     false, ahead);
      multiply<Step>(keys, lanes / kLane, words<Format>(width), v_words, {space.grads, ld}, space.ds, ld,
                     false, ahead);
      const Scores scores(a, b, head.k0 + j0, head.h, j0, i0);
      for (int64_t lane = 0; lane < lanes; lane += kLane)
        gradient_column<Format>(a, space, i0, ld, keys, lane, scores, marked, with_delta);
      if (a.grad_key_bias)
        for (int64_t j = 0; j < keys; ++j) {
          vec_f32 sum = load<float>(space.ds + j * ld);
          for (int64_t i = kLane; i < lanes; i += kLane) sum = sum + load<float>(space.ds + j * ld + i);
          space.key_bias[j] += sum_lanes<float>(sum);
        }
      if (sums) add_scores(space.ds, ld, keys, lanes, sums + j0 * a.bias_row + i0, a.bias_row, add);
      const bool pair = Format::kPair == 2;
      const Left p{pair ? space.p_rows : space.p, ld / Format::kPair, 1};
      const Left ds{pair ? space.ds_rows : space.ds, ld / Format::kPair, 1};
      const Left ds_columns{pair ? space.ds_pairs : space.ds, 1, ld};
      multiply<Step>(keys, vectors, words<Format>(n), p, grad, space.grad_v, padded, i0 > start, ahead);
      multiply<Step>(keys, vectors, words<Format>(n), ds, q, space.grad_k, padded, i0 > start, ahead);
      multiply<Step>(n, vectors, words<Format>(keys), ds_columns, k, space.grad_q + i0 * padded, padded,
                     j0 > 0, ahead);
    }
    for (int64_t j = 0; j < keys; ++j) {
      if (a.cos) rotate_back(a, space.grad_k + j * padded, turn + j0 + j);
      scale_row(space.grad_k + j * padded, a.scale, grad_k + (j0 + j) * a.k_row, width);
      scale_row(space.grad_v + j * padded, 1, grad_v + (j0 + j) * a.k_row, width);
      if (a.grad_key_bias) a.grad_key_bias[(head.k0 + j0 + j) * a.heads + head.h] = space.key_bias[j];
    }
  }
  for (int64_t i = 0; i < head.nq; ++i) {
    if (a.cos) rotate_back(a, space.grad_q + i * padded, turn + i);
    scale_row(space.grad_q + i * padded, a.scale, grad_q + i * a.q_row, width);
  }
  Step::end();
}

template <class Format>
void backward_task(const AttentionBackwardArgs& a, int64_t task, float* scratch) {
  if (!a.grad_bias) {
    const Place place = place_of(a, task, 1);
    return backward_sequence<Format>(a, place.b, place.h, nullptr, false, scratch);
  }
  const int64_t h = task % a.heads, group = task / a.heads % a.groups, piece = task / a.heads / a.groups;
  const int64_t matrix = a.max_k * a.bias_row, turns = a.batch / a.groups;
  const int64_t first = turns * piece / a.pieces, last = turns * (piece + 1) / a.pieces;
  float* sums = a.grad_bias + task * matrix;
  const bool zeroed = a.causal || first == last;  // pairs that nothing is written for
  if (zeroed) zero_row(sums, matrix);
  for (int64_t i = first; i < last; ++i)
    backward_sequence<Format>(a, i * a.groups + group, h, sums, zeroed || i > first, scratch);
}

void backward(const AttentionBackwardArgs& a, int64_t task, float* scratch) {
  if (a.type == DType::f32) return backward_task<Wide<float>>(a, task, scratch);
  if (a.type == DType::f16) return backward_task<Wide<f16>>(a, task, scratch);
  backward_task<BFloat16>(a, task, scratch);
}

int64_t scratch_floats(const AttentionBackwardArgs& a) {
  return Space(a, nullptr).size;
}

}  // namespace

extern const AttentionBackwardKernels attention_backward_kernels = {scratch_floats, backward};

}  // namespace maefast::MAEFAST_ISA
