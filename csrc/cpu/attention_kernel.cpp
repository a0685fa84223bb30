// Scores stand transposed: a row for each key, a lane for each query. Then everything that belongs to a query
// (maximum, sum, logarithm, statistics) is vertical, and lanes beyond the last query need no mask: nothing
// reads them.
#include "cpu/attention_kernel.h"

#include "cpu/attention_tile.h"

namespace maefast::MAEFAST_ISA {
namespace {

constexpr int64_t kQueries = 64;    // of a block
constexpr int64_t kMostKeys = 256;  // of a block: its scores stay in the second-level cache

// Scores of the reference are natural; here they carry a factor log2(e), for exp2.
constexpr int64_t block_count(int64_t n, int64_t most) {
  return (n + most - 1) / most;
}
// Even blocks of at most `most`, a multiple of `unit`.
constexpr int64_t block_size(int64_t n, int64_t most, int64_t unit) {
  const int64_t blocks = block_count(n, most);
  const int64_t even = blocks > 0 ? (n + blocks - 1) / blocks : 0;
  return (even + unit - 1) / unit * unit;
}

// One sequence and head.
template <class T>
struct Head {
  int64_t q0, nq, k0, nk, h;
  const T* q;
  const T* k;
  const T* v;

  Head(const Sequences& s, int64_t b, int64_t head) : h(head) {
    q0 = s.cu_q ? s.cu_q[b] : b * s.max_q;
    nq = s.cu_q ? s.cu_q[b + 1] - q0 : s.max_q;
    k0 = s.cu_k ? s.cu_k[b] : b * s.max_k;
    nk = s.cu_k ? s.cu_k[b + 1] - k0 : s.max_k;
    q = static_cast<const T*>(s.q) + q0 * s.q_row + h * s.width;
    k = static_cast<const T*>(s.k) + k0 * s.k_row + h * s.width;
    v = static_cast<const T*>(s.v) + k0 * s.k_row + h * s.width;
  }
};

// Rows of keys, values, ... as float32 words: in place, or widened into `space`.
template <class T>
MAEFAST_INLINE Right words_of(const T* rows, int64_t stride, int64_t count, int64_t width, float* space) {
  if constexpr (is_same<T, float>) {
    if (width % kLane == 0) return {rows, stride};
  }
  widen_rows(rows, stride, count, width, space);
  return {space, round_up(width, kLane)};
}
MAEFAST_INLINE Left by_row(Right x) {
  return {x.p, x.row, 1};
}
MAEFAST_INLINE Left by_column(Right x) {
  return {x.p, 1, x.row};
}

// t = scores * log2(e) of one key for the queries of one vector, -inf where the key comes later.
struct Scores {
  float factor;  // scale * log2(e)
  const float* bias;
  int64_t bias_row;
  bool causal;
  int64_t first_query, first_key;

