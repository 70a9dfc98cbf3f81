// libcudart: memory and copies.
#include <string.h>

#include "capture.h"
#include "memory.h"

using namespace simulated;

API cudaError_t cudaMalloc(void** pointer, size_t size) {
  CHECK_HEALTH();
  make_context(current_device());
  return result(allocate(pointer, size, cudaMemoryTypeDevice, current_device()));
}
API cudaError_t cudaFree(void* pointer) {
  CHECK_HEALTH();
  make_context(current_device());
  if (pointer == nullptr) return cudaSuccess;
  if (forbidden()) return result(cudaErrorStreamCaptureUnsupported);
  Block block;
  if (find_block(pointer, block)) synchronize(block.device);  // cudaFree waits for the device
  return result(release(pointer));
}
API cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t) { return cudaMalloc(pointer, size); }
API cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  CHECK_HEALTH();
  launch_or_capture(stream_of(stream), [pointer] { release(pointer); });
  return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  CHECK_HEALTH();
  return result(allocate(pointer, size, cudaMemoryTypeHost, current_device()));
}
API cudaError_t cudaMallocHost(void** pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }
API cudaError_t cudaFreeHost(void* pointer) { return pointer ? result(release(pointer)) : cudaSuccess; }
API cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  CHECK_HEALTH();
  add_block(pointer, {size, 0, cudaMemoryTypeHost, current_device()});
  return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* pointer) {
  remove_block(pointer);
  return cudaSuccess;
}
API cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  CHECK_HEALTH();
  *total = total_memory();
  *free = *total - used_memory(current_device());
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  Block block;
  if (!find_block(pointer, block)) {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = cudaInvalidDeviceId;
    return cudaSuccess;
  }
  attributes->type = block.type;
  attributes->device = block.device;
  attributes->devicePointer = const_cast<void*>(pointer);
  if (block.type == cudaMemoryTypeHost) attributes->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

// -- copies --

API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, size, stream);
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
  return copy(to, from, size, stream);
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  cudaError_t error = copy(to, from, size, nullptr);
  Stream& stream = stream_of(nullptr);
  stream.wait(stream.launched());
  return error;
}
API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                  size_t height, cudaMemcpyKind, cudaStream_t stream) {
  for (size_t row = 0; row < height; row++) {
    cudaError_t error = copy((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t stream) {
  CHECK_HEALTH();
  launch_or_capture(stream_of(stream), [=] { memset(pointer, value, size); });
  return cudaSuccess;
}
API cudaError_t cudaMemset(void* pointer, int value, size_t size) {
  return cudaMemsetAsync(pointer, value, size, nullptr);
}
