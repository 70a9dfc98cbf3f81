// libnvidia-ml: torch's allocator asks it for the fabric before it maps an expandable segment. There is none.
#define API extern "C" __attribute__((visibility("default")))

namespace {
constexpr int SUCCESS = 0, NOT_SUPPORTED = 3;
}

API int nvmlInit_v2() { return SUCCESS; }
API int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = 13000;
  return SUCCESS;
}
API int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** device) {
  static int any;
  *device = &any;
  return SUCCESS;
}
API int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* count, void*) {
  *count = 0;
  return SUCCESS;
}
API int nvmlDeviceGetNvLinkRemoteDeviceType(void*, unsigned, int*) { return NOT_SUPPORTED; }
API int nvmlDeviceGetNvLinkRemotePciInfo_v2(void*, unsigned, void*) { return NOT_SUPPORTED; }
API int nvmlDeviceGetGpuFabricInfoV(void*, void*) { return SUCCESS; }  // all zero: the state "not supported"
