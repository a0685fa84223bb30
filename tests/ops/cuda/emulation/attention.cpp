// The kernels of csrc/cuda/attention_*.cuh, block by block on a CPU, launched as attention.cu and
// attention_tiled.cu do.
#include "cuda/attention_kernel.cuh"
#include "cuda/attention_tiled_bwd.cuh"
#include "cuda/attention_tiled_fwd.cuh"

namespace maefast::cuda {
namespace {

struct Run {
  int64_t batch;
  int64_t limit;  // of shared memory
  int order;
  bool late, backward;
  int threads = 0, rounds = 0;
  int64_t bytes = 0;
};

template <class Kernel>
void launch(Run& run, int64_t blocks, int threads, size_t bytes, Kernel kernel) {
  run.threads = threads;
  run.bytes = static_cast<int64_t>(bytes);
  simt::late = run.late;
  simt::kernel = kernel;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t block = run.order == 1 ? blocks - 1 - i : i;
    simt::run_block(static_cast<unsigned>(block), threads, bytes, run.order);
  }
}

template <class T, int kDepth>
void launch_short(const Args& p, Run& run) {
  const int rows_q = padded(p.max_q), rows_k = padded(p.max_k);
  const int rows = (run.backward ? 2 : 1) * rows_q + 2 * rows_k;
  const size_t bytes = 2 * (rows * (kDepth + 8) + (run.backward ? 2 * rows_q * (rows_k + 8) : 0));
  const int warps = std::max(1, (run.backward && rows_k > rows_q ? rows_k : rows_q) / 16);
  launch(run, run.batch * p.heads, 32 * warps, bytes, [&p, &run] {
    run.backward ? attention_bwd_kernel<T, kDepth>(p) : attention_fwd_kernel<T, kDepth>(p);
  });
}

template <class T, int kDepth, int kBlocks>
void launch_backward(Args p, Run& run) {
  const BwdShape shape = bwd_shape<kDepth, kBlocks>(p.max_q, p.max_k, run.limit);
  const int64_t blocks = run.batch * p.heads;
  std::vector<float> sums(blocks * shape.sums + 4, NAN);
  p.sums = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(sums.data()) + 15) / 16 * 16);
  run.rounds = shape.rounds;
  launch(run, blocks, shape.threads, shape.bytes,
         [&p] { attention_tiled_bwd_kernel<T, kDepth, kBlocks>(p); });
}

template <class T, int kDepth>
void launch_depth(const Args& p, Run& run) {
  if (p.max_q <= kShort && p.max_k <= kShort) return launch_short<T, kDepth>(p, run);
  if (!run.backward) {
    const FwdShape shape = fwd_shape(kDepth, p.max_q, run.limit);
    const int parts = shape.parts;
    return launch(run, run.batch * p.heads * parts, 32 * shape.warps, shape.bytes,
                  [&p, parts] { attention_tiled_fwd_kernel<T, kDepth>(p, parts); });
  }
  if constexpr (kDepth == 64) {
    if (bwd_blocks<kDepth>(p.max_k) == 1) return launch_backward<T, kDepth, 1>(p, run);
  }
  launch_backward<T, kDepth, kDepth <= 64 ? 2 : 1>(p, run);
}

template <class T>
void launch_type(const Args& p, Run& run) {
  switch ((p.width + 15) / 16) {
    case 1:
      return launch_depth<T, 16>(p, run);
    case 2:
      return launch_depth<T, 32>(p, run);
    case 3:
      return launch_depth<T, 48>(p, run);
    case 4:
      return launch_depth<T, 64>(p, run);
    case 5:
      return launch_depth<T, 80>(p, run);
    case 6:
      return launch_depth<T, 96>(p, run);
    case 7:
      return launch_depth<T, 112>(p, run);
    default:
      return launch_depth<T, 128>(p, run);
  }
}

}  // namespace
}  // namespace maefast::cuda

extern "C" void run_attention(const maefast::cuda::Args* p, maefast::cuda::Run* run, bool bfloat) {
  using namespace maefast::cuda;
  bfloat ? launch_type<Bfloat>(*p, *run) : launch_type<Half>(*p, *run);
}
