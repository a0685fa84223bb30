#include <atomic>
#include <cstdlib>

#include "cpu/attention_kernel.h"
#include "cpu/host.h"
#include "cpu/ops.h"

namespace maefast::cpu {
namespace {

// Working memory of a thread, kept from call to call up to a limit.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // Null where memory is out.
  float* get(int64_t floats) {
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    if (bytes > bytes_) {
      drop();
      memory_ = std::aligned_alloc(64, bytes);
      bytes_ = memory_ ? bytes : 0;
    }
    return static_cast<float*>(memory_);
  }
  void trim() {
    constexpr size_t kKept = 4 << 20;
    if (bytes_ > kKept) drop();
  }

 private:
  void drop() {
    std::free(memory_);
    memory_ = nullptr;
    bytes_ = 0;
  }
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

// kernel(args, task, scratch) for every task, each by whichever thread comes first: sequences differ in
// length.
template <class Args>
void run_tasks(const Args& args, int64_t tasks, int64_t flops, int64_t floats,
               void (*kernel)(const Args&, int64_t, float*)) {
  if (tasks == 0) return;
  constexpr int64_t kFlopsOfThread = 300'000;  // below it, waking a thread costs more than it saves
  const int64_t useful = tasks < flops / kFlopsOfThread ? tasks : flops / kFlopsOfThread;
  const int64_t available = torch::stable::get_num_threads();
  const int64_t threads = useful < 1 ? 1 : useful < available ? useful : available;
  const int64_t share = tasks / (threads * 8);  // tasks taken at a time
  const int64_t step = share < 1 ? 1 : share;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    thread_local Scratch scratch;
    float* space = scratch.get(floats);
    if (space == nullptr) failed = true;
    while (space != nullptr) {
      const int64_t first = next.fetch_add(step, std::memory_order_relaxed);
      if (first >= tasks) break;
      const int64_t last = first + step < tasks ? first + step : tasks;
      for (int64_t task = first; task < last; ++task) kernel(args, task, space);
    }
    scratch.trim();
  });
  MAEFAST_CHECK(!failed, "attention: out of memory, ", floats, " floats a thread");
}

int64_t rows_of(const std::optional<Tensor>& cu, const char* name, int64_t batch, int64_t longest,
                int64_t rows, const int32_t** starts) {
  MAEFAST_CHECK(batch >= 0 && longest >= 0, "attention: batch and lengths must not be negative");
  *starts = nullptr;
  if (cu) {
    MAEFAST_CHECK(cu->numel() == batch + 1, "attention: ", name, " must hold batch + 1 starts");
    *starts = cu_data(*cu, rows, longest);
  } else {
    MAEFAST_CHECK(rows == batch * longest, "attention: ", batch, " sequences of ", longest, " are not ", rows,
                  " rows");
  }
  return rows;
}

float* optional_out(const Tensor& x) {
  return x.numel() > 0 ? static_cast<float*>(x.mutable_data_ptr()) : nullptr;
}

const float* rows_data(const std::optional<Tensor>& x, int64_t rows, int64_t heads, const char* name) {
  if (!x) return nullptr;
  MAEFAST_CHECK(x->scalar_type() == ScalarType::Float && x->numel() == rows * heads, "attention: ", name,
                " must be float32 [rows, heads]");
  return static_cast<const float*>(data(*x, name));
}

