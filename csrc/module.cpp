// maefast._C: what the build and the CPU are. No torch, so that it loads (and `maefast doctor` reports) even
// where the ops do not.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sched.h>

#include <map>
#include <string>
#include <thread>

#include "cpu/isa.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {{"version", MAEFAST_VERSION},   {"commit", MAEFAST_COMMIT},
          {"compiler", MAEFAST_COMPILER}, {"kernel_flags", MAEFAST_FLAGS},
          {"cpu_isas", MAEFAST_CPU_ISAS}, {"torch", MAEFAST_TORCH_VERSION},
          {"cuda", MAEFAST_CUDA_VERSION}, {"cuda_archs", MAEFAST_CUDA_ARCHS}};
}

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> features;
#ifdef MAEFAST_X86
  __builtin_cpu_init();
#define FEATURE(name) features[name] = __builtin_cpu_supports(name) != 0
  FEATURE("avx2");
  FEATURE("fma");
  FEATURE("f16c");
  FEATURE("avx512f");
  FEATURE("avx512bw");
  FEATURE("avx512dq");
  FEATURE("avx512vl");
  FEATURE("avx512bf16");
#undef FEATURE
#endif
  return features;
}

// CPUs this process may run on, which in a container is often fewer than the machine has.
int usable_cpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and CPU features of maefast's native libraries.";
  m.def("build_info", &build_info, "Compiler, flags, torch and CUDA that the libraries were built with.");
  m.def("cpu_features", &cpu_features, "Instruction set extensions that the CPU and the system support.");
  m.def(
      "supported_isa", [] { return maefast::isa_name(maefast::supported_isa()); },
      "Best instruction set the CPU kernels could use here.");
  m.def(
      "current_isa", [] { return maefast::isa_name(maefast::current_isa()); },
      "Instruction set the CPU kernels use (MAEFAST_CPU_ISA lowers it).");
  m.def(
      "hardware_threads", [] { return static_cast<int>(std::thread::hardware_concurrency()); },
      "Hardware threads of the machine.");
  m.def("usable_cpus", &usable_cpus, "CPUs that this process may run on.");
}
