// Run-time choice of the instruction set.
//
// Each csrc/cpu/<family>_kernel.cpp is compiled once per instruction set, with MAEFAST_ISA defined as the
// namespace its code goes into: plain, avx2 (AVX2 + FMA + F16C) or avx512 (F, BW, DQ, VL). It defines one
// table of function pointers; MAEFAST_KERNELS in the family's header declares the copies and the chooser.
// The attention has a fourth copy, avx512bf16 (avx512 + bfloat16 products): MAEFAST_KERNELS_WITH_BF16.
//
// Rule for kernel files: they may include only <cstddef>, <cstdint>, <immintrin.h> and our own kernel
// headers, whose functions all live in namespace maefast::MAEFAST_ISA. No C++ standard library: an inline
// function such as std::min that the compiler emits in the AVX-512 object may be the one copy that the linker
// keeps, and would then crash an older CPU (csrc/build/no_shared_inlines.cmake checks this). Kernels take
// [begin, end) ranges; threads are the host code's business.
#pragma once

namespace maefast {

enum class Isa { plain = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

// What the CPU and the operating system support, whatever was asked for.
Isa supported_isa();
// What is used: supported_isa(), or a lower one named by MAEFAST_CPU_ISA. Read once.
Isa current_isa();
const char* isa_name(Isa isa);

}  // namespace maefast

#ifdef MAEFAST_X86
#define MAEFAST_KERNELS(Table, name)             \
  namespace plain {                              \
  extern const Table name;                       \
  }                                              \
  namespace avx2 {                               \
  extern const Table name;                       \
  }                                              \
  namespace avx512 {                             \
  extern const Table name;                       \
  }                                              \
  static inline const Table& name##_chosen() {   \
    const Isa isa = current_isa();               \
    if (isa >= Isa::avx512) return avx512::name; \
    if (isa == Isa::avx2) return avx2::name;     \
    return plain::name;                          \
  }
#else
#define MAEFAST_KERNELS(Table, name)           \
  namespace plain {                            \
  extern const Table name;                     \
  }                                            \
  static inline const Table& name##_chosen() { \
    return plain::name;                        \
  }
#endif

#ifdef MAEFAST_X86_BF16
#define MAEFAST_KERNELS_WITH_BF16(Table, name)                     \
  MAEFAST_KERNELS(Table, name)                                     \
  namespace avx512bf16 {                                           \
  extern const Table name;                                         \
  }                                                                \
  static inline const Table& name##_chosen_with_bf16() {           \
    if (current_isa() == Isa::avx512bf16) return avx512bf16::name; \
    return name##_chosen();                                        \
  }
#else
#define MAEFAST_KERNELS_WITH_BF16(Table, name)           \
  MAEFAST_KERNELS(Table, name)                           \
  static inline const Table& name##_chosen_with_bf16() { \
    return name##_chosen();                              \
  }
#endif
