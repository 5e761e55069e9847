// The runtime half of the null CUDA runtime, preloaded before libcudart: torch sees one "H100".
//
//   device memory   RAM that costs nothing until it is written; NULLCUDA_GB limits it, so that torch's own allocator
//                   runs out as on a card of that size
//   copies          are made, but within the device only below LARGE: above it the target reads as zeros
//   kernels         do nothing; their launch configurations are checked
//   streams         know whether they are being captured; what CUDA refuses meanwhile is refused, told and counted
//
// nullcuda_counts gives what happened so far. It cannot show values, cuDNN (switched off by site/), or times.
#include <cuda_runtime_api.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <sys/mman.h>
#include <dlfcn.h>
#include <atomic>
#define EXPORT extern "C" __attribute__((visibility("default")))

// ---- state ----

struct Stream {
  int id;
  bool capturing = false;
  unsigned long long cap = 0;
  bool origin = false;
};
struct Event {
  bool captured = false;
  unsigned long long cap = 0;
};
static std::mutex mutex;
static std::map<char*, std::pair<size_t, int>> mem;  // 1 device, 2 host
static Stream legacy{0};
static int ids = 0;
static unsigned long long capid = 0;
static std::set<Stream*> capset;
static thread_local cudaStreamCaptureMode tmode = cudaStreamCaptureModeGlobal;
static thread_local unsigned long long thread_capture = 0;
static std::atomic<long> n_sync{0}, n_launch{0}, n_h2d_pageable{0}, n_malloc{0}, n_d2h{0}, n_graph{0}, n_err{0};
static cudaError_t last = cudaSuccess;
EXPORT void nullcuda_counts(long* o) {
  o[0] = n_sync;
  o[1] = n_launch;
  o[2] = n_h2d_pageable;
  o[3] = n_malloc;
  o[4] = n_d2h;
  o[5] = n_graph;
  o[6] = n_err;
}
static cudaError_t refuse(cudaError_t e, const char* what) {
  n_err++;
  fprintf(stderr, "[nullcuda] illegal: %s -> %d\n", what, (int)e);
  last = e;
  return e;
}
static Stream* stream_of(cudaStream_t s) {
  return (s == nullptr || s == (cudaStream_t)1 || s == (cudaStream_t)2) ? &legacy : (Stream*)s;
}

// ---- memory: every block's address, size and kind (1 device, 2 host) ----

static size_t used = 0;
static size_t limit_bytes() {
  static size_t v = getenv("NULLCUDA_GB") ? (size_t)(atof(getenv("NULLCUDA_GB")) * 1e9) : (size_t)1 << 60;
  return v;
}
static void* get(size_t n, int kind) {
  size_t m = (n + 4095) / 4096 * 4096;
  if (!m) m = 4096;
  if (kind == 1) {
    std::lock_guard<std::mutex> g(mutex);
    if (used + m > limit_bytes()) return nullptr;
    used += m;
  }
  char* p = (char*)mmap(nullptr, m, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  std::lock_guard<std::mutex> g(mutex);
  mem[p] = {m, kind};
  return p;
}
static cudaError_t put(void* p) {
  if (!p) return cudaSuccess;
  std::lock_guard<std::mutex> g(mutex);
  auto it = mem.find((char*)p);
  if (it != mem.end()) {
    if (it->second.second == 1) used -= it->second.first;
    munmap(p, it->second.first);
    mem.erase(it);
  }
  return cudaSuccess;
}
static int kind(const void* p) {
  std::lock_guard<std::mutex> g(mutex);
  auto it = mem.upper_bound((char*)p);
  if (it == mem.begin()) return 0;
  --it;
  return (char*)p < it->first + it->second.first ? it->second.second : 0;
}
// Zeros cost no RAM: whole pages of a private mapping are given back and read as zeros again.
static void forget(void* d, size_t n) {
  uintptr_t a = ((uintptr_t)d + 4095) & ~(uintptr_t)4095, z = ((uintptr_t)d + n) & ~(uintptr_t)4095;
  if (z > a && madvise((void*)a, z - a, MADV_DONTNEED) == 0) {
    memset(d, 0, a - (uintptr_t)d);
    memset((void*)z, 0, (uintptr_t)d + n - z);
  } else
    memset(d, 0, n);
}
static const size_t LARGE = 16 << 20;  // copies within the device above this are not made: the target reads as zeros
static void fill(void* d, int v, size_t n) {
  if (v == 0 && n >= 65536 && kind(d) == 1)
    forget(d, n);
  else
    memset(d, v, n);
}
static void move(void* d, const void* s, size_t n) {
  if (n >= LARGE && kind(d) == 1 && kind(s) == 1)
    forget(d, n);
  else
    memmove(d, s, n);
}
// Whether this thread records a graph and may not do what waits or allocates.
static bool unsafe_now() { return thread_capture && tmode != cudaStreamCaptureModeRelaxed; }

// ---- the device ----

EXPORT cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int* d) {
  *d = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int) { return cudaSuccess; }
