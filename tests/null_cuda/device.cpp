// The device of the null CUDA runtime: one "H100" with its properties; versions, errors, the driver's functions by name.
#include "runtime.h"
#include <dlfcn.h>
#include <cstdio>
#include <cstring>

namespace nullcuda {

cudaError_t last_error = cudaSuccess;

cudaError_t refuse(cudaError_t error, const char* what) {
  counts.illegal++;
  fprintf(stderr, "[nullcuda] illegal: %s -> %d\n", what, (int)error);
  last_error = error;
  return error;
}

}  // namespace nullcuda

using namespace nullcuda;

// ---- the device ----

EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int) { return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) {
  snprintf(id, size, "0000:00:00.0");
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* device, int) {
  memset(device, 0, sizeof *device);
  strcpy(device->name, "NVIDIA H100 80GB HBM3 (null)");
  device->totalGlobalMem = 85520809984;
  device->major = 9;
  device->minor = 0;
  device->multiProcessorCount = 132;
  device->warpSize = 32;
  device->sharedMemPerBlock = 49152;
  device->sharedMemPerBlockOptin = 232448;
  device->sharedMemPerMultiprocessor = 233472;
  device->regsPerBlock = 65536;
  device->regsPerMultiprocessor = 65536;
  device->maxThreadsPerBlock = 1024;
  device->maxThreadsPerMultiProcessor = 2048;
  device->maxThreadsDim[0] = device->maxThreadsDim[1] = 1024;
  device->maxThreadsDim[2] = 64;
  device->maxGridSize[0] = 2147483647;
  device->maxGridSize[1] = device->maxGridSize[2] = 65535;
  device->l2CacheSize = 52428800;
  device->memoryBusWidth = 5120;
  device->maxBlocksPerMultiProcessor = 32;
  device->unifiedAddressing = 1;
  device->concurrentKernels = 1;
  return cudaSuccess;
}

// For the driver's half as well, whose numbers for attributes are the same.
EXPORT int nullcuda_attr(int attribute) {
  cudaDeviceProp device;
  cudaGetDeviceProperties(&device, 0);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: return device.maxThreadsPerBlock;
    case cudaDevAttrMaxBlockDimX: return device.maxThreadsDim[0];
    case cudaDevAttrMaxBlockDimY: return device.maxThreadsDim[1];
    case cudaDevAttrMaxBlockDimZ: return device.maxThreadsDim[2];
    case cudaDevAttrMaxGridDimX: return device.maxGridSize[0];
    case cudaDevAttrMaxGridDimY: return device.maxGridSize[1];
    case cudaDevAttrMaxGridDimZ: return device.maxGridSize[2];
    case cudaDevAttrMaxSharedMemoryPerBlock: return device.sharedMemPerBlock;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return device.sharedMemPerBlockOptin;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return device.sharedMemPerMultiprocessor;
    case cudaDevAttrWarpSize: return device.warpSize;
    case cudaDevAttrMaxRegistersPerBlock: return device.regsPerBlock;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return device.regsPerMultiprocessor;
    case cudaDevAttrMultiProcessorCount: return device.multiProcessorCount;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return device.maxThreadsPerMultiProcessor;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return device.maxBlocksPerMultiProcessor;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return device.memoryBusWidth;
    case cudaDevAttrL2CacheSize: return device.l2CacheSize;
    case cudaDevAttrComputeCapabilityMajor: return device.major;
    case cudaDevAttrComputeCapabilityMinor: return device.minor;
    case cudaDevAttrUnifiedAddressing: return device.unifiedAddressing;
    default: return 0;
  }
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = nullcuda_attr(attribute);
  return cudaSuccess;
}

// ---- versions and errors ----

EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13020;
  return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORT const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing"
                                                    : "null cuda error";
}
EXPORT const char* cudaGetErrorName(cudaError_t) { return "nullError"; }

// ---- the driver's functions by name: what driver.c lacks says that it succeeded ----

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  *function = driver ? dlsym(driver, name) : nullptr;
  if (!*function) *function = driver ? dlsym(driver, "nullcuda_zero") : nullptr;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
