// libnccl: communicators are made, split, asked for errors, and released.
#include <string.h>

#include <random>

#include "communicator.h"
#include "group.h"

using namespace simulated;

namespace {

const char prefix[] = "simulated-";
thread_local std::string error_of_thread;

bool is_blocking(const ncclConfig_t* config, bool otherwise) {
  return !config || config->blocking == NCCL_CONFIG_UNDEF_INT ? otherwise : config->blocking != 0;
}

// Runs what makes a communicator: now, at the end of the group, or aside if the communicator does not block.
ncclResult_t make(ncclComm* comm, std::function<ncclResult_t()> work) {
  if (!comm->blocking) {
    comm->in_background(std::move(work));
    return ncclInProgress;
  }
  return in_group(std::move(work));
}

ncclResult_t init(ncclComm_t* made, int size, const ncclUniqueId& id, int rank, const ncclConfig_t* config) {
  if (strncmp(id.internal, prefix, strlen(prefix)) != 0 || size > RANKS) return ncclInvalidArgument;
  auto* comm = *made = new ncclComm(id.internal + strlen(prefix), rank, size, is_blocking(config, true));
  return make(comm, [comm] { return comm->attach() ? ncclSuccess : ncclSystemError; });
}

// The place of a rank in its part, and the size of that part: by color, then by key, then by the parent's ranks.
struct Part {
  int rank = 0, size = 0;
};
bool split(ncclComm* parent, uint64_t round, int color, int key, const ncclComm* made, Part& part) {
  Extra& extra = parent->extra();
  int rank = parent->rank;
  extra.color[rank] = color;
  extra.key[rank] = key;
  extra.split[rank] = 2 * round - 1;  // it has said its color
  auto all_at = [&](uint64_t at) {
    return parent->wait_for_peers([&] {
      return (made && made->aborting) ||
             parent->peers->everybody([&](int peer) { return extra.split[peer] >= at; });
    });
  };
  if (!all_at(2 * round - 1)) return false;
  for (int peer = 0; peer < parent->size; peer++) {
    if (extra.color[peer] != color) continue;
    part.size++;
    part.rank += extra.key[peer] < key || (extra.key[peer] == key && peer < rank);
  }
  extra.split[rank] = 2 * round;  // it has read the others'
  return all_at(2 * round) && !(made && made->aborting);
}

}  // namespace

API ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
API const char* ncclGetErrorString(ncclResult_t result) {
  static const char* texts[] = {"no error",
                                "unhandled cuda error",
                                "unhandled system error",
                                "internal error",
                                "invalid argument",
                                "invalid usage",
                                "remote process exited or there was a network error",
                                "NCCL operation in progress"};
  return (size_t)result < std::size(texts) ? texts[result] : "unknown result code";
}
API const char* ncclGetLastError(ncclComm_t) { return error_of_thread.c_str(); }
API ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  memset(id, 0, sizeof *id);
  std::random_device random;
  snprintf(id->internal, sizeof id->internal, "%s%d-%08x", prefix, getpid(), random());
  return ncclSuccess;
}
API ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank, ncclConfig_t* config) {
  return init(comm, size, id, rank, config);
}
API ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank) {
  return init(comm, size, id, rank, nullptr);
}
API ncclResult_t ncclCommInitRankScalable(ncclComm_t* comm, int size, int rank, int, ncclUniqueId* ids,
                                          ncclConfig_t* config) {
  return init(comm, size, ids[0], rank, config);
}
API ncclResult_t ncclCommSplit(ncclComm_t parent, int color, int key, ncclComm_t* made, ncclConfig_t* config) {
  *made = nullptr;
  if (!parent || !parent->usable()) return ncclInvalidUsage;
  uint64_t round = ++parent->splits;
  std::string name = parent->name + "." + std::to_string(round) + "." + std::to_string(color);
  ncclComm* comm =
      color == NCCL_SPLIT_NOCOLOR ? nullptr : new ncclComm(name, 0, 0, is_blocking(config, parent->blocking));
  auto work = [=]() -> ncclResult_t {
    Part part;
    if (!split(parent, round, color, key, comm, part)) return ncclSystemError;
    if (!comm) return ncclSuccess;
    comm->rank = part.rank;
    comm->size = part.size;
    return comm->attach() ? ncclSuccess : ncclSystemError;
  };
  *made = comm;
  return comm ? make(comm, work) : in_group(work);
}
API ncclResult_t ncclCommShrink(ncclComm_t parent, int* excluded, int count, ncclComm_t* made, ncclConfig_t* config,
                                int) {
  // The ranks that are left meet under a name that each of them can tell.
  *made = nullptr;
  if (!parent || !parent->peers) return ncclInvalidUsage;
  std::string name = parent->name + ".without";
  int rank = 0, size = 0;
  for (int peer = 0; peer < parent->size; peer++) {
    if (std::find(excluded, excluded + count, peer) != excluded + count) {
      name += "-" + std::to_string(peer);
      continue;
    }
    if (peer == parent->rank) rank = size;
    size++;
  }
  ncclComm* comm = *made = new ncclComm(name, rank, size, is_blocking(config, parent->blocking));
  return make(comm, [comm] { return comm->attach() ? ncclSuccess : ncclSystemError; });
}
API ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  *error = (ncclResult_t)comm->state.load();
  if (*error == ncclSuccess) *error = comm->remote_error();
  return ncclSuccess;
}
API ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  if (comm->over) return ncclInvalidUsage;
  auto work = [comm] {
    comm->finalize();
    return ncclSuccess;
  };
  if (comm->blocking) return work();
  comm->in_background(work);
  return ncclInProgress;
}
API ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  if (comm->over) return ncclInvalidArgument;
  comm->destroy();
  return ncclSuccess;
}
API ncclResult_t ncclCommAbort(ncclComm_t comm) {
  if (comm) comm->abort();
  return ncclSuccess;
}
API ncclResult_t ncclCommRevoke(ncclComm_t comm, int) {
  comm->revoked = true;
  return ncclSuccess;
}
API ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  *count = comm->size;
  return ncclSuccess;
}
API ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* device) {
  *device = comm->device;
  return ncclSuccess;
}
API ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  *rank = comm->rank;
  return ncclSuccess;
}

// -- memory: any will do --

API ncclResult_t ncclMemAlloc(void** pointer, size_t size) {
  return cudaMalloc(pointer, size) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}
API ncclResult_t ncclMemFree(void* pointer) {
  return cudaFree(pointer) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}
API ncclResult_t ncclCommRegister(const ncclComm_t, void* buffer, size_t, void** handle) {
  *handle = buffer;
  return ncclSuccess;
}
API ncclResult_t ncclCommDeregister(const ncclComm_t, void*) { return ncclSuccess; }
API ncclResult_t ncclCommWindowRegister(ncclComm_t, void* buffer, size_t, ncclWindow_t* window, int) {
  *window = reinterpret_cast<ncclWindow_t>(buffer);
  return ncclSuccess;
}
API ncclResult_t ncclCommWindowDeregister(ncclComm_t, ncclWindow_t) { return ncclSuccess; }
API ncclResult_t ncclCommMemStats(ncclComm_t, ncclCommMemStat_t, uint64_t* value) {
  *value = 0;
  return ncclSuccess;
}
