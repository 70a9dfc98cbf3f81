// libcudart: devices, errors, streams and events.
#include <string.h>

#include "capture.h"
#include "memory.h"

using namespace simulated;

// -- devices --

API cudaError_t cudaGetDeviceCount(int* count) {
  *count = devices();
  return *count ? cudaSuccess : result(cudaErrorNoDevice);
}
API cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return result(cudaErrorInvalidDevice);
  current_device() = device;
  make_context(device);
  return result(health());
}
API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= devices()) return result(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrClockRate: *value = 1000000; break;  // kHz: a cycle is a nanosecond
    default: *value = 0;
  }
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= devices()) return result(cudaErrorInvalidDevice);
  auto attribute = [device](cudaDeviceAttr which) {
    int value;
    cudaDeviceGetAttribute(&value, which, device);
    return value;
  };
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "Simulated H100");
  properties->uuid.bytes[0] = (char)(device + 1);
  properties->pciBusID = 16 + device;
  properties->totalGlobalMem = total_memory();
  properties->major = attribute(cudaDevAttrComputeCapabilityMajor);
  properties->warpSize = attribute(cudaDevAttrWarpSize);
  properties->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  properties->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  properties->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  properties->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  properties->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  properties->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  properties->regsPerBlock = properties->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
  properties->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  properties->maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX);
  properties->maxGridSize[1] = properties->maxGridSize[2] = attribute(cudaDevAttrMaxGridDimY);
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->textureAlignment = 512;
  properties->canMapHostMemory = properties->concurrentKernels = properties->unifiedAddressing = 1;
  properties->asyncEngineCount = properties->streamPrioritiesSupported = 1;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int device) {
  snprintf(id, size, "0000:%02x:00.0", 16 + device);
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = device != peer;
  return cudaSuccess;
}
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() {
  CHECK_HEALTH();
  if (forbidden()) return result(cudaErrorStreamCaptureUnsupported);
  make_context(current_device());
  synchronize(current_device());
  return result(health());
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// -- errors --

API cudaError_t cudaGetLastError() { return last_error(true); }
API cudaError_t cudaPeekAtLastError() { return last_error(false); }

namespace {
struct Text {
  cudaError_t error;
  const char *name, *text;
};
const Text texts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorAssert, "cudaErrorAssert", "device-side assert triggered"},
    {cudaErrorContained, "cudaErrorContained",
     "Invalid access of peer GPU memory over nvlink or a hardware error"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
};
const Text& text_of(cudaError_t error) {
  static const Text unknown{cudaErrorUnknown, "cudaErrorUnknown", "unknown error"};
  for (const Text& each : texts)
    if (each.error == error) return each;
  return unknown;
}
}  // namespace

API const char* cudaGetErrorString(cudaError_t error) { return text_of(error).text; }
API const char* cudaGetErrorName(cudaError_t error) { return text_of(error).name; }

// -- streams --

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  CHECK_HEALTH();
  make_context(current_device());
  *stream = reinterpret_cast<cudaStream_t>(&make_stream(current_device(), flags, priority));
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream).priority;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  *flags = stream_of(stream).flags;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device) {
  *device = stream_of(stream).device;
  return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  CHECK_HEALTH();
  if (capturing(stream_of(stream)) || forbidden()) return result(cudaErrorStreamCaptureUnsupported);
  return stream_of(stream).idle() ? cudaSuccess : cudaErrorNotReady;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  CHECK_HEALTH();
  Stream& stream = stream_of(handle);
  if (capturing(stream) || forbidden()) return result(cudaErrorStreamCaptureUnsupported);
  stream.wait(stream.launched());
  return result(health());
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  CHECK_HEALTH();
  launch_or_capture(stream_of(stream), [=] { function(data); });
  return cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  CHECK_HEALTH();
  launch_or_capture(stream_of(stream), [=] { function(stream, health(), data); });
  return cudaSuccess;
}

// -- events: a handle is a pointer to a shared one --

namespace {
using EventPtr = std::shared_ptr<Event>;
const EventPtr& event_of(cudaEvent_t handle) { return *reinterpret_cast<EventPtr*>(handle); }
}  // namespace

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  CHECK_HEALTH();
  make_context(current_device());
  *event = reinterpret_cast<cudaEvent_t>(new EventPtr(std::make_shared<Event>()));
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<EventPtr*>(event);
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned) {
  CHECK_HEALTH();
  return record(event_of(handle), stream_of(stream));
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
  CHECK_HEALTH();
  return wait_on_device(stream_of(stream), event_of(handle));
}
API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  CHECK_HEALTH();
  if (forbidden()) return result(cudaErrorStreamCaptureUnsupported);
  return event_of(handle)->complete() ? cudaSuccess : cudaErrorNotReady;
}
API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  CHECK_HEALTH();
  if (forbidden()) return result(cudaErrorStreamCaptureUnsupported);
  EventPtr event = event_of(handle);
  event->wait(event->recorded);
  return result(health());
}
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  if (!event_of(from)->complete() || !event_of(to)->complete()) return cudaErrorNotReady;
  *milliseconds = (float)((event_of(to)->time - event_of(from)->time) * 1e3);
  return cudaSuccess;
}
