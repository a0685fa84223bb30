// Run-time choice of the instruction set.
//
// Each csrc/cpu/<family>_kernel.cpp is compiled once per instruction set, with MAEFAST_ISA defined as the
// namespace its code goes into: plain, avx2 (AVX2 + FMA + F16C) or avx512 (F, BW, DQ, VL). It defines one
// table of function pointers; MAEFAST_KERNELS in the family's header declares the copies and the chooser.
// Only those of the machine are built unless asked for (csrc/build/choice.py).
// The attention has two more copies: avx512bf16 (avx512 + bfloat16 products) and amx (that + tiles):
// MAEFAST_KERNELS_WITH_BF16.
//
// Rule for kernel files: they may include only <cstddef>, <cstdint>, <immintrin.h> and our own kernel
// headers, whose functions all live in namespace maefast::MAEFAST_ISA. No C++ standard library: an inline
// function such as std::min that the compiler emits in the AVX-512 object may be the one copy that the linker
// keeps, and would then crash an older CPU (csrc/build/no_shared_inlines.cmake checks this). Kernels take
// [begin, end) ranges; threads are the host code's business.
#pragma once

namespace maefast {

enum class Isa { plain = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };

// What the CPU and the operating system support, whatever was built.
Isa machine_isa();
// The best of those that were built (MAEFAST_ISAS) that the CPU supports.
Isa supported_isa();
// What is used: supported_isa(), or the best that was built up to MAEFAST_CPU_ISA, which is read once.
Isa current_isa();
const char* isa_name(Isa isa);

}  // namespace maefast

// MAEFAST_AVX2(text) and its like: `text` where that instruction set is built (MAEFAST_ISAS), else nothing.
#ifdef MAEFAST_HAS_AVX2
#define MAEFAST_AVX2(text) text
#else
#define MAEFAST_AVX2(text)
#endif
#ifdef MAEFAST_HAS_AVX512
#define MAEFAST_AVX512(text) text
#else
#define MAEFAST_AVX512(text)
#endif
#ifdef MAEFAST_HAS_AVX512BF16
#define MAEFAST_AVX512BF16(text) text
#else
#define MAEFAST_AVX512BF16(text)
#endif

#ifdef MAEFAST_HAS_AMX
#define MAEFAST_AMX(text) text
#else
#define MAEFAST_AMX(text)
#endif

#define MAEFAST_KERNELS(Table, name)                                       \
  namespace plain {                                                        \
  extern const Table name;                                                 \
  }                                                                        \
  MAEFAST_AVX2(namespace avx2 { extern const Table name; })                \
  MAEFAST_AVX512(namespace avx512 { extern const Table name; })            \
  static inline const Table& name##_chosen() {                             \
    MAEFAST_AVX512(if (current_isa() >= Isa::avx512) return avx512::name;) \
    MAEFAST_AVX2(if (current_isa() >= Isa::avx2) return avx2::name;)       \
    return plain::name;                                                    \
  }

#define MAEFAST_KERNELS_WITH_BF16(Table, name)                                         \
  MAEFAST_KERNELS(Table, name)                                                         \
  MAEFAST_AVX512BF16(namespace avx512bf16 { extern const Table name; })                \
  MAEFAST_AMX(namespace amx { extern const Table name; })                              \
  static inline const Table& name##_chosen_with_bf16() {                               \
    MAEFAST_AMX(if (current_isa() >= Isa::amx) return amx::name;)                      \
    MAEFAST_AVX512BF16(if (current_isa() >= Isa::avx512bf16) return avx512bf16::name;) \
    return name##_chosen();                                                            \
  }
