# maefast._C: needs no torch, and by Python's limited API one file serves every Python from 3.10 on. A
# free-threaded Python has no such API before 3.15, and gets a file of its own.
if(Python_SOABI MATCHES "^cpython-[0-9]+[a-z]*t[a-z]*(-|$)")
  set(_suffix ".${Python_SOABI}.so")
  set(_limited "")
else()
  set(_suffix ".abi3.so")
  set(_limited Py_LIMITED_API=0x030A0000)
endif()
add_library(_C MODULE csrc/module.cpp csrc/cpu/isa.cpp)
set_target_properties(_C PROPERTIES PREFIX "" SUFFIX "${_suffix}")
target_include_directories(_C SYSTEM PRIVATE ${Python_INCLUDE_DIRS})
target_compile_definitions(_C PRIVATE ${_limited})
target_include_directories(_C PRIVATE csrc)
target_compile_options(_C PRIVATE -O2 -Wall -Wextra)

execute_process(COMMAND git -C "${CMAKE_SOURCE_DIR}" rev-parse --short=12 HEAD
  OUTPUT_VARIABLE _commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
list(JOIN MAEFAST_KERNEL_FLAGS " " _flags)
list(JOIN MAEFAST_ISAS_USED " " _isas)
list(JOIN MAEFAST_CUDA_ARCHS_USED " " _archs)
target_compile_definitions(_C PRIVATE
  "MAEFAST_VERSION=\"${SKBUILD_PROJECT_VERSION_FULL}\""
  "MAEFAST_COMMIT=\"${_commit}\""
  "MAEFAST_COMPILER=\"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\""
  "MAEFAST_FLAGS=\"${_flags}\""
  "MAEFAST_CPU_ISAS=\"${_isas}\""
  "MAEFAST_TORCH_VERSION=\"${MAEFAST_TORCH_VERSION}\""
  "MAEFAST_CUDA_VERSION=\"${MAEFAST_CUDA_COMPILER_VERSION}\""
  "MAEFAST_CUDA_ARCHS=\"${_archs}\""
  "MAEFAST_CPU_CHOICE=\"${MAEFAST_CPU_CHOICE}\""
  "MAEFAST_CUDA_CHOICE=\"${MAEFAST_CUDA_CHOICE}\"")
target_compile_definitions(_C PRIVATE ${MAEFAST_ISA_DEFINITIONS})
install(TARGETS _C LIBRARY DESTINATION maefast)
