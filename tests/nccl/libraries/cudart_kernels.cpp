// libcudart: the registration of kernels, which nvcc's code calls before `main`, and their launch.
#include <cxxabi.h>
#include <dlfcn.h>
#include <string.h>

#include <unordered_map>

#include "capture.h"
#include "kernels.h"
#include "memory.h"

using namespace simulated;

namespace {

struct Kernel {
  const char* name = nullptr;  // mangled
  bool known = false;
  Bind bind = nullptr;
};
struct Variable {
  size_t size;
  void* address = nullptr;
};
struct Registry {
  std::mutex mutex;
  std::unordered_map<const void*, Kernel> kernels;  // by the address of their host function
  std::unordered_map<const void*, Variable> variables;
};
Registry& registry() {
  static Registry* made = new Registry;
  return *made;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

std::string demangled(const char* name) {
  int status;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string found = status == 0 ? text : name;
  free(text);
  return found;
}

// How a kernel is computed; nullptr: it is not. Looked up at its first launch.
Bind bind_of(const void* function) {
  static const bool verbose = atoi(setting("VERBOSE_KERNELS", "0"));
  std::lock_guard<std::mutex> lock(registry().mutex);
  Kernel& kernel = registry().kernels[function];
  if (!kernel.known && kernel.name) {
    std::string name = demangled(kernel.name);
    for (auto lookup : {elementwise_kernel, reduction_kernel, foreach_kernel, copy_kernel, other_kernel})
      if (!kernel.bind) kernel.bind = lookup(name);
    if (verbose) journal((kernel.bind ? "computed: " : "not computed: ") + name);
  }
  kernel.known = true;
  return kernel.bind;
}

cudaError_t launch(const void* function, dim3 grid, void** parameters, cudaStream_t handle) {
  CHECK_HEALTH();
  static const double takes = atof(setting("KERNEL_US", "5")) / 1e6;
  Stream& stream = stream_of(handle);
  Bind bind = bind_of(function);
  Work work = bind ? bind({grid, parameters}) : Work();
  launch_or_capture(stream, [&stream, work = std::move(work)] {
    stream.spend(takes);
    if (work) work();
  });
  return cudaSuccess;
}

}  // namespace

API void** __cudaRegisterFatBinary(void*) {
  static void* handle[1];
  return handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*,
                                dim3*, int*) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().kernels[function].name = name;
}
API void __cudaRegisterVar(void**, char* host, char*, const char*, int, size_t size, int, int) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().variables[host] = {size};
}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return cudaErrorInvalidValue;
  const Configuration& top = configurations.back();
  *grid = top.grid;
  *block = top.block;
  *shared = top.shared;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  configurations.pop_back();
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t) const_cast<void*>(function);
  return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3, void** parameters, size_t,
                                   cudaStream_t stream) {
  return launch(kernel, grid, parameters, stream);
}
API cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3, void** parameters, size_t,
                                 cudaStream_t stream) {
  return launch(function, grid, parameters, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** parameters) {
  return launch(function, config->gridDim, parameters, config->stream);
}
API cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3, void** parameters, size_t,
                                            cudaStream_t stream) {
  return launch(function, grid, parameters, stream);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = 48 << 10;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                                       unsigned) {
  *blocks = 2;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  auto found = registry().variables.find(symbol);
  if (found == registry().variables.end()) return result(cudaErrorInvalidSymbol);
  Variable& variable = found->second;
  if (!variable.address) allocate(&variable.address, variable.size, cudaMemoryTypeDevice, current_device());
  *pointer = variable.address;
  return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t size, size_t offset, cudaMemcpyKind) {
  void* pointer;
  cudaError_t error = cudaGetSymbolAddress(&pointer, symbol);
  return error == cudaSuccess ? copy((char*)pointer + offset, from, size, nullptr) : error;
}

// torch asks the runtime for the driver's functions by their names.
API cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* status) {
  *function = dlsym(RTLD_DEFAULT, (std::string(symbol) + "_v2").c_str());
  if (!*function) *function = dlsym(RTLD_DEFAULT, symbol);
  if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function ? cudaSuccess : result(cudaErrorSymbolNotFound);
}
