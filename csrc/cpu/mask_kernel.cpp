#include "cpu/mask_kernel.h"

#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

// Scores become signed integers in the same order: -0 equals +0, and every NaN is the largest. float32 and
// the 16-bit types take 32 bits, float64 takes 64.
template <class K>
constexpr K kNan = K(~(uint64_t(1) << (8 * sizeof(K) - 1)));

template <class A, class K>
using vec_key = either<is_same<K, int64_t>, vec_i64, vec_i32>;

template <class V, class K, int L>
MAEFAST_INLINE V load_keys(const K* p, Full<L>) {
  return load_raw<V>(p);
}
template <class V, class K>
MAEFAST_INLINE V load_keys(const K* p, int n) {
  K wide[sizeof(V) / sizeof(K)] = {};
  __builtin_memcpy(wide, p, size_t(n) * sizeof(K));
  return load_raw<V>(wide);
}
template <class V, class K, int L>
MAEFAST_INLINE void store_keys(K* p, V v, Full<L>) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class V, class K>
MAEFAST_INLINE void store_keys(K* p, V v, int n) {
  __builtin_memcpy(p, &v, size_t(n) * sizeof(K));
}

template <class T, class A, class K>
void make_keys(const T* scores, K* keys, int64_t n) {
  using V = vec_key<A, K>;
  for_lanes<A>(n, [&](int64_t i, auto lanes) {
    const vec<A> x = load<A>(scores + i, lanes);
    const V bits = (V)(x + A(0));  // -0 + 0 = +0
    const V ordered = bits ^ ((bits >> (8 * int(sizeof(K)) - 1)) & kNan<K>);
    const V nan = (V)(x != x);
    store_keys(keys + i, (ordered & ~nan) | (nan & kNan<K>), lanes);
  });
}

// Back from a key, or a vector of them, to the score.
template <class A, class V>
MAEFAST_INLINE auto score_of(V key) {
  if constexpr (sizeof(V) == sizeof(A)) {
    const V bits = key ^ ((key >> (8 * int(sizeof(V)) - 1)) & kNan<V>);
    A x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
  } else if constexpr (sizeof(A) == 4) {
    return (vec<A>)(key ^ ((key >> 31) & kNan<int32_t>));
  } else {
    return (vec<A>)(key ^ ((key >> 63) & kNan<int64_t>));
  }
}

template <class A>
constexpr A kHuge = is_same<A, double> ? A(1e300) : A(1e37);

// ---- order by score: a stable sort

// Drops each score into one of `buckets` equal intervals of [lowest, highest], in order, and mends the order
// inside the buckets by insertion: linear for noise. False (and nothing done) where the scores are not finite
// or pile up.
template <class A, class K>
bool bucket_sort(const K* keys, K* sorted, int32_t* ids, K* place, uint32_t* counts, int64_t buckets,
                 int64_t n) {
  using V = vec_key<A, K>;
  K low = keys[0], high = keys[0];
  for (int64_t i = 1; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  const A lowest = score_of<A>(low);
  const A scale = A(buckets - 1) / (score_of<A>(high) - lowest);
  if (!(scale > 0 && scale < kHuge<A>)) return false;  // also where a score is NaN or all are equal

  // Rounding never reverses the order of two scores, so the buckets are in order.
  for_lanes<A>(n, [&](int64_t i, auto lanes) {
    const V at = __builtin_convertvector((score_of<A>(load_keys<V>(keys + i, lanes)) - lowest) * scale, V);
    store_keys(place + i, at, lanes);
  });
  __builtin_memset(counts, 0, size_t(buckets) * sizeof(uint32_t));
  for (int64_t i = 0; i < n; ++i) ++counts[place[i]];
  uint32_t sum = 0;
  uint64_t pairs = 0;
  for (int64_t i = 0; i < buckets; ++i) {
    const uint32_t count = counts[i];
    counts[i] = sum;
    sum += count;
    pairs += uint64_t(count) * count;
  }
  if (pairs > 8 * uint64_t(n)) return false;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t to = counts[place[i]]++;
    sorted[to] = keys[i];
    ids[to] = int32_t(i);
  }
  for (int64_t i = 1; i < n; ++i) {
    const K key = sorted[i];
    if (sorted[i - 1] <= key) continue;
    const int32_t id = ids[i];
    int64_t j = i;
    for (; j > 0 && sorted[j - 1] > key; --j) {
      sorted[j] = sorted[j - 1];
      ids[j] = ids[j - 1];
    }
    sorted[j] = key;
    ids[j] = id;
  }
  return true;
}

