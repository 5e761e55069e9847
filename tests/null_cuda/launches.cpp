// Kernels of the null CUDA runtime, which do nothing: launches are checked and counted, cuBLAS's handles are made.
#include "runtime.h"
#include <cstdlib>
#include <cstring>

namespace nullcuda {
Counts counts;
}

using namespace nullcuda;

// In the order of COUNTED in tests/null_cuda_child.py.
EXPORT void nullcuda_counts(long* out) {
  const std::atomic<long>* all[] = {&counts.syncs,          &counts.launches, &counts.pageable_copies, &counts.mallocs,
                                    &counts.copies_to_host, &counts.graphs,   &counts.illegal};
  for (const std::atomic<long>* count : all) *out++ = *count;
}

// ---- launches ----

EXPORT cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void**, size_t, cudaStream_t) {
  counts.launches++;
  unsigned threads = block.x * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || !block.x || threads > 1024)
    return refuse(cudaErrorInvalidConfiguration, "launch configuration");
  return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) {
  counts.launches++;
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  counts.launches++;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = 90;
  attributes->binaryVersion = 90;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                                          unsigned) {
  *blocks = 2;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  *address = allocate(1 << 20, Kind::device);
  return cudaSuccess;
}
EXPORT cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
  *object = (cudaUserObject_t)malloc(8);
  return cudaSuccess;
}

// ---- what the start-up code of compiled CUDA calls ----

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle[8];
  return handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT char __cudaInitModule(void**) { return 1; }
EXPORT unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  *grid = *block = dim3(1, 1, 1);
  *shared_bytes = 0;
  *(void**)stream = nullptr;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(void** kernel, const void* function) {
  *kernel = (void*)function;
  return cudaSuccess;
}

// ---- cuBLAS: handles and answers that are more than a status (0: success) ----

static int make_handle(void** handle) {
  *handle = malloc(64);
  return 0;
}
EXPORT int cublasCreate_v2(void** handle) { return make_handle(handle); }
EXPORT int cublasLtMatmulDescCreate(void** description, int, int) { return make_handle(description); }
EXPORT int cublasLtMatrixLayoutCreate(void** layout, int, unsigned long, unsigned long, long) {
  return make_handle(layout);
}
EXPORT int cublasLtMatmulPreferenceCreate(void** preference) { return make_handle(preference); }
EXPORT int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return 0;
}
EXPORT int cublasGetPointerMode_v2(void*, int* mode) {
  *mode = 0;
  return 0;
}
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* found) {
  *found = 1;
  return 0;
}
EXPORT size_t cublasLtGetVersion() { return 130000; }
