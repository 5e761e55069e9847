// Streams, events and graphs of the null CUDA runtime. Nothing runs, so all that a stream knows is whether a graph is
// being recorded on it ("captured"); an event carries that to the streams that wait for it, as in CUDA.
#include "runtime.h"
#include <cstdlib>
#include <set>

namespace nullcuda {

struct Stream {
  bool recorded = false;
  unsigned long long recording = 0;  // which one, counted from 1
};
struct Event {
  bool recorded = false;  // on a stream that was being recorded
  unsigned long long recording = 0;
};

static Stream default_stream;
static std::set<Stream*> recorded_streams;
static unsigned long long recordings = 0;  // begun so far
static thread_local unsigned long long recording_by_thread = 0;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

// Null, 1 and 2 are CUDA's names for the default stream.
static Stream* stream_of(cudaStream_t stream) {
  return (size_t)stream <= 2 ? &default_stream : (Stream*)stream;
}
static Event* event_of(cudaEvent_t event) { return (Event*)event; }

bool recording_here() { return recording_by_thread && thread_mode != cudaStreamCaptureModeRelaxed; }
bool is_recorded(cudaStream_t stream) { return stream_of(stream)->recorded; }

static void record(Stream* stream, unsigned long long recording) {
  stream->recorded = true;
  stream->recording = recording;
  recorded_streams.insert(stream);
}
static cudaStreamCaptureStatus status_of(cudaStream_t stream) {
  return is_recorded(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}

}  // namespace nullcuda

using namespace nullcuda;

// ---- streams ----

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = (cudaStream_t) new Stream;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (is_recorded(stream)) return refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery while capturing");
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  counts.syncs++;
  if (is_recorded(stream)) return refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize while capturing");
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() {
  counts.syncs++;
  if (recording_here()) return refuse(cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize while capturing");
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  if (!event_of(event)->recorded) return cudaSuccess;
  Stream* stream = stream_of(handle);
  if (stream == &default_stream)
    return refuse(cudaErrorStreamCaptureImplicit, "the legacy stream waits for a captured event");
  if (!stream->recorded) record(stream, event_of(event)->recording);
  return cudaSuccess;
}

// ---- events ----

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = (cudaEvent_t) new Event;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event_of(event);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event_of(event)->recorded = stream_of(stream)->recorded;
  event_of(event)->recording = stream_of(stream)->recording;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (event_of(event)->recorded) return refuse(cudaErrorCapturedEvent, "cudaEventQuery of a captured event");
  if (recording_here()) return refuse(cudaErrorStreamCaptureUnsupported, "cudaEventQuery while this thread captures");
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  counts.syncs++;
  if (event_of(event)->recorded) return refuse(cudaErrorCapturedEvent, "cudaEventSynchronize of a captured event");
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  *ms = 1.0f;
  return cudaSuccess;
}

// ---- recording a graph ----

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Stream* stream = stream_of(handle);
  if (stream == &default_stream) return refuse(cudaErrorStreamCaptureUnsupported, "capture of the legacy stream");
  record(stream, ++recordings);
  recording_by_thread = stream->recording;
  thread_mode = mode;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t, const cudaGraphNode_t*,
                                                 const cudaGraphEdgeData*, size_t, cudaStreamCaptureMode mode) {
  return cudaStreamBeginCapture(stream, mode);
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  for (Stream* stream : recorded_streams) *stream = Stream{};
  recorded_streams.clear();
  recording_by_thread = 0;
  *graph = (cudaGraph_t)malloc(8);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = status_of(stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                            unsigned long long* id, cudaGraph_t* graph,
                                            const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                                            size_t* count) {
  *status = status_of(stream);
  if (id) *id = stream_of(stream)->recording;
  if (graph) *graph = nullptr;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  cudaStreamCaptureMode before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return cudaSuccess;
}

// ---- graphs ----

EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t* ready, cudaGraph_t, unsigned long long) {
  *ready = (cudaGraphExec_t)malloc(8);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* ready, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(ready, graph, flags);
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  counts.graphs++;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) {
  *count = 1;
  return cudaSuccess;
}
