// The shared memory through which the ranks of a communicator see each other, and which their kernels poll.
// It depends on neither torch nor CUDA: both simulated worlds of the tests use it.
#pragma once
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "journal.h"

namespace simulated {

constexpr int RANKS = 16;
constexpr size_t SLOT = 1 << 18;

enum State { ABSENT, THERE, ABORTED, LEAVING, FREED };

struct Shared {
  std::atomic<int> state[RANKS], pid[RANKS], running[RANKS];
  std::atomic<uint64_t> arrived[RANKS], left[RANKS];
  char slot[RANKS][SLOT];
};

class Peers {
 public:
  using Test = std::function<bool()>;

  const int rank, size;

  // Returns when every rank has mapped the file at `path`. `extra` bytes follow `Shared` there.
  Peers(
      const std::string& path, int rank, int size, size_t extra = 0, const Test& give_up = [] { return false; })
      : rank(rank), size(size) {
    if (size > RANKS) throw std::runtime_error("at most " + std::to_string(RANKS) + " ranks");
    int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    bool large = file >= 0 && ftruncate(file, sizeof(Shared) + extra) == 0;
    void* mapped = large ? mmap(nullptr, sizeof(Shared) + extra, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)
                         : MAP_FAILED;
    close(file);
    if (mapped == MAP_FAILED) throw std::runtime_error("no shared memory at " + path);
    shared = static_cast<Shared*>(mapped);
    shared->pid[rank] = getpid();
    shared->state[rank] = THERE;
    double since = now();
    while (!everybody([this](int peer) { return shared->state[peer] != ABSENT; })) {
      if (give_up()) {
        unlink(path.c_str());
        throw std::runtime_error("aborted while it waited for its peers");
      }
      nap(since);
    }
    if (rank == 0) unlink(path.c_str());
    for (int peer = 0; peer < size; peer++)
      processes_.push_back((int)syscall(SYS_pidfd_open, shared->pid[peer].load(), 0));
  }

  std::atomic<int>& state() { return shared->state[rank]; }
  std::atomic<int>& running() { return shared->running[rank]; }  // whether a kernel of this rank polls
  int state_of(int peer) const { return shared->state[peer]; }
  bool running_at(int peer) const { return shared->running[peer]; }
  void* extra() const { return shared + 1; }

  template <class Check>
  bool everybody(Check check) const {
    for (int peer = 0; peer < size; peer++)
      if (!check(peer)) return false;
    return true;
  }

  bool exited(int peer) const {
    pollfd process{processes_[peer], POLLIN, 0};
    return processes_[peer] < 0 || poll(&process, 1, 0) > 0;
  }

  // The first peer whose memory has gone away, and how: "peer 1 aborted". Empty if all memory is there.
  std::string missing() const {
    for (int peer = 0; peer < size; peer++) {
      if (peer == rank) continue;
      int state = state_of(peer);
      const char* how = state == ABORTED ? "aborted"
                        : state == FREED ? "destroyed"
                        : exited(peer)   ? "exited"
                                         : nullptr;
      if (how) return "peer " + std::to_string(peer) + " " + how;
    }
    return "";
  }

  // Collects every rank's `length` bytes in `rows`, one row a rank, through the slots.
  // False: `polls` has said that the kernel has to end.
  bool exchange(const char* part, size_t length, char* rows, const Test& polls) {
    size_t at = 0;
    do {
      size_t piece = std::min(SLOT, length - at);
      uint64_t round = ++rounds_;
      if (!wait(polls, [&](int peer) { return shared->left[peer] >= round - 1; })) return false;
      if (piece) memcpy(shared->slot[rank], part + at, piece);
      shared->arrived[rank] = round;
      if (!wait(polls, [&](int peer) { return shared->arrived[peer] >= round; })) return false;
      for (int peer = 0; peer < size; peer++)
        if (piece) memcpy(rows + peer * length + at, shared->slot[peer], piece);
      shared->left[rank] = round;
      at += piece;
    } while (at < length);
    return true;
  }

 private:
  template <class Check>
  bool wait(const Test& polls, Check check) const {
    double since = now();
    while (!everybody(check)) {
      if (!polls()) return false;
      nap(since);
    }
    return polls();
  }

  Shared* shared;
  std::vector<int> processes_;  // pidfds
  std::atomic<uint64_t> rounds_{0};
};

}  // namespace simulated