// Least significant digit first; returns whichever of ids and ids2 holds the result.
template <int BITS, class K, class U>
int32_t* radix_sort(K* keys, K* keys2, int32_t* ids, int32_t* ids2, uint32_t* counts, int64_t n) {
  constexpr int kDigits = (8 * int(sizeof(K)) + BITS - 1) / BITS;
  constexpr int kBuckets = 1 << BITS;
  constexpr U kSign = U(1) << (8 * sizeof(K) - 1);
  __builtin_memset(counts, 0, sizeof(uint32_t) * kDigits * kBuckets);
  for (int64_t i = 0; i < n; ++i) {
    const U u = U(keys[i]) ^ kSign;
    for (int d = 0; d < kDigits; ++d) ++counts[d * kBuckets + ((u >> (d * BITS)) & (kBuckets - 1))];
  }
  bool first = true;  // ids are still 0, 1, 2, ...
  for (int d = 0; d < kDigits; ++d) {
    uint32_t* place = counts + d * kBuckets;
    const int shift = d * BITS;
    if (place[((U(keys[0]) ^ kSign) >> shift) & (kBuckets - 1)] == uint64_t(n))
      continue;  // one value everywhere
    uint32_t sum = 0;
    for (int i = 0; i < kBuckets; ++i) {
      const uint32_t count = place[i];
      place[i] = sum;
      sum += count;
    }
    for (int64_t i = 0; i < n; ++i) {
      const K key = keys[i];
      const uint32_t to = place[((U(key) ^ kSign) >> shift) & (kBuckets - 1)]++;
      keys2[to] = key;
      ids2[to] = first ? int32_t(i) : ids[i];
    }
    K* const k = keys;
    keys = keys2;
    keys2 = k;
    int32_t* const t = ids;
    ids = ids2;
    ids2 = t;
    first = false;
  }
  if (first)
    for (int64_t i = 0; i < n; ++i) ids[i] = int32_t(i);
  return ids;
}

constexpr int kSmallBits = 8;
constexpr int kLargeBits = 11;
constexpr int64_t kSmallMax = 1536;  // below this the 2048 buckets of the large digit cost more than a pass
constexpr int64_t kBucketMax =
    4096;  // beyond this the arrays leave the L1 cache, and fewer passes gain nothing

int64_t bucket_count(int64_t n) {
  int64_t buckets = 16;
  while (buckets < n) buckets *= 2;
  return buckets;
}

template <class A, class K, class U>
void by_score(const MaskArgs& a, int64_t b, K* keys, char* room) {
  const int64_t n = a.tokens;
  K* keys2 = reinterpret_cast<K*>(room);
  K* place = keys2 + n;
  int32_t* ids = reinterpret_cast<int32_t*>(place + n);
  int32_t* ids2 = ids + n;
  uint32_t* counts = reinterpret_cast<uint32_t*>(ids2 + n);
  if (n > kBucketMax || !bucket_sort<A>(keys, keys2, ids, place, counts, bucket_count(n), n)) {
    ids = n <= kSmallMax ? radix_sort<kSmallBits, K, U>(keys, keys2, ids, ids2, counts, n)
                         : radix_sort<kLargeBits, K, U>(keys, keys2, ids, ids2, counts, n);
  }
  const int32_t flat = int32_t(b * n);
  const int32_t start = a.cu[b];
  const int32_t start_masked = flat - start;
  const int32_t count = a.cu[b + 1] - start;
  int32_t* slot = a.slot + flat;
  for (int32_t i = 0; i < count; ++i) {
    a.visible[start + i] = flat + ids[i];
    slot[ids[i]] = start + i;
  }
  for (int32_t i = 0; i < int32_t(n) - count; ++i) {
    const int32_t n_masked = ids[count + i];
    a.masked[start_masked + i] = flat + n_masked;
    slot[n_masked] = ~(start_masked + i);
  }
}

