// CUDA's threads on a CPU, enough of them for the device code of csrc/cuda/attention_*.cuh: each thread of a
// block is a fiber that runs to its next meeting of the warp or the block. Warps and lanes run in an order
// that is chosen, copies into shared memory land at once or not before they are waited for, shared memory
// begins as NaN: what lacks a barrier or a wait gives other results in some of these. Threads of a warp that
// meet in different places end the process.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  uint32_t x, y, z, w;
};

namespace maefast::cuda {
constexpr size_t kSharedBytes = 232 * 1024;
inline uint16_t shared[kSharedBytes / 2] __align__(16);
}  // namespace maefast::cuda

namespace simt {

using maefast::cuda::kSharedBytes;
using maefast::cuda::shared;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simt: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

enum class At { kStart, kWarp, kBlock, kEnd };
constexpr size_t kStack = 128 * 1024;
constexpr int kWords = 6;  // that a lane brings to a meeting

struct Copy {
  void* to;
  uint8_t bytes[16];
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStack]};
  At at = At::kStart;
  int meeting = 0, parity = 0;
  std::vector<std::vector<Copy>> copies{{}};  // groups; the last one is open
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline jmp_buf scheduler;
inline Fiber* current;
inline ucontext_t unused;
inline std::function<void()> kernel;
inline bool late;  // copies land when they are waited for
inline uint32_t brought[64][2][32][kWords];
inline size_t shared_bytes;

inline void leave(At at, int meeting) {
  current->at = at;
  current->meeting = meeting;
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

inline void body() {
  kernel();
  current->at = At::kEnd;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void run(Fiber* fiber, unsigned thread) {
  current = fiber;
  threadIdx.x = thread;
  if (_setjmp(scheduler) != 0) return;
  if (fiber->at != At::kStart) _longjmp(fiber->resume, 1);
  setcontext(&fiber->start);
}

inline void land(size_t groups) {
  for (size_t i = 0; i < groups; ++i) {
    for (const Copy& copy : current->copies[i]) std::memcpy(copy.to, copy.bytes, 16);
  }
  current->copies.erase(current->copies.begin(), current->copies.begin() + groups);
  if (current->copies.empty()) current->copies.emplace_back();
}

inline void check_shared(const void* place) {
  const auto* at = static_cast<const char*>(place);
  const auto* first = reinterpret_cast<const char*>(shared);
  if (at < first || at + 16 > first + shared_bytes) fail("16 bytes outside shared memory");
  if ((at - first) % 16 != 0) fail("a place in shared memory that is not a multiple of 16 bytes");
}

// Brings words to a meeting of the warp, which `kind` names; what all lanes brought comes back.
inline const uint32_t (*meet(int kind, const uint32_t* words, int count)) [kWords] {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t (*const all)[kWords] = brought[warp][current->parity ^= 1];
  std::copy(words, words + count, all[lane]);
  leave(At::kWarp, kind);
  return all;
}

// One block. order: 0 warps and lanes ascending, 1 descending, above: shuffled by this seed.
inline void run_block(unsigned block, unsigned threads, size_t bytes, int order) {
  if (bytes > kSharedBytes || threads % 32 != 0) fail("no such block");
  blockIdx.x = block;
  blockDim.x = threads;
  shared_bytes = bytes;
  std::memset(shared, 0xff, kSharedBytes);
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = &unused;
    makecontext(&fiber.start, body, 0);
    fiber.at = At::kStart;
    fiber.copies = {{}};
  }
  std::vector<unsigned> warps(threads / 32), lanes(32);
  std::iota(warps.begin(), warps.end(), 0u);
  std::iota(lanes.begin(), lanes.end(), 0u);
  std::minstd_rand random(static_cast<unsigned>(order));
  if (order == 1) {
    std::reverse(warps.begin(), warps.end());
    std::reverse(lanes.begin(), lanes.end());
  }
  while (!warps.empty()) {  // to the next barrier of the block
    if (order > 1) {
      std::shuffle(warps.begin(), warps.end(), random);
      std::shuffle(lanes.begin(), lanes.end(), random);
    }
    for (const unsigned warp : warps) {
      At at;
      do {
        for (const unsigned lane : lanes) run(fibers[32 * warp + lane].get(), 32 * warp + lane);
        const Fiber& first = *fibers[32 * warp];
        at = first.at;
        for (unsigned lane = 1; lane < 32; ++lane) {
          const Fiber& other = *fibers[32 * warp + lane];
          if (other.at != at || other.meeting != first.meeting) fail("a warp has come apart");
        }
      } while (at == At::kWarp);
    }
    const auto ended = [](unsigned warp) { return fibers[32 * warp]->at == At::kEnd; };
    warps.erase(std::remove_if(warps.begin(), warps.end(), ended), warps.end());
  }
  const auto* words = reinterpret_cast<const uint8_t*>(shared);
  if (!std::all_of(words + bytes, words + kSharedBytes, [](uint8_t x) { return x == 0xff; })) {
    fail("writes beyond shared memory");
  }
}

}  // namespace simt

inline void __syncthreads() {
  simt::leave(simt::At::kBlock, 0);
}
inline void __syncwarp() {
  simt::leave(simt::At::kWarp, 1);
}
inline float __shfl_xor_sync(unsigned, float x, int lanes) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  const auto all = simt::meet(2, &word, 1);
  std::memcpy(&x, &all[(threadIdx.x % 32) ^ lanes][0], 4);
  return x;
}
