# The CUDA library. csrc/build/choice.py says whether it is built and for which architectures (MAEFAST_CUDA,
# MAEFAST_CUDA_ARCHS, in the environment too).
set(MAEFAST_CUDA_COMPILER_VERSION "")
set(MAEFAST_CUDA_ARCHS_USED "")
file(GLOB _sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu" "${CMAKE_SOURCE_DIR}/csrc/cuda/*.cpp")
list(FILTER _sources EXCLUDE REGEX "/stub\\.cpp$")

set(_nvcc "${CMAKE_CUDA_COMPILER}")
if(NOT _nvcc AND NOT "$ENV{CUDACXX}" STREQUAL "")
  separate_arguments(_words UNIX_COMMAND "$ENV{CUDACXX}")  # may bring options, which CMake reads itself
  list(GET _words 0 _nvcc)
elseif(NOT _nvcc)
  find_program(MAEFAST_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin PATHS /usr/local/cuda/bin)
  if(MAEFAST_NVCC)
    set(_nvcc "${MAEFAST_NVCC}")
  endif()
endif()
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/choice.py" cuda
    "--cuda=${MAEFAST_CUDA}" "--archs=${MAEFAST_CUDA_ARCHS}" "--nvcc=${_nvcc}"
    "--torch-version=${MAEFAST_TORCH_VERSION}" "--torch-cuda=${MAEFAST_TORCH_CUDA}"
  OUTPUT_VARIABLE _choice OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _status ERROR_VARIABLE _error)
if(NOT _status EQUAL 0)
  message(FATAL_ERROR "maefast: ${_error}")
endif()
string(REGEX MATCH "^([^|]*)[|]([^|]*)[|](.*)$" _choice "${_choice}")
set(_build "${CMAKE_MATCH_1}")
set(MAEFAST_CUDA_ARCHS_USED "${CMAKE_MATCH_2}")
set(MAEFAST_CUDA_CHOICE "${CMAKE_MATCH_3}")
if(NOT _build STREQUAL "on")
  message(STATUS "maefast: CUDA ops: not built: ${MAEFAST_CUDA_CHOICE}")
  return()
endif()

if("$ENV{CUDACXX}" STREQUAL "")
  set(CMAKE_CUDA_COMPILER "${_nvcc}")
endif()
# The architectures are set on the target; this keeps the compiler test from trying one that nvcc lacks.
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
set(MAEFAST_CUDA_COMPILER_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
list(JOIN MAEFAST_CUDA_ARCHS_USED ", " _shown)
message(STATUS "maefast: CUDA ops: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${_shown}: ${MAEFAST_CUDA_CHOICE}")

# Stands in for torch's own library at link time, so that a CPU-only torch will do; never installed.
add_library(maefast_torch_cuda_stub SHARED csrc/cuda/stub.cpp)
set_target_properties(maefast_torch_cuda_stub PROPERTIES
  OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stub")

add_library(_cuda MODULE ${_sources})
set_target_properties(_cuda PROPERTIES
  PREFIX "" SUFFIX ".so"
  CUDA_ARCHITECTURES "${MAEFAST_CUDA_ARCHS_USED}"
  CUDA_STANDARD 17
  CUDA_RUNTIME_LIBRARY Static
  CUDA_VISIBILITY_PRESET hidden)
target_include_directories(_cuda PRIVATE csrc)
target_include_directories(_cuda SYSTEM PRIVATE "${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}")
target_compile_definitions(_cuda PRIVATE USE_CUDA)
target_compile_options(_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-O3 -Wall -Wextra>
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xcompiler=-Wall -lineinfo --threads=2>)  # two architectures at a time
target_link_options(_cuda PRIVATE -Wl,--no-undefined -Wl,--as-needed)
target_link_libraries(_cuda PRIVATE maefast_torch maefast_torch_cuda_stub)
install(TARGETS _cuda LIBRARY DESTINATION maefast)
