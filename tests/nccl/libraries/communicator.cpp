#include "communicator.h"

extern "C" {  // of libcudart
int simulated_faulted();
void simulated_fault(int error, const char* why);
}

using namespace simulated;

namespace {
const bool nvlink = std::string(setting("LINK", "nvlink")) == "nvlink";
const bool remote_errors = atoi(setting("REMOTE_ERRORS", "0"));
const bool verbose = atoi(setting("VERBOSE", "0"));
const double abort_takes = atof(setting("ABORT_MS", "20")) / 1e3;  // from the end of its kernels until it frees memory
const double tail = atof(setting("TAIL_MS", "0")) / 1e3;           // of each kernel, after the others' have ended

int device_of_thread() {
  int found = 0;
  cudaGetDevice(&found);
  return found;
}
}  // namespace

ncclComm::ncclComm(std::string name, int rank, int size, bool blocking)
    : name(std::move(name)), rank(rank), size(size), device(device_of_thread()), blocking(blocking) {}

bool ncclComm::attach() {
  try {
    peers = std::make_unique<Peers>("/dev/shm/simulated-nccl-" + name, rank, size, sizeof(Extra),
                                    [this] { return aborting.load(); });
  } catch (const std::exception& error) {
    journal(who() + " is not there: " + error.what());
    return false;
  }
  journal(who() + " of " + std::to_string(size) + " is there");
  return true;
}

void ncclComm::in_background(std::function<ncclResult_t()> work) {
  if (background_.joinable()) background_.join();
  state = ncclInProgress;
  background_ = std::thread([this, work] { state = work(); });
}

// -- on a stream --

bool ncclComm::polls() {
  if (aborting || revoked || simulated_faulted()) return false;
  if (!nvlink) return true;
  std::string missing = peers->missing();
  if (missing.empty()) return true;
  if (!aborting)
    simulated_fault(cudaErrorContained, (who() + ": " + missing + " under a running kernel").c_str());
  return false;
}

bool ncclComm::exchange(const void* part, size_t length, char* rows) {
  return peers->exchange(static_cast<const char*>(part), length, rows, [this] { return polls(); });
}

void ncclComm::run(const std::function<bool()>& kernel, const char* kind) {
  peers->running() = 1;
  if (verbose) journal(who() + " kernel " + kind + " starts");
  bool whole = !aborting && kernel();
  for (double end = now() + tail; whole && now() < end && polls();) nap(end);
  if (!whole && !simulated_faulted()) journal(who() + " kernel " + kind + " ends as garbage");
  peers->running() = 0;
  ended++;
}

// -- on the host --

// ncclCommAbort, as NVIDIA/nccl src/init.cc has it: set the flag that kernels look at, wait for them, free the memory.
// It waits for no peer.
void ncclComm::abort() {
  bool idle = launched == ended;  // before the flag: it ends the kernels
  aborting = true;
  std::lock_guard<std::mutex> lock(held_);
  if (over) return;
  journal(who() + (idle ? " abort begins, idle" : " abort begins"));
  if (background_.joinable()) background_.join();
  await_kernels(false);
  usleep((useconds_t)(abort_takes * 1e6));
  std::string under;
  for (int peer = 0; peers && peer < size; peer++)
    if (peer != rank && peers->running_at(peer)) under += " " + std::to_string(peer);
  if (peers) peers->state() = ABORTED;
  over = true;
  journal(who() + " abort ends" + (under.empty() ? "" : "; kernels run at" + under));
}

// ncclCommFinalize, as above: wait for the own kernels, then for all ranks of the node (bootstrapIntraNodeBarrier, which
// ends with an error when a peer has closed its socket).
void ncclComm::finalize() {
  if (peers->state() != THERE) return;
  journal(who() + (launched > ended ? " destroy begins, in flight" : " destroy begins"));
  await_kernels(true);
  if (aborting) return;
  peers->state() = LEAVING;
  wait_for_peers([this] {
    return peers->everybody([this](int peer) { return peers->state_of(peer) > THERE || peers->exited(peer); });
  });
}

void ncclComm::destroy() {
  std::lock_guard<std::mutex> lock(held_);
  if (over) return;
  if (background_.joinable()) background_.join();
  finalize();
  peers->state() = FREED;
  over = true;
  journal(who() + " destroy ends");
}

void ncclComm::await_kernels(bool unless_aborted) const {
  double since = now();
  while (ended < launched && !simulated_faulted() && !(unless_aborted && aborting)) nap(since);
}

bool ncclComm::wait_for_peers(const Test& test) const {
  double since = now();
  while (!test()) {
    if (aborting) return false;
    nap(since);
  }
  return true;
}

ncclResult_t ncclComm::remote_error() const {
  if (!remote_errors || !peers || over || peers->state() != THERE) return ncclSuccess;
  for (int peer = 0; peer < size; peer++) {
    int state = peers->state_of(peer);
    if (peer != rank && (state == ABORTED || (state == THERE && peers->exited(peer)))) return ncclRemoteError;
  }
  return ncclSuccess;
}