EXPORT cudaError_t cudaDeviceSynchronize() {
  n_sync++;
  if (unsafe_now()) return refuse(cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize while capturing");
  return cudaSuccess;
}
static int attr(int a) {
  switch (a) {
    case cudaDevAttrMaxThreadsPerBlock:
      return 1024;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return 1024;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return 49152;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrMaxRegistersPerBlock:
      return 65536;
    case cudaDevAttrClockRate:
      return 1980000;
    case cudaDevAttrMultiProcessorCount:
      return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return 2048;
    case cudaDevAttrMemoryClockRate:
      return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth:
      return 5120;
    case cudaDevAttrL2CacheSize:
      return 52428800;
    case cudaDevAttrComputeCapabilityMajor:
      return 9;
    case cudaDevAttrComputeCapabilityMinor:
      return 0;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return 233472;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return 65536;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return 232448;
    case cudaDevAttrUnifiedAddressing:
      return 1;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return 32;
    default:
      return 0;
  }
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  *v = attr(a);
  return cudaSuccess;
}
EXPORT int nullcuda_attr(int a) { return attr(a); }
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 80GB HBM3 (null)");
  p->totalGlobalMem = 85520809984ull;
  p->major = 9;
  p->minor = 0;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = 65536;
  p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->l2CacheSize = 52428800;
  p->memoryBusWidth = 5120;
  p->maxBlocksPerMultiProcessor = 32;
  p->unifiedAddressing = 1;
  p->concurrentKernels = 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) {
  if (a) *a = 0;
  if (b) *b = -5;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int* v) {
  *v = 13020;
  return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}

// ---- memory and copies ----

