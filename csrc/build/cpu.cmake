# csrc/cpu/<family>.cpp         host code, compiled once
# csrc/cpu/<family>_kernel.cpp  loops, compiled once per instruction set; chosen at run time (csrc/cpu/isa.h)
# Which sets: csrc/build/choice.py (MAEFAST_ISAS).
file(GLOB _kernels CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/cpu/*_kernel.cpp")
file(GLOB _host CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/cpu/*.cpp")
list(REMOVE_ITEM _host ${_kernels})

set(MAEFAST_KERNEL_FLAGS
  -O3
  -Wall -Wextra
  # Same rounding on every instruction set: a multiply and an add stay two roundings unless the code says fma.
  -ffp-contract=off
  # Neither changes a value; both stand in the way of vectorisation.
  -fno-math-errno -fno-trapping-math
  # `#pragma omp simd` without an OpenMP runtime.
  -fopenmp-simd)

set(_compiles plain)
set(MAEFAST_ISA_DEFINITIONS "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND _compiles avx2 avx512)
  list(APPEND MAEFAST_ISA_DEFINITIONS MAEFAST_X86=1)
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-mavx512bf16 MAEFAST_COMPILES_AVX512BF16)
  if(MAEFAST_COMPILES_AVX512BF16)
    list(APPEND _compiles avx512bf16)
    check_cxx_compiler_flag("-mamx-tile -mamx-bf16" MAEFAST_COMPILES_AMX)
    if(MAEFAST_COMPILES_AMX)
      list(APPEND _compiles amx)
    endif()
  endif()
endif()
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/choice.py" cpu
    "--isas=${MAEFAST_ISAS}" "--compiles=${_compiles}"
  OUTPUT_VARIABLE _choice OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _status ERROR_VARIABLE _error)
if(NOT _status EQUAL 0)
  message(FATAL_ERROR "maefast: ${_error}")
endif()
string(REGEX MATCH "^([^|]*)[|](.*)$" _choice "${_choice}")
set(MAEFAST_ISAS_USED "${CMAKE_MATCH_1}")
set(MAEFAST_CPU_CHOICE "${CMAKE_MATCH_2}")
list(JOIN MAEFAST_ISAS_USED ", " _shown)
message(STATUS "maefast: CPU ops: for ${_shown}: ${MAEFAST_CPU_CHOICE}")
foreach(_isa IN LISTS MAEFAST_ISAS_USED)
  string(TOUPPER "${_isa}" _upper)
  list(APPEND MAEFAST_ISA_DEFINITIONS "MAEFAST_HAS_${_upper}=1")
endforeach()
set(_isa_flags_plain "")
set(_isa_flags_avx2 -mavx2 -mfma -mf16c)
set(_isa_flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512)
set(_isa_flags_avx512bf16 ${_isa_flags_avx512} -mavx512bf16)
set(_isa_flags_amx ${_isa_flags_avx512bf16} -mamx-tile -mamx-bf16)
# bfloat16 products pay in these alone; the others have no such copies (MAEFAST_KERNELS in csrc/cpu/isa.h).
set(_kernels_with_bf16 ${_kernels})
list(FILTER _kernels_with_bf16 INCLUDE REGEX "/attention(_backward)?_kernel.cpp$")

add_library(_cpu MODULE ${_host})
set_target_properties(_cpu PROPERTIES PREFIX "" SUFFIX ".so")
target_include_directories(_cpu PRIVATE "${CMAKE_SOURCE_DIR}/csrc")
target_compile_options(_cpu PRIVATE -O3 -Wall -Wextra)
target_link_options(_cpu PRIVATE -Wl,--no-undefined -Wl,--as-needed)
target_link_libraries(_cpu PRIVATE maefast_torch)
target_compile_definitions(_cpu PRIVATE ${MAEFAST_ISA_DEFINITIONS})
# torch's headers cost every file two seconds; read once, a third of one.
target_precompile_headers(_cpu PRIVATE "${CMAKE_SOURCE_DIR}/csrc/cpu/ops.h" "${CMAKE_SOURCE_DIR}/csrc/cpu/host.h")

foreach(_isa IN LISTS MAEFAST_ISAS_USED)
  if(_isa MATCHES "^(avx512bf16|amx)$")
    add_library(maefast_kernels_${_isa} OBJECT ${_kernels_with_bf16})
  else()
    add_library(maefast_kernels_${_isa} OBJECT ${_kernels})
  endif()
  target_include_directories(maefast_kernels_${_isa} PRIVATE "${CMAKE_SOURCE_DIR}/csrc")
  target_compile_options(maefast_kernels_${_isa} PRIVATE ${MAEFAST_KERNEL_FLAGS} ${_isa_flags_${_isa}})
  target_compile_definitions(maefast_kernels_${_isa} PRIVATE MAEFAST_ISA=${_isa} ${MAEFAST_ISA_DEFINITIONS})
  target_link_libraries(_cpu PRIVATE $<TARGET_OBJECTS:maefast_kernels_${_isa}>)
  list(APPEND _kernel_objects $<TARGET_OBJECTS:maefast_kernels_${_isa}>)
endforeach()
# The linker keeps one copy of an inline function that several files emit. Were it the AVX-512 copy, an older
# CPU would die on it, so kernel files may emit none; this fails the build when one does.
add_custom_command(TARGET _cpu PRE_LINK
  COMMAND "${CMAKE_COMMAND}" "-DNM=${CMAKE_NM}" "-DOBJECTS=$<JOIN:${_kernel_objects},|>"
    -P "${CMAKE_SOURCE_DIR}/csrc/build/no_shared_inlines.cmake" VERBATIM)

install(TARGETS _cpu LIBRARY DESTINATION maefast)