// ---- order by position: only a threshold

template <class A, class K>
int64_t count_up_to(const K* keys, int64_t n, K limit) {
  using V = vec_key<A, K>;
  constexpr int w = kLanes<A>;
  V total{};
  int64_t i = 0;
  for (; i + w <= n; i += w) total -= (V)(load_raw<V>(keys + i) <= V{} + limit);
  int64_t count = 0;
  for (int j = 0; j < w; ++j) count += total[j];
  for (; i < n; ++i) count += keys[i] <= limit;
  return count;
}

template <class A, class K, class U>
void by_position(const MaskArgs& a, int64_t b, const K* keys, char* room) {
  const int64_t n = a.tokens;
  const int32_t flat = int32_t(b * n);
  const int32_t start = a.cu[b];
  const int32_t start_masked = flat - start;
  const int64_t count = a.cu[b + 1] - start;

  // The smallest key v with at least `count` keys <= v, by bisection. Visible are all keys < v, and of the
  // keys equal to v the first `ties`.
  K low = keys[0], high = keys[0];
  for (int64_t i = 1; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  int64_t ties = n;
  if (count == 0) {
    high = low;
    ties = 0;
  } else {
    while (low < high) {
      const K middle = K(U(low) + ((U(high) - U(low)) >> 1));
      const int64_t found = count_up_to<A>(keys, n, middle);
      if (found >= count) {
        high = middle;
        if (found == count) break;
      } else {
        low = middle + 1;
      }
    }
    int64_t below = 0;
    for (int64_t i = 0; i < n; ++i) below += keys[i] < high;
    ties = count - below;
  }

  // Both lists are written at every step and one advances; the working copies have the room for one stray
  // element.
  int32_t* visible = reinterpret_cast<int32_t*>(room);
  int32_t* masked = visible + n + 1;
  int32_t* slot = a.slot + flat;
  int32_t v = 0;
  int32_t m = 0;
  for (int32_t i = 0; i < int32_t(n); ++i) {
    const bool tie = keys[i] == high && ties > 0;
    const bool is_visible = keys[i] < high || tie;
    ties -= tie;
    visible[v] = flat + i;
    masked[m] = flat + i;
    slot[i] = is_visible ? start + v : ~(start_masked + m);
    v += is_visible;
    m += !is_visible;
  }
  if (count > 0) __builtin_memcpy(a.visible + start, visible, size_t(count) * sizeof(int32_t));
  if (count < n) __builtin_memcpy(a.masked + start_masked, masked, size_t(n - count) * sizeof(int32_t));
}

// ---- entry

template <class T, class A, class K, class U>
void token_mask_typed(const MaskArgs& a, void* workspace, int64_t begin, int64_t end) {
  K* keys = static_cast<K*>(workspace);
  char* room = reinterpret_cast<char*>(keys + a.tokens);
  for (int64_t b = begin; b < end; ++b) {
    make_keys<T, A, K>(static_cast<const T*>(a.scores) + b * a.tokens, keys, a.tokens);
    if (a.by_position) {
      by_position<A, K, U>(a, b, keys, room);
    } else {
      by_score<A, K, U>(a, b, keys, room);
    }
  }
}

void token_mask(const MaskArgs& a, void* workspace, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (is_same<T, double>) {
      token_mask_typed<T, double, int64_t, uint64_t>(a, workspace, begin, end);
    } else {
      token_mask_typed<T, float, int32_t, uint32_t>(a, workspace, begin, end);
    }
  });
}

int64_t workspace(const MaskArgs& a) {
  const int64_t key = a.type == DType::f64 ? 8 : 4;
  if (a.by_position) return a.tokens * key + 2 * (a.tokens + 1) * 4;
  const int64_t bits = a.tokens <= kSmallMax ? kSmallBits : kLargeBits;
  const int64_t digits = (8 * key + bits - 1) / bits << bits;
  const int64_t buckets = bucket_count(a.tokens);
  return a.tokens * (3 * key + 2 * 4) + (digits > buckets ? digits : buckets) * 4;
}

}  // namespace

extern const MaskKernels mask_kernels = {workspace, token_mask};

}  // namespace maefast::MAEFAST_ISA
