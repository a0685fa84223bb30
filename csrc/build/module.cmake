# The pybind11 module maefast._C: needs no torch.
if(NOT pybind11_DIR)
  execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_package(pybind11 CONFIG REQUIRED)
pybind11_add_module(_C MODULE csrc/module.cpp csrc/cpu/isa.cpp)
target_include_directories(_C PRIVATE csrc)
target_compile_options(_C PRIVATE -O2 -Wall -Wextra)

execute_process(COMMAND git -C "${CMAKE_SOURCE_DIR}" rev-parse --short=12 HEAD
  OUTPUT_VARIABLE _commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
list(JOIN MAEFAST_KERNEL_FLAGS " " _flags)
list(JOIN MAEFAST_ISAS " " _isas)
list(JOIN MAEFAST_CUDA_ARCHS_USED " " _archs)
target_compile_definitions(_C PRIVATE
  "MAEFAST_VERSION=\"${SKBUILD_PROJECT_VERSION_FULL}\""
  "MAEFAST_COMMIT=\"${_commit}\""
  "MAEFAST_COMPILER=\"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\""
  "MAEFAST_FLAGS=\"${_flags}\""
  "MAEFAST_CPU_ISAS=\"${_isas}\""
  "MAEFAST_TORCH_VERSION=\"${MAEFAST_TORCH_VERSION}\""
  "MAEFAST_CUDA_VERSION=\"${MAEFAST_CUDA_COMPILER_VERSION}\""
  "MAEFAST_CUDA_ARCHS=\"${_archs}\"")
target_compile_definitions(_C PRIVATE ${MAEFAST_ISA_DEFINITIONS})
install(TARGETS _C LIBRARY DESTINATION maefast)
