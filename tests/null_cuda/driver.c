// The driver half of the null CUDA runtime: libcuda.so.1, which Triton and torch's compiler call. Modules load,
// functions are found, launches are checked for what a card would refuse, and nothing runs.
#include <cuda.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#define EXPORT __attribute__((visibility("default")))
EXPORT CUresult nullcuda_zero(void) { return 0; }
EXPORT CUresult cuInit(unsigned f) { return 0; }
EXPORT CUresult cuDriverGetVersion(int* v) {
  *v = 13020;
  return 0;
}
EXPORT CUresult cuDeviceGet(CUdevice* d, int n) {
  *d = n;
  return 0;
}
EXPORT CUresult cuDeviceGetCount(int* n) {
  *n = 1;
  return 0;
}
EXPORT CUresult cuCtxGetDevice(CUdevice* d) {
  *d = 0;
  return 0;
}
static char ctx[64];
EXPORT CUresult cuCtxGetCurrent(CUcontext* c) {
  *c = (CUcontext)ctx;
  return 0;
}
EXPORT CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) {
  *c = (CUcontext)ctx;
  return 0;
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned* f, int* a) {
  if (f) *f = 0;
  *a = 1;
  return 0;
}
extern int nullcuda_attr(int) __attribute__((weak));
EXPORT CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice d) {
  *v = nullcuda_attr ? nullcuda_attr(a) : 0;
  return 0;
}
EXPORT CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction f) {
  *v = a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
EXPORT CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
EXPORT CUresult cuGetErrorString(CUresult e, const char** s) {
  *s = "null";
  return 0;
}
EXPORT CUresult cuModuleLoadData(CUmodule* m, const void* p) {
  *m = (CUmodule)malloc(8);
  return 0;
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule* m, const void* p, unsigned n, CUjit_option* o, void** v) {
  *m = (CUmodule)malloc(8);
  return 0;
}
EXPORT CUresult cuModuleLoad(CUmodule* m, const char* p) {
  *m = (CUmodule)malloc(8);
  return 0;
}
EXPORT CUresult cuModuleUnload(CUmodule m) { return 0; }
EXPORT CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char* n) {
  *f = (CUfunction)malloc(8);
  return 0;
}
EXPORT CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                               unsigned bz, unsigned s, CUstream st, void** a, void** e) {
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || s > 232448) {
    fprintf(stderr, "[nullcuda] bad launch %u %u %u shared %u\n", gx, gy, gz, s);
    return CUDA_ERROR_INVALID_VALUE;
  }
  return 0;
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** a, void** e) {
  return cuLaunchKernel(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, 1, 1, c->sharedMemBytes, 0, a, e);
}
EXPORT CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                          unsigned bz, unsigned s, CUstream st, void** a) {
  return 0;
}
EXPORT CUresult cuPointerGetAttribute(void* d, CUpointer_attribute a, CUdeviceptr p) {
  if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *(CUdeviceptr*)d = p;
  else
    *(unsigned long long*)d = 0;
  return 0;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction f, const CUlaunchConfig* c) {
  *n = 1;
  return 0;
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction f, int b, size_t s) {
  *n = 2;
  return 0;
}
EXPORT CUresult cuCtxGetLimit(size_t* v, CUlimit l) {
  *v = 0;
  return 0;
}
EXPORT CUresult cuCtxSetLimit(CUlimit l, size_t v) { return 0; }
EXPORT CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus* st) {
  *st = 0;
  return 0;
}
