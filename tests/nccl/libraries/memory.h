// The memory of the devices and pinned memory of the host: both are memory of this process.
#pragma once
#include "device.h"

namespace simulated {

struct Block {
  size_t size, mapped;
  cudaMemoryType type;
  int device;
};

size_t total_memory();  // of each device
size_t used_memory(int device);
bool take(int device, size_t size);  // counts it as used; false: there is not as much
void give_back(int device, size_t size);

cudaError_t allocate(void** pointer, size_t size, cudaMemoryType type, int device);
cudaError_t release(void* pointer);
void add_block(void* pointer, const Block& block);  // that was mapped elsewhere
void remove_block(void* pointer);
bool find_block(const void* pointer, Block& block);  // false: the pointer is to pageable memory of the host

cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream);

}  // namespace simulated
