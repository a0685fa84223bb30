# The CUDA library is built when a CUDA compiler works, whatever torch is installed and whether or not this
# machine has a GPU: images are often built without one. MAEFAST_CUDA and MAEFAST_CUDA_ARCHS may also be set in
# the environment, which wins.
set(MAEFAST_CUDA_COMPILER_VERSION "")
set(MAEFAST_CUDA_ARCHS_USED "")
foreach(_name MAEFAST_CUDA MAEFAST_CUDA_ARCHS)
  if(NOT "$ENV{${_name}}" STREQUAL "")
    set(${_name} "$ENV{${_name}}")
  endif()
endforeach()
string(TOLOWER "${MAEFAST_CUDA}" _cuda)
if(NOT _cuda MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "MAEFAST_CUDA=${MAEFAST_CUDA}: choose auto, on or off")
endif()
file(GLOB _sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu" "${CMAKE_SOURCE_DIR}/csrc/cuda/*.cpp")
list(FILTER _sources EXCLUDE REGEX "/stub\\.cpp$")
if(_cuda STREQUAL "off" OR NOT _sources)
  message(STATUS "maefast: CUDA ops: not built (MAEFAST_CUDA=${_cuda})")
  return()
endif()

if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "")
  find_program(MAEFAST_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin PATHS /usr/local/cuda/bin)
  if(MAEFAST_NVCC)
    set(CMAKE_CUDA_COMPILER "${MAEFAST_NVCC}")
  endif()
endif()
# The architectures are set on the target; this keeps the compiler test from trying one that nvcc lacks.
set(CMAKE_CUDA_ARCHITECTURES OFF)
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(_cuda STREQUAL "on")
    message(FATAL_ERROR "MAEFAST_CUDA=on, but no working CUDA compiler was found")
  endif()
  message(STATUS "maefast: CUDA ops: not built (no working CUDA compiler)")
  return()
endif()
enable_language(CUDA)
set(MAEFAST_CUDA_COMPILER_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")

# Ampere, Hopper (with its own instructions), Blackwell; PTX of the last for what comes later.
if(MAEFAST_CUDA_ARCHS STREQUAL "")
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE _known)
  foreach(_arch 80 90a 100)
    string(REGEX REPLACE "a$" "" _number "${_arch}")
    if(_known MATCHES "compute_${_number}[^0-9]")
      list(APPEND MAEFAST_CUDA_ARCHS_USED "${_arch}-real")
      set(_last "${_number}")
    endif()
  endforeach()
  list(APPEND MAEFAST_CUDA_ARCHS_USED "${_last}-virtual")
else()
  string(REGEX REPLACE "[ ,]+" ";" MAEFAST_CUDA_ARCHS_USED "${MAEFAST_CUDA_ARCHS}")
endif()
message(STATUS "maefast: CUDA ops: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${MAEFAST_CUDA_ARCHS_USED}")

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
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xcompiler=-Wall -lineinfo>)
target_link_options(_cuda PRIVATE -Wl,--no-undefined -Wl,--as-needed)
target_link_libraries(_cuda PRIVATE maefast_torch maefast_torch_cuda_stub)
install(TARGETS _cuda LIBRARY DESTINATION maefast)