EXPORT cudaError_t cudaMalloc(void** p, size_t n) {
  n_malloc++;
  if (unsafe_now()) return refuse(cudaErrorStreamCaptureUnsupported, "cudaMalloc while capturing");
  *p = get(n, 1);
  if (!*p) {
    last = cudaErrorMemoryAllocation;
    return cudaErrorMemoryAllocation;
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) {
  *p = get(n, 1);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMallocManaged(void** p, size_t n, unsigned) {
  *p = get(n, 1);
  return cudaSuccess;
}
EXPORT cudaError_t cudaFree(void* p) {
  if (p && unsafe_now()) return refuse(cudaErrorStreamCaptureUnsupported, "cudaFree while capturing");
  return put(p);
}
EXPORT cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return put(p); }
EXPORT cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
  if (unsafe_now()) return refuse(cudaErrorStreamCaptureUnsupported, "cudaHostAlloc while capturing");
  *p = get(n, 2);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMallocHost(void** p, size_t n) {
  *p = get(n, 2);
  return cudaSuccess;
}
EXPORT cudaError_t cudaFreeHost(void* p) { return put(p); }
EXPORT cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
EXPORT cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
EXPORT cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
  size_t t0 = limit_bytes() < ((size_t)1 << 60) ? limit_bytes() : 85520809984ull;
  *t = t0;
  *f = t0 > used ? t0 - used : 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) {
  n_sync++;
  if (unsafe_now()) return refuse(cudaErrorStreamCaptureUnsupported, "cudaMemcpy while capturing");
  memmove(d, s, n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t st) {
  int a = kind(s), b = kind(d);
  if (a == 0 && b == 1) n_h2d_pageable++;
  if (a == 1 && b != 1) n_d2h++;
  if (stream_of(st)->capturing && (a == 0 || b == 0))
    return refuse(cudaErrorStreamCaptureUnsupported, "copy of pageable memory on a capturing stream");
  move(d, s, n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t) {
  memmove(d, s, n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, cudaMemcpyKind,
                                     cudaStream_t) {
  for (size_t i = 0; i < h; i++) memmove((char*)d + i * dp, (char*)s + i * sp, w);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
EXPORT cudaError_t cudaMemset(void* d, int v, size_t n) {
  fill(d, v, n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t) {
  fill(d, v, n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  int k = kind(p);
  a->type = k == 1 ? cudaMemoryTypeDevice : k == 2 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->device = 0;
  a->devicePointer = (void*)p;
  a->hostPointer = k == 2 ? (void*)p : nullptr;
  return cudaSuccess;
}

// ---- events and streams ----

EXPORT cudaError_t cudaEventCreate(cudaEvent_t* e) {
  *e = (cudaEvent_t) new Event;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  *e = (cudaEvent_t) new Event;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t e) {
  delete (Event*)e;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  ((Event*)e)->captured = stream_of(s)->capturing;
  ((Event*)e)->cap = stream_of(s)->cap;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
EXPORT cudaError_t cudaEventQuery(cudaEvent_t e) {
  if (((Event*)e)->captured) return refuse(cudaErrorCapturedEvent, "cudaEventQuery of a captured event");
  if (unsafe_now()) return refuse(cudaErrorStreamCaptureUnsupported, "cudaEventQuery while this thread captures");
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  n_sync++;
  if (((Event*)e)->captured) return refuse(cudaErrorCapturedEvent, "cudaEventSynchronize of a captured event");
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  *ms = 1.0f;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) {
  auto p = new Stream;
  p->id = ++ids;
  *s = (cudaStream_t)p;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
  return cudaStreamCreateWithPriority(s, 0, 0);
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) {
  *p = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t s) {
  if (stream_of(s)->capturing) return refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery while capturing");
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  n_sync++;
  if (stream_of(s)->capturing)
    return refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize while capturing");
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  auto ev = (Event*)e;
  auto st = stream_of(s);
  if (ev->captured) {
    if (st == &legacy) return refuse(cudaErrorStreamCaptureImplicit, "the legacy stream waits for a captured event");
    if (!st->capturing) {
      st->capturing = true;
      st->cap = ev->cap;
      capset.insert(st);
    }
  }
  return cudaSuccess;
}

// ---- graphs ----

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode m) {
  auto st = stream_of(s);
  if (st == &legacy) return refuse(cudaErrorStreamCaptureUnsupported, "capture of the legacy stream");
  st->capturing = true;
  st->origin = true;
  st->cap = ++capid;
  capset.insert(st);
  thread_capture = st->cap;
  tmode = m;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t s, cudaGraph_t, const cudaGraphNode_t*,
                                                 const cudaGraphEdgeData*, size_t, cudaStreamCaptureMode m) {
  return cudaStreamBeginCapture(s, m);
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) {
  for (auto x : capset) {
    x->capturing = false;
    x->cap = 0;
  }
  capset.clear();
  thread_capture = 0;
  *g = (cudaGraph_t)malloc(8);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* st) {
  *st = stream_of(s)->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* st, unsigned long long* id,
                                            cudaGraph_t* g, const cudaGraphNode_t** d, const cudaGraphEdgeData** e,
                                            size_t* n) {
  *st = stream_of(s)->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = stream_of(s)->cap;
  if (g) *g = nullptr;
  if (d) *d = nullptr;
  if (e) *e = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* m) {
  auto t = tmode;
  tmode = *m;
  *m = t;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t, unsigned long long) {
  *e = (cudaGraphExec_t)malloc(8);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t, unsigned long long) {
  *e = (cudaGraphExec_t)malloc(8);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  n_graph++;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* n) {
  *n = 1;
  return cudaSuccess;
}

// ---- kernels ----

EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = 90;
  a->binaryVersion = 90;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  *n = 2;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  *n = 2;
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernel(const void*, dim3 g, dim3 b, void**, size_t, cudaStream_t) {
  n_launch++;
  if (!g.x || !g.y || !g.z || b.x * b.y * b.z > 1024 || !b.x) {
    return refuse(cudaErrorInvalidConfiguration, "launch configuration");
  }
  return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) {
  n_launch++;
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  n_launch++;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetSymbolAddress(void** p, const void*) {
  *p = get(1 << 20, 1);
  return cudaSuccess;
}

// ---- errors and entry points ----

EXPORT cudaError_t cudaGetLastError() {
  auto e = last;
  last = cudaSuccess;
  return e;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last; }
EXPORT const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing"
                                                : "null cuda error";
}
EXPORT const char* cudaGetErrorName(cudaError_t) { return "nullError"; }
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* q) {
  static void* h = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  *f = h ? dlsym(h, name) : nullptr;
  if (!*f) *f = h ? dlsym(h, "nullcuda_zero") : nullptr;
  if (q) *q = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int) {
  snprintf(s, n, "0000:00:00.0");
  return cudaSuccess;
}

// ---- what the compiler's start-up code calls ----

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* h[8];
  return h;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT char __cudaInitModule(void**) { return 1; }
EXPORT unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* s, void* st) {
  *g = dim3(1, 1, 1);
  *b = dim3(1, 1, 1);
  *s = 0;
  *(void**)st = nullptr;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(void** k, const void* f) {
  *k = (void*)f;
  return cudaSuccess;
}
EXPORT cudaError_t cudaUserObjectCreate(cudaUserObject_t* o, void*, cudaHostFn_t, unsigned, unsigned) {
  *o = (cudaUserObject_t)malloc(8);
  return cudaSuccess;
}

// ---- cuBLAS: handles that are more than a status ----

EXPORT int cublasCreate_v2(void** h) {
  *h = malloc(64);
  return 0;
}
EXPORT int cublasGetMathMode(void*, int* m) {
  *m = 0;
  return 0;
}
EXPORT int cublasGetPointerMode_v2(void*, int* m) {
  *m = 0;
  return 0;
}
EXPORT int cublasLtMatmulDescCreate(void** d, int, int) {
  *d = malloc(64);
  return 0;
}
EXPORT int cublasLtMatrixLayoutCreate(void** d, int, unsigned long, unsigned long, long) {
  *d = malloc(64);
  return 0;
}
EXPORT int cublasLtMatmulPreferenceCreate(void** d) {
  *d = malloc(64);
  return 0;
}
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* r, int* n) {
  *n = 1;
  return 0;
}
EXPORT size_t cublasLtGetVersion() { return 130000; }