// What forward and backward share; returns {rows of q, rows of k}.
std::pair<int64_t, int64_t> read_sequences(Sequences& s, const Tensor& q, const std::optional<Tensor>& kv,
                                           const std::optional<Tensor>& cu_q,
                                           const std::optional<Tensor>& cu_k, int64_t batch, int64_t max_q,
                                           int64_t max_k, double scale, bool causal,
                                           const std::optional<Tensor>& key_bias,
                                           const std::optional<Tensor>& marked) {
  MAEFAST_CHECK(kv ? q.dim() == 3 && kv->dim() == 4 && kv->size(1) == 2 : q.dim() == 4 && q.size(1) == 3,
                "attention: q must be [T, 3, H, D], or [Tq, H, D] beside kv [Tk, 2, H, D]");
  s.type = dtype_of(q);
  MAEFAST_CHECK(s.type != DType::f64, "attention: float64 has no kernel");
  s.batch = batch;
  s.heads = q.size(kv ? 1 : 2);
  s.width = q.size(kv ? 2 : 3);
  MAEFAST_CHECK(s.width % 8 == 0 && s.width >= 16 && s.width <= 128,
                "attention: head width must be 16 to 128 in steps of 8");
  const int64_t inner = s.heads * s.width;
  const int64_t size = element_size(s.type);
  const char* base = static_cast<const char*>(data(q, "q"));
  s.q = base;
  s.q_row = kv ? inner : 3 * inner;
  s.out_row = inner;
  s.k_row = kv ? 2 * inner : 3 * inner;
  if (kv) {
    MAEFAST_CHECK(kv->scalar_type() == q.scalar_type() && kv->size(2) == s.heads && kv->size(3) == s.width,
                  "attention: kv does not go with q");
    s.k = data(*kv, "kv");
  } else {
    MAEFAST_CHECK(max_q == max_k, "attention: max_q and max_k differ in self-attention");
    s.k = base + inner * size;
  }
  s.v = static_cast<const char*>(s.k) + inner * size;
  s.max_q = max_q;
  s.max_k = max_k;
  const int64_t queries = rows_of(cu_q, "cu_seqlens_q", batch, max_q, q.size(0), &s.cu_q);
  int64_t keys = queries;
  s.cu_k = s.cu_q;
  if (kv) keys = rows_of(cu_k, "cu_seqlens_k", batch, max_k, kv->size(0), &s.cu_k);
  s.scale = static_cast<float>(scale);
  s.causal = causal;
  s.key_bias = rows_data(key_bias, keys, s.heads, "key_bias");
  s.marked = nullptr;
  if (marked) {
    MAEFAST_CHECK(marked->scalar_type() == ScalarType::Bool && marked->numel() == keys,
                  "attention: marked must be bool [Tk]");
    s.marked = static_cast<const uint8_t*>(data(*marked, "marked"));
  }
  return {queries, keys};
}

// The tables of `rope`, rows of the width of a head.
void read_turn(Sequences& s, bool cross, int64_t queries, const std::optional<Tensor>& cos,
               const std::optional<Tensor>& sin, bool interleaved) {
  s.cos = s.sin = nullptr;
  s.interleaved = interleaved;
  if (!cos && !sin) return;
  MAEFAST_CHECK(cos && sin && !cross, "attention: cos and sin go together, with self-attention");
  s.shared_turn = cos->size(0) != queries;
  for (const auto& [x, name, rows] : {std::tuple{&*cos, "cos", &s.cos}, std::tuple{&*sin, "sin", &s.sin}}) {
    MAEFAST_CHECK(x->scalar_type() == ScalarType::Float && x->dim() == 2 && x->size(1) == s.width &&
                      (s.shared_turn ? s.cu_q == nullptr && x->size(0) == s.max_q : x->size(0) == queries),
                  "attention: ", name, " must be float32 [Tq, D] or, for equal lengths, [Sq, D]");
    *rows = static_cast<const float*>(data(*x, name));
  }
}

int64_t matrices(const Sequences& s) {
  return s.groups * s.heads;
}

// Of a matrix of the bias, a pass over it.
int64_t matrix_bytes(const Sequences& s) {
  return 8 * s.max_q * s.max_k;
}

