// What the files of the null CUDA runtime's runtime half share; libnullrt.so, preloaded before libcudart.
//
//   memory.cpp     device memory is RAM that costs nothing until it is written; NULLCUDA_GB limits it, so that torch's
//                  own allocator runs out as on a card of that size. Copies are made
//   streams.cpp    streams, events and graphs: what CUDA refuses while a graph is recorded is refused and told
//   device.cpp     one "H100": its properties, errors, the driver's functions by name
//   launches.cpp   kernels do nothing, their launch configurations are checked; cuBLAS; the counts
//
// It cannot show values, cuDNN (switched off by site/), or times.
#pragma once
#include <cuda_runtime_api.h>
#include <atomic>
#include <cstddef>
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace nullcuda {

// What happened so far, of all threads; nullcuda_counts hands it out.
struct Counts {
  std::atomic<long> syncs{0};
  std::atomic<long> launches{0};
  std::atomic<long> pageable_copies{0};  // from the host's memory that is not pinned: such a copy waits
  std::atomic<long> mallocs{0};
  std::atomic<long> copies_to_host{0};
  std::atomic<long> graphs{0};  // launched
  std::atomic<long> illegal{0};
};
extern Counts counts;

// The error that cudaGetLastError tells and forgets.
extern cudaError_t last_error;

// Notes, counts and prints a call that CUDA refuses; returns the error, for the caller to return.
cudaError_t refuse(cudaError_t error, const char* what);

// Whether this thread records a graph and may not do what waits or allocates.
bool recording_here();

// Whether a graph is being recorded on this stream.
bool is_recorded(cudaStream_t stream);

enum class Kind { pageable, device, pinned };

// Bytes of memory on the "card": NULLCUDA_GB, else without an end.
size_t limit_bytes();

// A block of zeros; null where the "card" has no room for it.
void* allocate(size_t bytes, Kind kind);

}  // namespace nullcuda
