#include "memory.h"

#include <string.h>
#include <sys/mman.h>

#include <map>

#include "capture.h"

namespace simulated {
namespace {

struct Memory {
  std::mutex mutex;
  std::map<uintptr_t, Block> blocks;  // by their first address
  size_t used[DEVICES] = {};
  const size_t total = (size_t)atoi(setting("MEMORY_MB", "4096")) << 20;
};

Memory& memory() {
  static Memory* made = new Memory;
  return *made;
}

bool take_locked(int device, size_t size) {
  if (memory().used[device] + size > memory().total) return false;
  memory().used[device] += size;
  return true;
}

}  // namespace

size_t total_memory() { return memory().total; }

size_t used_memory(int device) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  return memory().used[device];
}

bool take(int device, size_t size) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  return take_locked(device, size);
}

void give_back(int device, size_t size) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  memory().used[device] -= size;
}

cudaError_t allocate(void** pointer, size_t size, cudaMemoryType type, int device) {
  *pointer = nullptr;
  if (size == 0) return cudaSuccess;
  size_t mapped = (size + 4095) & ~(size_t)4095;
  std::lock_guard<std::mutex> lock(memory().mutex);
  if (type == cudaMemoryTypeDevice && !take_locked(device, mapped)) return cudaErrorMemoryAllocation;
  void* made = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) return cudaErrorMemoryAllocation;
  memory().blocks[(uintptr_t)made] = {size, mapped, type, device};
  *pointer = made;
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  auto found = memory().blocks.find((uintptr_t)pointer);
  if (found == memory().blocks.end()) return cudaErrorInvalidValue;
  const Block& block = found->second;
  if (block.type == cudaMemoryTypeDevice) memory().used[block.device] -= block.mapped;
  munmap(pointer, block.mapped);
  memory().blocks.erase(found);
  return cudaSuccess;
}

void add_block(void* pointer, const Block& block) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  memory().blocks[(uintptr_t)pointer] = block;
}

void remove_block(void* pointer) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  memory().blocks.erase((uintptr_t)pointer);
}

bool find_block(const void* pointer, Block& block) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  auto after = memory().blocks.upper_bound((uintptr_t)pointer);
  if (after == memory().blocks.begin()) return false;
  --after;
  if ((uintptr_t)pointer >= after->first + after->second.size) return false;
  block = after->second;
  return true;
}

// From pageable memory, the driver takes a copy of its own before the call returns; to pageable memory, the call returns
// when the data is there (CUDA Runtime API, "API synchronization behavior").
cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t on) {
  CHECK_HEALTH();
  if (size == 0) return cudaSuccess;
  Stream& stream = stream_of(on);
  Block block;
  bool staged = !find_block(from, block), awaited = !find_block(to, block);
  if ((staged || awaited) && capturing(stream)) return result(cudaErrorStreamCaptureUnsupported);
  uint64_t at;
  if (staged) {
    auto stage = std::make_shared<std::vector<char>>((const char*)from, (const char*)from + size);
    at = stream.launch([=] { memcpy(to, stage->data(), size); });
  } else {
    at = launch_or_capture(stream, [=] { memmove(to, from, size); });
  }
  if (awaited) stream.wait(at);
  return result(health());
}

}  // namespace simulated

// -- for the library that stands for the driver --

API bool simulated_take(int device, size_t size) { return simulated::take(device, size); }
API void simulated_give_back(int device, size_t size) { simulated::give_back(device, size); }
API void simulated_add_block(void* pointer, size_t size, int device) {
  simulated::add_block(pointer, {size, size, cudaMemoryTypeDevice, device});
}
API void simulated_remove_block(void* pointer) { simulated::remove_block(pointer); }