  MAEFAST_INLINE bool plain() const { return bias == nullptr && !causal && factor >= 0; }
  MAEFAST_INLINE vec_f32 at(vec_f32 s, int64_t key, int64_t lane) const {
    s = s * all(factor);
    if (bias) s = s + all(bias[key * bias_row] * kLog2E);
    if (causal) {
      const int32_t ahead = int32_t(first_key + key - first_query - lane);  // lanes below are too early
      vec_i32 index;
      for (int i = 0; i < kLane; ++i) index[i] = i;
      s = index >= ahead ? s : all(-kInfinity);
    }
    return s;
  }
};

// ---- forward ----

// Running maximum, sum of exponentials and statistics of a block of queries.
struct Rows {
  float* max;
  float* sum;
  float* entropy;  // sum of p t, relative to max
  float* mass;
  float* rescale;  // what earlier sums are multiplied with
};

// Exponentials of a vector of queries over `keys` rows of s, in place.
MAEFAST_INLINE void softmax_column(float* s, int64_t ld, int64_t keys, int64_t lane, const Scores& scores,
                                   const uint8_t* marked, const Rows& rows, bool stats) {
  vec_f32 top = all(-kInfinity);
  float factor = scores.factor;
  s += lane;
  if (scores.plain()) {
    for (int64_t j = 0; j < keys; ++j) top = larger(top, load<float>(s + j * ld));
    top = top * all(factor);
  } else {
    for (int64_t j = 0; j < keys; ++j) {
      const vec_f32 t = scores.at(load<float>(s + j * ld), j, lane);
      store<float>(s + j * ld, t);
      top = larger(top, t);
    }
    factor = 1;
  }
  const vec_f32 before = load<float>(rows.max + lane);
  top = larger(before, top);
  store<float>(rows.max + lane, top);
  const vec_f32 base = top == -kInfinity ? vec_f32{} : top;  // all keys ruled out so far
  const vec_f32 rescale = exp2(before - base);
  store<float>(rows.rescale + lane, rescale);
  vec_f32 sum = load<float>(rows.sum + lane) * rescale;
  const vec_f32 f = all(factor);
  if (!stats) {
    for (int64_t j = 0; j < keys; ++j) {
      const vec_f32 p = exp2(fma(load<float>(s + j * ld), f, -base));
      store<float>(s + j * ld, p);
      sum = sum + p;
    }
  } else {
    vec_f32 entropy = load<float>(rows.entropy + lane);
    const vec_f32 moved = before == -kInfinity ? vec_f32{} : before - base;
    entropy = (entropy + moved * load<float>(rows.sum + lane)) * rescale;
    vec_f32 mass = load<float>(rows.mass + lane) * rescale;
    for (int64_t j = 0; j < keys; ++j) {
      const vec_f32 t = fma(load<float>(s + j * ld), f, -base);
      const vec_f32 p = exp2(t);
      store<float>(s + j * ld, p);
      sum = sum + p;
      entropy = p == 0.f ? entropy : fma(p, t, entropy);
      if (marked && marked[j]) mass = mass + p;
    }
    store<float>(rows.entropy + lane, entropy);
    store<float>(rows.mass + lane, mass);
  }
  store<float>(rows.sum + lane, sum);
}

struct ForwardSpace {
  int64_t keys, padded;
  float *queries, *scores, *k, *v, *out;
  Rows rows;
  int64_t size;

  ForwardSpace(const AttentionArgs& a, float* p) {
    keys = block_size(a.max_k, kMostKeys, 1);
    padded = round_up(a.width, kLane);
    float* const start = p;
    const auto take = [&](int64_t n) {
      float* const at = p;
      p += round_up(n, 16);
      return at;
    };
    queries = take(a.width * kQueries);
    scores = take(keys * kQueries);
    k = take(keys * padded);
    v = take(keys * padded);
    out = take(kQueries * padded);
    rows = {take(kQueries), take(kQueries), take(kQueries), take(kQueries), take(kQueries)};
    size = p - start;
  }
};

// Writes lane i of the row statistics of n queries to out[i * stride].
MAEFAST_INLINE void scatter(const float* row, int64_t n, float* out, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) out[i * stride] = row[i];
}

template <class T>
void forward_typed(const AttentionArgs& a, int64_t task, float* scratch) {
  const ForwardSpace space(a, scratch);
  const int64_t b = task / (a.chunks * a.heads);
  const int64_t chunk = task / a.heads % a.chunks;
  const Head<T> head(a, b, task % a.heads);
  const int64_t from = chunk * a.chunk;
  const int64_t to = least(head.nq, from + a.chunk);
  if (from >= to) return;
  const int64_t heads = a.heads;
  const int64_t padded = space.padded;
  const bool stats = a.entropy != nullptr;
  const Rows& rows = space.rows;
  const int64_t block = block_size(to - from, kQueries, kLane);
  const int64_t key_block = block_size(head.nk, kMostKeys, 1);
  Right k{}, v{};
  int64_t at_keys = -1;  // first of the keys in k and v
  for (int64_t i0 = from; i0 < to; i0 += block) {
    const int64_t n = least(block, to - i0);
    const int64_t ld = round_up(n, kLane);
    transpose_rows(head.q + i0 * a.q_row, a.q_row, n, a.width, space.queries, ld);
    for (int64_t i = 0; i < ld; i += kLane) {
      store<float>(rows.max + i, all(-kInfinity));
      store<float>(rows.sum + i, vec_f32{});
      store<float>(rows.entropy + i, vec_f32{});
      store<float>(rows.mass + i, vec_f32{});
    }
    const int64_t end = a.causal ? least(head.nk, i0 + n) : head.nk;
    for (int64_t j0 = 0; j0 < end; j0 += key_block) {
      const int64_t keys = least(key_block, head.nk - j0);
      if (at_keys != j0) {
        k = words_of(head.k + j0 * a.k_row, a.k_row, keys, a.width, space.k);
        v = words_of(head.v + j0 * a.k_row, a.k_row, keys, a.width, space.v);
        at_keys = j0;
      }
      multiply<Fma>(keys, ld / kLane, a.width, by_row(k), {space.queries, ld}, space.scores, ld, false);
      const int64_t first = (head.k0 + j0) * heads + head.h;
      const Scores scores{
          a.scale * kLog2E, a.key_bias ? a.key_bias + first : nullptr, heads, a.causal, i0, j0};
      const uint8_t* marked = a.marked ? a.marked + head.k0 + j0 : nullptr;
      for (int64_t lane = 0; lane < ld; lane += kLane)
        softmax_column(space.scores, ld, keys, lane, scores, marked, rows, stats);
      if (j0 > 0)
        for (int64_t i = 0; i < n; ++i)
          scale_row(space.out + i * padded, rows.rescale[i], space.out + i * padded, padded);
      multiply<Fma>(n, padded / kLane, keys, by_column({space.scores, ld}), v, space.out, padded, j0 > 0);
    }
    if (end == 0) zero_row(space.out, n * padded);
    const int64_t row = (head.q0 + i0) * heads + head.h;
    for (int64_t i = 0; i < ld; i += kLane) {
      const vec_f32 sum = load<float>(rows.sum + i);
      const vec_f32 inverse = sum == 0.f ? vec_f32{} : 1.f / sum;
      const vec_f32 log_sum = log(sum);
      const vec_f32 lse = sum == 0.f ? log_sum : fma(load<float>(rows.max + i), all(kLn2), log_sum);
      store<float>(rows.max + i, lse);
      store<float>(rows.sum + i, inverse);
      if (stats) {
        const vec_f32 mean = load<float>(rows.entropy + i) * inverse;  // of t
        store<float>(rows.entropy + i, sum == 0.f ? vec_f32{} : log_sum - mean * kLn2);
        store<float>(rows.mass + i, load<float>(rows.mass + i) * inverse);
      }
    }
    scatter(rows.max, n, a.lse + row, heads);
    if (stats) scatter(rows.entropy, n, a.entropy + row, heads);
    if (a.mass) scatter(rows.mass, n, a.mass + row, heads);
    T* out = static_cast<T*>(a.out) + (head.q0 + i0) * a.out_row + head.h * a.width;
    for (int64_t i = 0; i < n; ++i)
      scale_row(space.out + i * padded, rows.sum[i], out + i * a.out_row, a.width);
  }
}

// ---- backward ----

struct BackwardSpace {
  int64_t padded, keys;
  float *queries, *grads, *p, *ds, *q, *grad, *k, *v, *grad_q, *grad_k, *grad_v, *bias, *lse, *constant,
      *entropy, *mass;
  int64_t size;

