// libcuda: contexts as torch asks for them, and virtual memory (expandable segments).
#include <cuda.h>
#include <sys/mman.h>

#define API extern "C" __attribute__((visibility("default")))

// In libcudart, which some processes have not loaded.
extern "C" {
int simulated_devices() __attribute__((weak));
int simulated_has_context(int device) __attribute__((weak));
bool simulated_take(int device, size_t size) __attribute__((weak));
void simulated_give_back(int device, size_t size) __attribute__((weak));
void simulated_add_block(void* pointer, size_t size, int device) __attribute__((weak));
void simulated_remove_block(void* pointer) __attribute__((weak));
}

API CUresult cuInit(unsigned) { return simulated_devices ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
API CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetCount(int* count) {
  *count = simulated_devices ? simulated_devices() : 0;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED;
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  *flags = 0;
  *active = simulated_has_context && simulated_has_context(device);
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext* context) {
  static int only;
  *context = reinterpret_cast<CUcontext>(&only);
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxPushCurrent_v2(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxPopCurrent_v2(CUcontext* context) { return context ? cuCtxGetCurrent(context) : CUDA_SUCCESS; }
API CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "an error of the simulated driver";
  return CUDA_SUCCESS;
}
API CUresult cuLogsRegisterCallback(CUlogsCallback, void*, CUlogsCallbackHandle* handle) {
  if (handle) *handle = nullptr;
  return CUDA_SUCCESS;
}
API CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle) { return CUDA_SUCCESS; }

// -- virtual memory: addresses are reserved without access; mapping a handle gives access to its part --

namespace {
struct Handle {
  size_t size;
  int device;
};
bool protect(CUdeviceptr at, size_t size, int access) { return mprotect((void*)at, size, access) == 0; }
}  // namespace

API CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp*,
                                           CUmemAllocationGranularity_flags) {
  *granularity = 2 << 20;
  return CUDA_SUCCESS;
}
API CUresult cuMemAddressReserve(CUdeviceptr* at, size_t size, size_t, CUdeviceptr, unsigned long long) {
  void* made = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  *at = (CUdeviceptr)made;
  return CUDA_SUCCESS;
}
API CUresult cuMemAddressFree(CUdeviceptr at, size_t size) {
  munmap((void*)at, size);
  return CUDA_SUCCESS;
}
API CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp* properties,
                         unsigned long long) {
  int device = properties->location.id;
  if (!simulated_take(device, size)) return CUDA_ERROR_OUT_OF_MEMORY;
  *handle = (CUmemGenericAllocationHandle) new Handle{size, device};
  return CUDA_SUCCESS;
}
API CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  auto* gone = (Handle*)handle;
  simulated_give_back(gone->device, gone->size);
  delete gone;
  return CUDA_SUCCESS;
}
API CUresult cuMemMap(CUdeviceptr at, size_t size, size_t, CUmemGenericAllocationHandle handle, unsigned long long) {
  simulated_add_block((void*)at, size, ((Handle*)handle)->device);
  return protect(at, size, PROT_READ | PROT_WRITE) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
API CUresult cuMemUnmap(CUdeviceptr at, size_t size) {
  simulated_remove_block((void*)at);
  madvise((void*)at, size, MADV_DONTNEED);
  return protect(at, size, PROT_NONE) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
API CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }
