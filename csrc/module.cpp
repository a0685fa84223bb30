// maefast._C: what the build and the CPU are. No torch, so that it loads (and `maefast doctor` reports) even
// where the ops do not. Written against Python's limited API, so that one file serves every Python from 3.10
// on: with the ops' stable ABI of torch, one wheel is enough.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sched.h>

#include <thread>

#include "cpu/isa.h"

namespace {

// Adds name: value to a dictionary and lets go of value; false with Python's error set where that failed.
bool add(PyObject* dict, const char* name, PyObject* value) {
  const bool added = value != nullptr && PyDict_SetItemString(dict, name, value) == 0;
  Py_XDECREF(value);
  return added;
}

PyObject* build_info(PyObject*, PyObject*) {
  static const char* const items[][2] = {
      {"version", MAEFAST_VERSION},        {"commit", MAEFAST_COMMIT},     {"compiler", MAEFAST_COMPILER},
      {"kernel_flags", MAEFAST_FLAGS},     {"cpu_isas", MAEFAST_CPU_ISAS}, {"cpu_choice", MAEFAST_CPU_CHOICE},
      {"torch", MAEFAST_TORCH_VERSION},    {"cuda", MAEFAST_CUDA_VERSION}, {"cuda_archs", MAEFAST_CUDA_ARCHS},
      {"cuda_choice", MAEFAST_CUDA_CHOICE}};
  PyObject* info = PyDict_New();
  if (info == nullptr) return nullptr;
  for (const auto& item : items) {
    if (!add(info, item[0], PyUnicode_FromString(item[1]))) {
      Py_DECREF(info);
      return nullptr;
    }
  }
  return info;
}

PyObject* cpu_features(PyObject*, PyObject*) {
  PyObject* features = PyDict_New();
  if (features == nullptr) return nullptr;
#ifdef MAEFAST_X86
  __builtin_cpu_init();
#define FEATURE(name)                                                             \
  if (!add(features, name, PyBool_FromLong(__builtin_cpu_supports(name) != 0))) { \
    Py_DECREF(features);                                                          \
    return nullptr;                                                               \
  }
  FEATURE("avx2")
  FEATURE("fma")
  FEATURE("f16c")
  FEATURE("avx512f")
  FEATURE("avx512bw")
  FEATURE("avx512dq")
  FEATURE("avx512vl")
  FEATURE("avx512bf16")
#undef FEATURE
#endif
  return features;
}

template <maefast::Isa (*isa)()>
PyObject* name_of(PyObject*, PyObject*) {
  return PyUnicode_FromString(maefast::isa_name(isa()));
}

PyObject* hardware_threads(PyObject*, PyObject*) {
  return PyLong_FromLong(static_cast<long>(std::thread::hardware_concurrency()));
}

PyObject* usable_cpus(PyObject* self, PyObject* args) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return hardware_threads(self, args);
  return PyLong_FromLong(CPU_COUNT(&set));
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "Compiler, flags, torch and CUDA that the libraries were built with, what they were built for, and "
     "why."},
    {"cpu_features", cpu_features, METH_NOARGS,
     "Instruction set extensions that the CPU and the system support."},
    {"machine_isa", name_of<maefast::machine_isa>, METH_NOARGS,
     "Best instruction set that the CPU and the system support, built or not."},
    {"supported_isa", name_of<maefast::supported_isa>, METH_NOARGS,
     "Best instruction set that the CPU kernels were built for and could use here."},
    {"current_isa", name_of<maefast::current_isa>, METH_NOARGS,
     "Instruction set the CPU kernels use (MAEFAST_CPU_ISA lowers it)."},
    {"hardware_threads", hardware_threads, METH_NOARGS, "Hardware threads of the machine."},
    {"usable_cpus", usable_cpus, METH_NOARGS,
     "CPUs that this process may run on, which in a container is often fewer than the machine has."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "Build information and CPU features of maefast's native libraries.",
                      0,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&module);
}