// The bias as the kernels read it; the result has to live as long as `s` is used.
std::optional<Tensor> read_bias(Sequences& s, const std::optional<Tensor>& bias) {
  s.bias = nullptr;
  s.groups = 1;
  s.bias_row = (s.max_q + 15) / 16 * 16;  // whole vectors of every instruction set
  if (!bias) return std::nullopt;
  MAEFAST_CHECK(bias->scalar_type() == ScalarType::Float && bias->dim() == 4 && bias->size(1) == s.heads &&
                    bias->size(2) == s.max_q && bias->size(3) == s.max_k && !s.cu_q && !s.cu_k,
                "attention: bias must be float32 [G, H, Sq, Sk], for equal lengths");
  s.groups = bias->size(0);
  MAEFAST_CHECK(s.groups > 0 && s.batch % s.groups == 0, "attention: the groups of bias do not divide ",
                s.batch, " sequences");
  Tensor columns = empty({s.groups, s.heads, s.max_k, s.bias_row}, ScalarType::Float, *bias);
  const AttentionBiasArgs args{s.max_q,
                               s.max_k,
                               s.bias_row,
                               1,
                               0,
                               static_cast<const float*>(data(*bias, "bias")),
                               static_cast<float*>(columns.mutable_data_ptr())};
  const AttentionBiasKernels& kernels = attention_bias_kernels_chosen();
  parallel_rows(matrices(s), matrix_bytes(s),
                [&](int64_t begin, int64_t end) { kernels.columns(args, begin, end); });
  s.bias = args.to;
  return columns;
}

