// Storage types of the CPU kernels; torch-free, see cpu/isa.h for the rules.
#pragma once

namespace maefast {

enum class DType { f32, f64, f16, bf16 };

}  // namespace maefast
