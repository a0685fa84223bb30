#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(MAEFAST_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace maefast {

// Tiles of bfloat16, and the system's leave to use them: Linux wants to be asked, once for a process.
static bool ask_for_amx() {
#if defined(MAEFAST_X86) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa machine_isa() {
#ifdef MAEFAST_X86
  // __builtin_cpu_supports also checks that the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  static const bool tiles = bf16 && ask_for_amx();
  if (tiles) return Isa::amx;
  if (bf16) return Isa::avx512bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::plain;
}

// The best that was built, up to `limit`.
static Isa built([[maybe_unused]] Isa limit) {
  MAEFAST_AMX(if (limit >= Isa::amx) return Isa::amx;)
  MAEFAST_AVX512BF16(if (limit >= Isa::avx512bf16) return Isa::avx512bf16;)
  MAEFAST_AVX512(if (limit >= Isa::avx512) return Isa::avx512;)
  MAEFAST_AVX2(if (limit >= Isa::avx2) return Isa::avx2;)
  return Isa::plain;
}

Isa supported_isa() {
  return built(machine_isa());
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512bf16:
      return "avx512bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "plain";
  }
}

static Isa choose() {
  const Isa best = supported_isa();
  const char* asked = std::getenv("MAEFAST_CPU_ISA");
  if (asked == nullptr) return best;
  for (Isa isa : {Isa::plain, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx}) {
    if (std::strcmp(asked, isa_name(isa)) == 0) return isa < best ? built(isa) : best;
  }
  return best;  // unknown names are reported by maefast/_native.py
}

Isa current_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace maefast