// Of one matrix product over all sequences.
int64_t product_flops(const Sequences& s, int64_t queries) {
  return 2 * queries * s.max_k * s.heads * s.width;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(
    const Tensor& q, const std::optional<Tensor>& kv, const std::optional<Tensor>& cu_q,
    const std::optional<Tensor>& cu_k, int64_t batch, int64_t max_q, int64_t max_k, double scale, bool causal,
    const std::optional<Tensor>& key_bias, const std::optional<Tensor>& marked, bool stats,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    bool interleaved) {
  AttentionArgs args;
  const auto [queries, keys] =
      read_sequences(args, q, kv, cu_q, cu_k, batch, max_q, max_k, scale, causal, key_bias, marked);
  const auto row = [&](bool wanted) {
    return wanted ? empty({queries, args.heads}, ScalarType::Float, q) : empty({0}, ScalarType::Float, q);
  };
  read_turn(args, kv.has_value(), queries, cos, sin, interleaved);
  const std::optional<Tensor> columns = read_bias(args, bias);
  Tensor out = empty({queries, args.heads, args.width}, q.scalar_type(), q);
  Tensor lse = row(true), entropy = row(stats), mass = row(stats && marked);
  args.out = out.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.entropy = optional_out(entropy);
  args.mass = optional_out(mass);
  constexpr int64_t kChunk =
      256;  // long sequences are cut, so that a few of them still keep every thread busy
  args.chunks = (max_q + kChunk - 1) / kChunk;
  args.chunk = kChunk;
  const AttentionKernels& kernels = attention_kernels_chosen_with_bf16();
  run_tasks(args, batch * args.heads * args.chunks, 2 * product_flops(args, queries),
            kernels.scratch_floats(args), kernels.forward);
  return {out, lse, entropy, mass};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_lse, const std::optional<Tensor>& grad_entropy,
    const std::optional<Tensor>& grad_mass, const Tensor& q, const std::optional<Tensor>& kv,
    const Tensor& out, const Tensor& lse, const Tensor& entropy, const Tensor& mass,
    const std::optional<Tensor>& cu_q, const std::optional<Tensor>& cu_k, int64_t batch, int64_t max_q,
    int64_t max_k, double scale, bool causal, const std::optional<Tensor>& key_bias,
    const std::optional<Tensor>& marked, bool need_key_bias, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool interleaved, bool need_bias) {
  AttentionBackwardArgs args;
  const auto [queries, keys] =
      read_sequences(args, q, kv, cu_q, cu_k, batch, max_q, max_k, scale, causal, key_bias, marked);
  const int64_t heads = args.heads;
  for (const Tensor* x : {&grad, &out})
    MAEFAST_CHECK(x->scalar_type() == q.scalar_type() && x->numel() == queries * heads * args.width,
                  "attention_backward: grad and out must be [Tq, H, D] in q's dtype");
  args.grad = data(grad, "grad");
  args.out = data(out, "out");
  args.lse = rows_data(lse, queries, heads, "lse");
  args.grad_lse = rows_data(grad_lse, queries, heads, "grad_lse");
  args.grad_entropy = rows_data(grad_entropy, queries, heads, "grad_entropy");
  args.grad_mass = rows_data(grad_mass, queries, heads, "grad_mass");
  args.entropy = grad_entropy ? rows_data(entropy, queries, heads, "entropy") : nullptr;
  if (!marked) args.grad_mass = nullptr;  // of the empty mass
  args.mass = args.grad_mass ? rows_data(mass, queries, heads, "mass") : nullptr;
  const auto like = [](const Tensor& x) {
    if (x.dim() == 3) return empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type(), x);
    return empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), x);
  };
  read_turn(args, kv.has_value(), queries, cos, sin, interleaved);
  const std::optional<Tensor> columns = read_bias(args, bias);
  MAEFAST_CHECK(!need_key_bias || key_bias, "attention_backward: there is no key_bias");
  MAEFAST_CHECK(!need_bias || bias, "attention_backward: there is no bias");
  Tensor grad_q = like(q);
  Tensor grad_kv = kv ? like(*kv) : empty({0}, q.scalar_type(), q);
  Tensor grad_key_bias =
      need_key_bias ? empty({keys, heads}, ScalarType::Float, q) : empty({0}, ScalarType::Float, q);
  const int64_t inner = heads * args.width * element_size(args.type);
  char* base = static_cast<char*>(grad_q.mutable_data_ptr());
  args.grad_q = base;
  args.grad_k = kv ? static_cast<char*>(grad_kv.mutable_data_ptr()) : base + inner;
  args.grad_v = static_cast<char*>(args.grad_k) + inner;
  args.grad_key_bias = optional_out(grad_key_bias);
  const AttentionBackwardKernels& kernels = attention_backward_kernels_chosen_with_bf16();
  args.grad_bias = nullptr;
  int64_t tasks = batch * heads;
  Tensor grad_bias = empty({0}, ScalarType::Float, q), sums = grad_bias;
  if (need_bias) {
    // Enough pieces for many threads; their number depends on the sizes alone, and so does every sum.
    constexpr int64_t kTasks = 24;
    const int64_t turns = batch / args.groups, wanted = (kTasks + matrices(args) - 1) / matrices(args);
    args.pieces = turns < 1 ? 1 : turns < wanted ? turns : wanted;
    tasks = args.pieces * matrices(args);
    grad_bias = empty({args.groups, heads, max_q, max_k}, ScalarType::Float, q);
    sums = empty({tasks, max_k, args.bias_row}, ScalarType::Float, q);
    args.grad_bias = static_cast<float*>(sums.mutable_data_ptr());
  }
  run_tasks(args, tasks, 5 * product_flops(args, queries), kernels.scratch_floats(args), kernels.backward);
  if (need_bias) {
    const int64_t piece = matrices(args) * max_k * args.bias_row;
    const AttentionBiasArgs back{max_q,
                                 max_k,
                                 args.bias_row,
                                 args.pieces,
                                 piece,
                                 args.grad_bias,
                                 static_cast<float*>(grad_bias.mutable_data_ptr())};
    const AttentionBiasKernels& table = attention_bias_kernels_chosen();
    parallel_rows(matrices(args), matrix_bytes(args),
                  [&](int64_t begin, int64_t end) { table.rows(back, begin, end); });
  }
  return {grad_q, grad_kv, grad_key_bias, grad_bias};
}

}  // namespace maefast::cpu
