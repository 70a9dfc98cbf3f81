#include "device.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <thread>

namespace simulated {
namespace {

// Never destroyed: the streams' threads outlive `main`.
struct Process {
  std::mutex mutex;
  std::vector<Stream*> streams;
  Stream* null[DEVICES];
  std::atomic<bool> context[DEVICES] = {};
  std::atomic<int> sticky{cudaSuccess};
  std::atomic<bool> forked{false};
  const uint64_t queue = atoi(setting("QUEUE", "1024"));

  Process() {
    for (int device = 0; device < DEVICES; device++) {
      null[device] = new Stream(device, 0, 0);
      streams.push_back(null[device]);
    }
    pthread_atfork(nullptr, nullptr, [] { Process::get().forked = Process::get().used(); });
  }

  bool used() const { return std::any_of(context, context + DEVICES, [](auto& each) { return each.load(); }); }

  std::vector<Stream*> all() {
    std::lock_guard<std::mutex> lock(mutex);
    return streams;
  }

  static Process& get() {
    static Process* made = new Process;
    return *made;
  }
};

thread_local int device_of_thread = 0;
thread_local cudaError_t error_of_thread = cudaSuccess;

}  // namespace

int devices() {
  static const int count = std::min(atoi(setting("DEVICES", "4")), DEVICES);
  return count;
}

int& current_device() { return device_of_thread; }
bool has_context(int device) { return device >= 0 && device < DEVICES && Process::get().context[device]; }
void make_context(int device) { Process::get().context[device] = true; }

cudaError_t health() {
  Process& process = Process::get();
  return process.forked ? cudaErrorInitializationError : (cudaError_t)process.sticky.load();
}

bool faulted() { return Process::get().sticky != cudaSuccess; }

void fault(cudaError_t error, const std::string& why) {
  int none = cudaSuccess;
  if (!Process::get().sticky.compare_exchange_strong(none, error)) return;
  journal("FAULT " + why);
  for (Stream* stream : Process::get().all()) stream->wake();
}

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) error_of_thread = error;
  return error;
}

cudaError_t last_error(bool forget) {
  cudaError_t error = health() != cudaSuccess ? health() : error_of_thread;
  if (forget) error_of_thread = cudaSuccess;
  return error;
}

// -- streams --

uint64_t Stream::launch(Work work) {
  make_context(device);
  std::unique_lock<std::mutex> lock(mutex_);
  progress_.wait(lock, [this] { return launched_ - done_ < Process::get().queue || faulted(); });
  queue_.push_back(std::move(work));
  if (!started_) {
    started_ = true;
    std::thread([this] { run(); }).detach();
  }
  work_.notify_one();
  return ++launched_;
}

void Stream::run() {
  pthread_setname_np(pthread_self(), ("stream-gpu" + std::to_string(device)).c_str());
  device_of_thread = device;
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    work_.wait(lock, [this] { return !queue_.empty(); });
    Work next = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    if (!faulted()) next();
    next = nullptr;  // what it holds goes without the lock
    lock.lock();
    done_++;
    progress_.notify_all();
  }
}

uint64_t Stream::launched() {
  std::lock_guard<std::mutex> lock(mutex_);
  return launched_;
}

bool Stream::idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  return launched_ == done_;
}

void Stream::wait(uint64_t until) {
  std::unique_lock<std::mutex> lock(mutex_);
  progress_.wait(lock, [&] { return done_ >= until || faulted(); });
}

// No timer is as fine as a kernel: short times are added up.
void Stream::spend(double seconds) {
  debt_ += seconds;
  if (debt_ < 0.5e-3) return;
  for (double end = now() + debt_; now() < end && !faulted();)
    usleep((useconds_t)std::max(1.0, std::min(10e3, (end - now()) * 1e6)));
  debt_ = 0;
}

void Stream::wake() {
  std::lock_guard<std::mutex> lock(mutex_);
  progress_.notify_all();
}

Stream& make_stream(int device, unsigned flags, int priority) {
  auto* made = new Stream(device, flags, priority);  // never freed: what was launched on it goes on
  std::lock_guard<std::mutex> lock(Process::get().mutex);
  Process::get().streams.push_back(made);
  return *made;
}

Stream& stream_of(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread)
    return *Process::get().null[device_of_thread];
  return *reinterpret_cast<Stream*>(handle);
}

void synchronize(int device) {
  std::vector<std::pair<Stream*, uint64_t>> until;
  for (Stream* stream : Process::get().all())
    if (stream->device == device) until.emplace_back(stream, stream->launched());
  for (auto& [stream, launched] : until) stream->wait(launched);
}

// -- events --

bool Event::complete() {
  std::lock_guard<std::mutex> lock(mutex);
  return completed >= recorded;
}

void Event::wait(uint64_t version) {
  std::unique_lock<std::mutex> lock(mutex);
  while (completed < version && !faulted()) progress.wait_for(lock, std::chrono::milliseconds(50));
}

void Event::record() {
  std::lock_guard<std::mutex> lock(mutex);
  completed++;
  time = now();
  progress.notify_all();
}

}  // namespace simulated

// -- for the libraries that stand for the driver and for NCCL --

API int simulated_devices() { return simulated::devices(); }
API int simulated_has_context(int device) { return simulated::has_context(device); }
API int simulated_faulted() { return simulated::faulted(); }
API void simulated_fault(int error, const char* why) { simulated::fault((cudaError_t)error, why); }
API void simulated_synchronize(int device) { simulated::synchronize(device); }
API void simulated_tell(const char* text) { simulated::journal(text); }
