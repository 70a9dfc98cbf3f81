// What ncclComm_t points to. A collective is one piece of work of a stream, NCCL's "kernel": it waits there for the other
// ranks of the communicator, polling their memory, and ends early when the communicator is aborted.
#pragma once
#define __CUDA_FP16_H__  // the wheels lack some headers that these include
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "../../simulated_accelerator/peers.h"

#define API extern "C" __attribute__((visibility("default")))

namespace simulated {

// A message between two ranks, piece by piece, and what a split has to know of every rank.
struct Pair {
  std::atomic<uint64_t> sent, received;
  char slot[SLOT];
};
struct Extra {
  Pair pairs[RANKS][RANKS];  // from, to
  std::atomic<int> color[RANKS], key[RANKS];
  std::atomic<uint64_t> split[RANKS];
};

}  // namespace simulated

struct ncclComm {
  using Test = simulated::Peers::Test;

  // A communicator is made at once; it can be used when `attach` has returned.
  ncclComm(std::string name, int rank, int size, bool blocking);
  bool attach();
  void in_background(std::function<ncclResult_t()> work);  // what a communicator that does not block does

  std::string name;
  int rank, size, device;
  const bool blocking;
  std::unique_ptr<simulated::Peers> peers;
  std::atomic<int> state{ncclSuccess};  // ncclCommGetAsyncError
  std::atomic<bool> aborting{false}, revoked{false}, over{false};
  uint64_t splits = 0;

  bool usable() const { return peers && !over && !aborting && !revoked; }
  simulated::Extra& extra() const { return *static_cast<simulated::Extra*>(peers->extra()); }
  std::string who() const { return name + " rank " + std::to_string(rank); }

  // -- on a stream --
  void run(const std::function<bool()>& kernel, const char* kind);
  bool polls();  // false: the kernel has to end
  bool exchange(const void* part, size_t length, char* rows);

  // -- on the host --
  std::atomic<uint64_t> launched{0}, ended{0};
  void abort();
  void finalize();
  void destroy();
  ncclResult_t remote_error() const;
  bool wait_for_peers(const Test& test) const;  // false: aborted

 private:
  void await_kernels(bool unless_aborted) const;
  std::thread background_;
  std::mutex held_;
};
