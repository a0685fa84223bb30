# Locates torch by asking Python, without importing it. find_package(Torch) is avoided on purpose: beside a
# CUDA torch it needs a working nvcc and nvrtc even for CPU code, and it overrides the architecture list.
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/torch_location.py"
  OUTPUT_VARIABLE _torch OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _status ERROR_VARIABLE _error)
if(NOT _status EQUAL 0)
  message(FATAL_ERROR "maefast: ${_error}")
endif()
list(GET _torch 0 MAEFAST_TORCH_DIR)
list(GET _torch 1 MAEFAST_TORCH_VERSION)
list(GET _torch 2 MAEFAST_TORCH_CUDA)
message(STATUS "maefast: torch ${MAEFAST_TORCH_VERSION} (CUDA: ${MAEFAST_TORCH_CUDA}) in ${MAEFAST_TORCH_DIR}")

add_library(maefast_torch INTERFACE)
target_include_directories(maefast_torch SYSTEM INTERFACE "${MAEFAST_TORCH_DIR}/include")
# Stable ABI of torch 2.10: the result runs on that and every later version.
target_compile_definitions(maefast_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(maefast_torch INTERFACE "${MAEFAST_TORCH_DIR}/lib/libtorch_cpu.so")
