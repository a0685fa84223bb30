#include "cpu/gelu_kernel.h"

#include "cpu/gelu_math.h"
#include "cpu/units_vec.h"
#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

template <int registers>
struct Count {
  static constexpr int n = registers;
};

// Registers a step; more for 16 bits, whose conversions lengthen the chain.
template <class T>
constexpr int kAtOnce = is_same<T, double> ? 1
                        : sizeof(T) == 2   ? 8
                                           : 4;

// for_lanes with kAtOnce<T> registers a step: f(i, lanes, Count<registers>).
template <class T, class F>
MAEFAST_INLINE void for_registers(int64_t n, const F& f) {
  using A = acc_t<T>;
  constexpr int step = kAtOnce<T> * kLanes<A>;
  int64_t i = 0;
  for (; i + step <= n; i += step) f(i, Full<kLanes<A>>{}, Count<kAtOnce<T>>{});
  for_lanes<A>(n - i, [&](int64_t k, auto lanes) { f(i + k, lanes, Count<1>{}); });
}

// v[k] = x + bias, of register k from x on.
template <bool biased, class T, class A, int N, class Lanes>
MAEFAST_INLINE void load_sum(vec<A> (&v)[N], const T* x, const A* bias, Lanes lanes) {
  MAEFAST_EACH(k) {
    v[k] = load<A>(x + k * kLanes<A>, lanes);
    if constexpr (biased) v[k] += load<A>(bias + k * kLanes<A>, lanes);
  }
}

template <class T, bool tanh, bool biased>
void bias_gelu_typed(const GeluArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A* bias = static_cast<const A*>(a.bias);
  const int64_t d = a.width;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * d;
    T* out = static_cast<T*>(a.out) + r * d;
    for_registers<T>(d, [&](int64_t i, auto lanes, auto count) {
      constexpr int N = decltype(count)::n;
      vec<A> v[N];
      load_sum<biased, T, A>(v, x + i, bias + i, lanes);
      gelu<T, tanh>(v);
      MAEFAST_EACH(k) store<A>(out + i + k * kLanes<A>, v[k], lanes);
    });
  }
}

template <class T, bool tanh, bool biased, bool again>
void bias_gelu_backward_typed(const GeluBackwardArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A* bias = static_cast<const A*>(a.bias);
  const int64_t d = a.width;
  for (int64_t unit = begin; unit < end; ++unit) {
    A* sums = a.bias_sums ? static_cast<A*>(a.bias_sums) + unit * d : nullptr;
    if (sums) zero_row(sums, d);
    for (int64_t r = a.rows * unit / a.units; r < a.rows * (unit + 1) / a.units; ++r) {
      const T* x = static_cast<const T*>(a.x) + r * d;
      const T* grad = static_cast<const T*>(a.grad) + r * d;
      T* grad_x = static_cast<T*>(a.grad_x) + r * d;
      T* out = again ? static_cast<T*>(a.out) + r * d : nullptr;
      for_registers<T>(d, [&](int64_t i, auto lanes, auto count) {
        constexpr int N = decltype(count)::n;
        vec<A> v[N];
        load_sum<biased, T, A>(v, x + i, bias + i, lanes);
        if constexpr (again) {
          vec<A> value[N];
          gelu_both<T, tanh>(v, value);
          MAEFAST_EACH(k) store<A>(out + i + k * kLanes<A>, value[k], lanes);
        } else {
          gelu_slope<T, tanh>(v);
        }
        MAEFAST_EACH(k) {
          const int64_t at = i + k * kLanes<A>;
          v[k] *= load<A>(grad + at, lanes);
          store<A>(grad_x + at, v[k], lanes);
          if (sums) store<A>(sums + at, load<A>(sums + at, lanes) + v[k], lanes);
        }
      });
    }
  }
}

// Calls f(Type<T>, Flag<tanh>, Flag<biased>).
template <bool value>
struct Flag {
  static constexpr bool on = value;
};
template <class Args, class F>
MAEFAST_INLINE void with_form(const Args& a, const F& f) {
  with_type(a.type, [&](auto type) {
    if (a.tanh) {
      a.bias ? f(type, Flag<true>{}, Flag<true>{}) : f(type, Flag<true>{}, Flag<false>{});
    } else {
      a.bias ? f(type, Flag<false>{}, Flag<true>{}) : f(type, Flag<false>{}, Flag<false>{});
    }
  });
}

void bias_gelu(const GeluArgs& a, int64_t begin, int64_t end) {
  with_form(a, [&](auto t, auto tanh, auto biased) {
    bias_gelu_typed<typename decltype(t)::type, decltype(tanh)::on, decltype(biased)::on>(a, begin, end);
  });
}

void bias_gelu_backward(const GeluBackwardArgs& a, int64_t begin, int64_t end) {
  with_form(a, [&](auto t, auto tanh, auto biased) {
    using T = typename decltype(t)::type;
    if (a.out)
      return bias_gelu_backward_typed<T, decltype(tanh)::on, decltype(biased)::on, true>(a, begin, end);
    bias_gelu_backward_typed<T, decltype(tanh)::on, decltype(biased)::on, false>(a, begin, end);
  });
}

}  // namespace

extern const GeluKernels gelu_kernels = {bias_gelu, bias_gelu_backward, sum_pieces};

}  // namespace maefast::MAEFAST_ISA
