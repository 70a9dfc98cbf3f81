// The device: streams that run what was launched on them in order, each on a thread of its own, and events between them.
// An error of the device stays for the life of the process, as CUDA's "sticky" errors do.
#pragma once
#include <cuda_runtime_api.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../../simulated_accelerator/journal.h"

#define API extern "C" __attribute__((visibility("default")))

namespace simulated {

constexpr int DEVICES = 16;  // at most

int devices();
int& current_device();  // of this thread
bool has_context(int device);
void make_context(int device);

// The sticky error, or that of a process that was forked after CUDA had been initialised; else cudaSuccess.
cudaError_t health();
bool faulted();
void fault(cudaError_t error, const std::string& why);

// Keeps an error for cudaGetLastError, and returns it.
cudaError_t result(cudaError_t error);
cudaError_t last_error(bool forget);

using Work = std::function<void()>;
struct Capture;

class Stream {
 public:
  Stream(int device, unsigned flags, int priority) : device(device), flags(flags), priority(priority) {}

  const int device;
  const unsigned flags;
  const int priority;
  std::shared_ptr<Capture> capture;  // that this stream takes part in; guarded in capture.cpp

  uint64_t launch(Work work);  // blocks the host while the launch queue is full
  uint64_t launched();
  bool idle();
  void wait(uint64_t until);  // the host, for the first `until` launches
  void spend(double seconds);  // on this stream's own thread: what a kernel takes
  void wake();

 private:
  void run();
  std::mutex mutex_;
  std::condition_variable work_, progress_;
  std::deque<Work> queue_;
  uint64_t launched_ = 0, done_ = 0;
  bool started_ = false;
  double debt_ = 0;
};

Stream& make_stream(int device, unsigned flags, int priority);
Stream& stream_of(cudaStream_t handle);  // the null stream is the current device's
void synchronize(int device);            // the host, for all streams of that device

// What cudaEvent_t points to outlives the handle, as long as a stream will record it or waits for it.
struct Event {
  std::mutex mutex;
  std::condition_variable progress;
  uint64_t recorded = 0, completed = 0;
  double time = 0;
  std::shared_ptr<Capture> capture;  // in which it was recorded last

  bool complete();
  void wait(uint64_t version);
  void record();  // on a stream's thread
};

}  // namespace simulated

// Every call that can report a sticky error begins with this.
#define CHECK_HEALTH()                                                  \
  do {                                                                  \
    cudaError_t unhealthy = simulated::health();                        \
    if (unhealthy != cudaSuccess) return simulated::result(unhealthy);  \
  } while (0)
