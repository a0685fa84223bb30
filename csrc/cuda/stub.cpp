// Link-time stand-in for libtorch_cuda.so: the symbols that csrc/cuda takes from it, and its soname. At run
// time the library of the CUDA torch in the process answers; this one is never installed nor called.
extern "C" __attribute__((visibility("default"))) int aoti_torch_get_current_cuda_stream(int, void**) {
  return 1;
}
