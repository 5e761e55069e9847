// Memory of the null CUDA runtime: blocks of RAM that know whether they are the device's or pinned; copies of them.
#include "runtime.h"
#include <sys/mman.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace nullcuda {

static const size_t PAGE_BYTES = 4096;
static const size_t UNLIMITED_BYTES = (size_t)1 << 60;
static const size_t H100_BYTES = 85520809984;
static const size_t ZEROED_BY_PAGES = 64 << 10;  // smaller blocks are cleared byte by byte
static const size_t NOT_COPIED = 16 << 20;  // copies within the device from here on are not made: they read as zeros

struct Block {
  size_t bytes;
  Kind kind;
};
static std::map<char*, Block> blocks;  // by address
static std::mutex blocks_mutex;        // of `blocks` and `used_bytes`
static size_t used_bytes = 0;          // by blocks of the device

size_t limit_bytes() {
  static const char* gigabytes = getenv("NULLCUDA_GB");
  static size_t limit = gigabytes ? (size_t)(atof(gigabytes) * 1e9) : UNLIMITED_BYTES;
  return limit;
}

void* allocate(size_t bytes, Kind kind) {
  size_t whole = bytes ? (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES : PAGE_BYTES;
  if (kind == Kind::device) {
    std::lock_guard<std::mutex> guard(blocks_mutex);
    if (used_bytes + whole > limit_bytes()) return nullptr;
    used_bytes += whole;
  }
  // Pages that nobody writes take no RAM, so that 80 GB fit any machine.
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char* start = (char*)mmap(nullptr, whole, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  std::lock_guard<std::mutex> guard(blocks_mutex);
  blocks[start] = {whole, kind};
  return start;
}

static cudaError_t release(void* start) {
  if (!start) return cudaSuccess;
  std::lock_guard<std::mutex> guard(blocks_mutex);
  auto found = blocks.find((char*)start);
  if (found != blocks.end()) {
    if (found->second.kind == Kind::device) used_bytes -= found->second.bytes;
    munmap(start, found->second.bytes);
    blocks.erase(found);
  }
  return cudaSuccess;
}

// The kind of the block that an address lies in; memory that is not ours is pageable.
static Kind kind_of(const void* address) {
  std::lock_guard<std::mutex> guard(blocks_mutex);
  auto found = blocks.upper_bound((char*)address);
  if (found == blocks.begin()) return Kind::pageable;
  --found;
  return (char*)address < found->first + found->second.bytes ? found->second.kind : Kind::pageable;
}

// Zeros that cost no RAM: whole pages of a private mapping are given back and read as zeros again.
static void forget(void* start, size_t bytes) {
  uintptr_t begin = (uintptr_t)start, end = begin + bytes;
  uintptr_t first_page = (begin + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1), last_page = end & ~(PAGE_BYTES - 1);
  if (last_page > first_page && madvise((void*)first_page, last_page - first_page, MADV_DONTNEED) == 0) {
    memset(start, 0, first_page - begin);
    memset((void*)last_page, 0, end - last_page);
  } else {
    memset(start, 0, bytes);
  }
}

static cudaError_t fill(void* start, int value, size_t bytes) {
  if (value == 0 && bytes >= ZEROED_BY_PAGES && kind_of(start) == Kind::device)
    forget(start, bytes);
  else
    memset(start, value, bytes);
  return cudaSuccess;
}

}  // namespace nullcuda

using namespace nullcuda;

// ---- blocks ----

EXPORT cudaError_t cudaMalloc(void** start, size_t bytes) {
  counts.mallocs++;
  if (recording_here()) return refuse(cudaErrorStreamCaptureUnsupported, "cudaMalloc while capturing");
  *start = allocate(bytes, Kind::device);
  if (*start) return cudaSuccess;
  last_error = cudaErrorMemoryAllocation;
  return cudaErrorMemoryAllocation;
}
EXPORT cudaError_t cudaMallocAsync(void** start, size_t bytes, cudaStream_t) {
  *start = allocate(bytes, Kind::device);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMallocManaged(void** start, size_t bytes, unsigned) {
  *start = allocate(bytes, Kind::device);
  return cudaSuccess;
}
EXPORT cudaError_t cudaFree(void* start) {
  if (start && recording_here()) return refuse(cudaErrorStreamCaptureUnsupported, "cudaFree while capturing");
  return release(start);
}
EXPORT cudaError_t cudaFreeAsync(void* start, cudaStream_t) { return release(start); }
EXPORT cudaError_t cudaHostAlloc(void** start, size_t bytes, unsigned) {
  if (recording_here()) return refuse(cudaErrorStreamCaptureUnsupported, "cudaHostAlloc while capturing");
  *start = allocate(bytes, Kind::pinned);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMallocHost(void** start, size_t bytes) {
  *start = allocate(bytes, Kind::pinned);
  return cudaSuccess;
}
EXPORT cudaError_t cudaFreeHost(void* start) { return release(start); }
EXPORT cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
EXPORT cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
EXPORT cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  *total_bytes = limit_bytes() < UNLIMITED_BYTES ? limit_bytes() : H100_BYTES;
  *free_bytes = *total_bytes > used_bytes ? *total_bytes - used_bytes : 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  Kind kind = kind_of(address);
  attributes->type = kind == Kind::device   ? cudaMemoryTypeDevice
                     : kind == Kind::pinned ? cudaMemoryTypeHost
                                            : cudaMemoryTypeUnregistered;
  attributes->device = 0;
  attributes->devicePointer = (void*)address;
  attributes->hostPointer = kind == Kind::pinned ? (void*)address : nullptr;
  return cudaSuccess;
}

// ---- copies ----

EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  counts.syncs++;
  if (recording_here()) return refuse(cudaErrorStreamCaptureUnsupported, "cudaMemcpy while capturing");
  memmove(to, from, bytes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  Kind source = kind_of(from), target = kind_of(to);
  if (source == Kind::pageable && target == Kind::device) counts.pageable_copies++;
  if (source == Kind::device && target != Kind::device) counts.copies_to_host++;
  if (is_recorded(stream) && (source == Kind::pageable || target == Kind::pageable))
    return refuse(cudaErrorStreamCaptureUnsupported, "copy of pageable memory on a capturing stream");
  if (bytes >= NOT_COPIED && source == Kind::device && target == Kind::device)
    forget(to, bytes);
  else
    memmove(to, from, bytes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t) {
  memmove(to, from, bytes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                     size_t height, cudaMemcpyKind, cudaStream_t) {
  for (size_t y = 0; y < height; y++) memmove((char*)to + y * to_pitch, (char*)from + y * from_pitch, width);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
EXPORT cudaError_t cudaMemset(void* start, int value, size_t bytes) { return fill(start, value, bytes); }
EXPORT cudaError_t cudaMemsetAsync(void* start, int value, size_t bytes, cudaStream_t) {
  return fill(start, value, bytes);
}
