#include "group.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace simulated {
namespace {

thread_local int depth = 0;
thread_local std::vector<std::function<ncclResult_t()>> host_work;
thread_local std::vector<Operation> operations;

struct Kernel {
  ncclComm* comm;
  std::vector<Operation> operations;
  bool captured;  // part of a graph, which runs it again and again

  // Collectives one after the other, then all sends and receives at once.
  bool run() const {
    std::vector<const Operation*> pending;
    for (const Operation& operation : operations)
      if (operation.step)
        pending.push_back(&operation);
      else if (!operation.collective())
        return false;
    double since = now();
    while (true) {
      auto over = [](const Operation* each) { return each->step(); };
      pending.erase(std::remove_if(pending.begin(), pending.end(), over), pending.end());
      if (pending.empty()) return true;
      if (!comm->polls()) return false;
      nap(since);
    }
  }
};

void run_kernel(void* data) {
  auto* kernel = static_cast<Kernel*>(data);
  if (kernel->captured) kernel->comm->launched++;
  kernel->comm->run([kernel] { return kernel->run(); }, kernel->operations[0].kind);
  if (!kernel->captured) delete kernel;
}

ncclResult_t launch(std::vector<Operation> together) {
  ncclComm* comm = together[0].comm;
  cudaStream_t stream = together[0].stream;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &status);
  bool captured = status == cudaStreamCaptureStatusActive;
  if (!captured) comm->launched++;
  if (cudaLaunchHostFunc(stream, run_kernel, new Kernel{comm, std::move(together), captured}) == cudaSuccess)
    return ncclSuccess;
  if (!captured) comm->ended++;
  return ncclUnhandledCudaError;
}

ncclResult_t flush() {
  ncclResult_t result = ncclSuccess;
  auto keep = [&result](ncclResult_t each) {
    if (each != ncclSuccess) result = each;
  };
  for (auto& work : std::exchange(host_work, {})) keep(work());
  std::vector<Operation> all = std::exchange(operations, {});
  while (!all.empty()) {
    auto with_first = [&first = all[0], comm = all[0].comm, stream = all[0].stream](const Operation& each) {
      return each.comm == comm && each.stream == stream;
    };
    auto rest = std::stable_partition(all.begin(), all.end(), with_first);
    std::vector<Operation> others(std::make_move_iterator(rest), std::make_move_iterator(all.end()));
    all.erase(rest, all.end());
    keep(launch(std::move(all)));
    all = std::move(others);
  }
  return result;
}

}  // namespace

ncclResult_t in_group(std::function<ncclResult_t()> work) {
  host_work.push_back(std::move(work));
  return depth ? ncclSuccess : flush();
}

ncclResult_t in_group(Operation operation) {
  if (!operation.comm || !operation.comm->usable()) return ncclInvalidUsage;
  operations.push_back(std::move(operation));
  return depth ? ncclSuccess : flush();
}

}  // namespace simulated

API ncclResult_t ncclGroupStart() {
  simulated::depth++;
  return ncclSuccess;
}
API ncclResult_t ncclGroupEnd() { return --simulated::depth ? ncclSuccess : simulated::flush(); }