  BackwardSpace(const AttentionBackwardArgs& a, float* at) {
    padded = round_up(a.width, kLane);
    keys = block_size(a.max_k, kMostKeys, 1);
    float* const start = at;
    const auto take = [&](int64_t n) {
      float* const here = at;
      at += round_up(n, 16);
      return here;
    };
    queries = take(a.width * kQueries);
    grads = take(a.width * kQueries);
    p = take(keys * kQueries);
    ds = take(keys * kQueries);
    q = take(kQueries * padded);
    grad = take(kQueries * padded);
    k = take(keys * padded);
    v = take(keys * padded);
    grad_q = take(kQueries * padded);
    grad_k = take(a.max_k * padded);
    grad_v = take(a.max_k * padded);
    bias = take(a.max_k);
    lse = take(kQueries);
    constant = take(kQueries);
    entropy = take(kQueries);
    mass = take(kQueries);
    size = at - start;
  }
};

// dS of a vector of queries: p holds scores and becomes probabilities, ds holds dP and becomes dS.
// dS = P * (dP + c - g_entropy * logP + g_mass * marked), c = -delta + g_lse - g_entropy * entropy - g_mass *
// mass; with whole rows at hand delta = sum P dP is part of this, else of `constant`. It is divided by sum P,
// which is 1 but for the rounding of lse, so that a row of dS sums to zero as closely as it can.
MAEFAST_INLINE void gradient_column(float* p, float* ds, int64_t ld, int64_t keys, int64_t lane,
                                    const Scores& scores, const uint8_t* marked, const BackwardSpace& space,
                                    bool whole, bool stats) {
  p += lane;
  ds += lane;
  const vec_f32 lse = load<float>(space.lse + lane);
  vec_f32 delta{}, sum{};
  if (scores.plain() && !stats) {
    const vec_f32 f = all(scores.factor);
    for (int64_t j = 0; j < keys; ++j) {
      const vec_f32 e = exp2(fma(load<float>(p + j * ld), f, -lse));
      store<float>(p + j * ld, e);
      sum = sum + e;
      delta = fma(e, load<float>(ds + j * ld), delta);
    }
  } else {
    const vec_f32 g_entropy = stats ? load<float>(space.entropy + lane) : vec_f32{};
    const vec_f32 g_mass = stats ? load<float>(space.mass + lane) : vec_f32{};
    for (int64_t j = 0; j < keys; ++j) {
      const vec_f32 t = scores.at(load<float>(p + j * ld), j, lane) - lse;
      const vec_f32 e = exp2(t);
      const vec_f32 dp = load<float>(ds + j * ld);
      store<float>(p + j * ld, e);
      sum = sum + e;
      delta = fma(e, dp, delta);
      if (stats) {
        vec_f32 more = e == 0.f ? vec_f32{} : g_entropy * t * -kLn2;
        if (marked && marked[j]) more = more + g_mass;
        store<float>(ds + j * ld, dp + more);
      }
    }
  }
  vec_f32 c = load<float>(space.constant + lane);
  if (whole) c = c - delta / larger(all(1e-30f), sum);
  for (int64_t j = 0; j < keys; ++j)
    store<float>(ds + j * ld, load<float>(p + j * ld) * (load<float>(ds + j * ld) + c));
}

// row[i] = x[i * stride] for n queries, `fill` up to the end of the vector; all `fill` without x.
MAEFAST_INLINE void gather(const float* x, int64_t stride, int64_t n, int64_t ld, float fill, float* row) {
  for (int64_t i = 0; i < ld; ++i) row[i] = x && i < n ? x[i * stride] : fill;
}

template <class T>
void backward_typed(const AttentionBackwardArgs& a, int64_t task, float* scratch) {
  const BackwardSpace space(a, scratch);
  const Head<T> head(a, task / a.heads, task % a.heads);
  const int64_t heads = a.heads, width = a.width, padded = space.padded, vectors = padded / kLane;
  const int64_t offset = head.h * width;
  const bool stats = a.grad_entropy || a.grad_mass;
  const int64_t block = block_size(head.nq, kQueries, kLane);
  const int64_t blocks = block > 0 ? (head.nq + block - 1) / block : 0;
  const int64_t key_block = block_size(head.nk, kMostKeys, 1);
  const bool whole = key_block == head.nk;
  if (a.grad_bias) zero_row(space.bias, head.nk);
  if (blocks == 0) {
    zero_row(space.grad_k, head.nk * padded);
    zero_row(space.grad_v, head.nk * padded);
  }
  Right k{}, v{};
  int64_t at_keys = -1;
  // From the last block on: with `causal` it is the one that touches every key.
  for (int64_t index = blocks - 1; index >= 0; --index) {
    const bool add = index < blocks - 1;
    const int64_t i0 = index * block;
    const int64_t n = least(block, head.nq - i0);
    const int64_t ld = round_up(n, kLane);
    const int64_t row = (head.q0 + i0) * heads + head.h;
    const T* q_rows = head.q + i0 * a.q_row;
    const T* grad_rows = static_cast<const T*>(a.grad) + (head.q0 + i0) * a.out_row + offset;
    transpose_rows(q_rows, a.q_row, n, width, space.queries, ld);
    transpose_rows(grad_rows, a.out_row, n, width, space.grads, ld);
    const Right q = words_of(q_rows, a.q_row, n, width, space.q);
    const Right grad = words_of(grad_rows, a.out_row, n, width, space.grad);
    gather(a.lse + row, heads, n, ld, kInfinity, space.lse);  // lanes beyond the last query get p = 0
    gather(a.grad_lse ? a.grad_lse + row : nullptr, heads, n, ld, 0, space.constant);
    gather(a.grad_entropy ? a.grad_entropy + row : nullptr, heads, n, ld, 0, space.entropy);
    gather(a.grad_mass ? a.grad_mass + row : nullptr, heads, n, ld, 0, space.mass);
    for (int64_t i = 0; i < n; ++i) {
      if (space.lse[i] == -kInfinity) space.lse[i] = kInfinity;  // no keys: p = 0
      float c = space.constant[i];
      if (a.grad_entropy) c -= space.entropy[i] * a.entropy[row + i * heads];
      if (a.grad_mass) c -= space.mass[i] * a.mass[row + i * heads];
      if (!whole) {
        const T* out = static_cast<const T*>(a.out) + (head.q0 + i0 + i) * a.out_row + offset;
        vec_f32 dot{};
        int64_t w = 0;
        for (; w + kLane <= width; w += kLane)
          dot = fma(load<float>(out + w), load<float>(grad_rows + i * a.out_row + w), dot);
        if (w < width)
          dot = fma(load_some(out + w, width - w), load_some(grad_rows + i * a.out_row + w, width - w), dot);
        c -= sum_lanes<float>(dot);
      }
      space.constant[i] = c;
    }
    for (int64_t i = 0; i < ld; i += kLane) store<float>(space.lse + i, load<float>(space.lse + i) * kLog2E);
    const int64_t end = a.causal ? least(head.nk, i0 + n) : head.nk;
    for (int64_t j0 = 0; j0 < end; j0 += key_block) {
      const int64_t keys = least(key_block, head.nk - j0);
      if (at_keys != j0) {
        k = words_of(head.k + j0 * a.k_row, a.k_row, keys, width, space.k);
        v = words_of(head.v + j0 * a.k_row, a.k_row, keys, width, space.v);
        at_keys = j0;
      }
      multiply<Fma>(keys, ld / kLane, width, by_row(k), {space.queries, ld}, space.p, ld, false);
      multiply<Fma>(keys, ld / kLane, width, by_row(v), {space.grads, ld}, space.ds, ld, false);
      const int64_t first = (head.k0 + j0) * heads + head.h;
      const Scores scores{
          a.scale * kLog2E, a.key_bias ? a.key_bias + first : nullptr, heads, a.causal, i0, j0};
      const uint8_t* marked = a.marked ? a.marked + head.k0 + j0 : nullptr;
      for (int64_t lane = 0; lane < ld; lane += kLane)
        gradient_column(space.p, space.ds, ld, keys, lane, scores, marked, space, whole, stats);
      if (a.grad_bias)
        for (int64_t j = 0; j < keys; ++j) {
          vec_f32 sum = load<float>(space.ds + j * ld);
          for (int64_t i = kLane; i < ld; i += kLane) sum = sum + load<float>(space.ds + j * ld + i);
          space.bias[j0 + j] += sum_lanes<float>(sum);
        }
      const Right p{space.p, ld}, ds{space.ds, ld};
      multiply<Fma>(keys, vectors, n, by_row(p), grad, space.grad_v + j0 * padded, padded, add);
      multiply<Fma>(keys, vectors, n, by_row(ds), q, space.grad_k + j0 * padded, padded, add);
      multiply<Fma>(n, vectors, keys, by_column(ds), k, space.grad_q, padded, j0 > 0);
    }
    if (end == 0) zero_row(space.grad_q, n * padded);
    T* grad_q = static_cast<T*>(a.grad_q) + (head.q0 + i0) * a.q_row + offset;
    for (int64_t i = 0; i < n; ++i)
      scale_row(space.grad_q + i * padded, a.scale, grad_q + i * a.q_row, width);
  }
  T* grad_k = static_cast<T*>(a.grad_k) + head.k0 * a.k_row + offset;
  T* grad_v = static_cast<T*>(a.grad_v) + head.k0 * a.k_row + offset;
  for (int64_t j = 0; j < head.nk; ++j) {
    scale_row(space.grad_k + j * padded, a.scale, grad_k + j * a.k_row, width);
    scale_row(space.grad_v + j * padded, 1, grad_v + j * a.k_row, width);
    if (a.grad_bias) a.grad_bias[(head.k0 + j) * heads + head.h] = space.bias[j];
  }
}

void forward(const AttentionArgs& a, int64_t task, float* scratch) {
  if (a.type == DType::f32) return forward_typed<float>(a, task, scratch);
  if (a.type == DType::f16) return forward_typed<f16>(a, task, scratch);
  forward_typed<bf16>(a, task, scratch);
}

void backward(const AttentionBackwardArgs& a, int64_t task, float* scratch) {
  if (a.type == DType::f32) return backward_typed<float>(a, task, scratch);
  if (a.type == DType::f16) return backward_typed<f16>(a, task, scratch);
  backward_typed<bf16>(a, task, scratch);
}

int64_t forward_scratch(const AttentionArgs& a) {
  return ForwardSpace(a, nullptr).size;
}
int64_t backward_scratch(const AttentionBackwardArgs& a) {
  return BackwardSpace(a, nullptr).size;
}

}  // namespace

extern const AttentionKernels attention_kernels = {forward_scratch, forward, backward_scratch, backward};

}  // namespace maefast::MAEFAST_ISA
