#include "device.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <stdexcept>
#include <thread>

namespace simulated {
namespace {

// Never destroyed: device threads outlive `main`.
struct State {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Stream*> streams;
  std::vector<std::vector<std::function<void()>>> graphs;
  std::vector<std::function<void()>> recorded;
  bool capturing = false, spoiled = false;
  std::atomic<bool> initialized{false}, faulted{false};
  std::string why;
  size_t depth = atoi(setting("QUEUE", "1024"));
};

State& state() {
  static State* made = new State;
  return *made;
}

thread_local long current_id = 0;

}  // namespace

void fault(const std::string& why) {
  State& s = state();
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    if (s.faulted) return;
    s.why = why;
    s.faulted = true;
  }
  journal("FAULT " + why);
  s.changed.notify_all();
}

bool faulted() { return state().faulted; }

void check() {
  if (state().faulted)
    throw std::runtime_error("simulated device: an illegal memory access was encountered: " + state().why);
}

Stream::Stream(long id, std::string name) : id(id), name(std::move(name)) {
  std::thread([this] { run(); }).detach();
}

void Stream::run() {
  current_id = id;
  State& s = state();
  std::unique_lock<std::mutex> lock(s.mutex);
  while (true) {
    s.changed.wait(lock, [this] { return !queue_.empty(); });
    {
      auto [kernel, event] = queue_.front();
      lock.unlock();
      try {
        if (!faulted()) kernel();
      } catch (const std::exception& error) {
        fault(std::string("a kernel raised: ") + error.what());
      }
      event->done = true;
      kernel = nullptr;  // what it holds goes without our lock
      lock.lock();
    }
    auto over = std::move(queue_.front());
    queue_.pop_front();
    finished_++;
    lock.unlock();
    over.first = nullptr;
    s.changed.notify_all();
    lock.lock();
  }
}

EventPtr Stream::launch(std::function<void()> kernel) {
  check();
  initialize();
  State& s = state();
  auto event = std::make_shared<Event>();
  {
    std::unique_lock<std::mutex> lock(s.mutex);
    s.changed.wait(lock, [&] { return queue_.size() < s.depth || s.faulted; });
    queue_.emplace_back(std::move(kernel), event);
    launched_++;
  }
  s.changed.notify_all();
  return event;
}

void Stream::wait_for(const EventPtr& event) {
  launch([event] { device_wait(event); });
}

void Stream::synchronize() {
  State& s = state();
  std::unique_lock<std::mutex> lock(s.mutex);
  s.changed.wait(lock, [&] { return queue_.empty(); });
}

bool Stream::idle() {
  std::lock_guard<std::mutex> lock(state().mutex);
  return queue_.empty();
}

unsigned long Stream::launched() {
  std::lock_guard<std::mutex> lock(state().mutex);
  return launched_;
}

unsigned long Stream::finished() {
  std::lock_guard<std::mutex> lock(state().mutex);
  return finished_;
}

Stream& make_stream(const std::string& name) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.streams.empty()) s.streams.push_back(new Stream(0, "default"));
  s.streams.push_back(new Stream((long)s.streams.size(), name));
  return *s.streams.back();
}

Stream& stream(long id) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.streams.empty()) s.streams.push_back(new Stream(0, "default"));
  return *s.streams.at(id);
}

Stream& current() { return stream(current_id); }

Stream& exchange(long id) {
  Stream& before = current();
  current_id = id;
  return before;
}

void device_wait(const EventPtr& event) {
  State& s = state();
  std::unique_lock<std::mutex> lock(s.mutex);
  s.changed.wait(lock, [&] { return event->done || s.faulted; });
}

void host_wait(const EventPtr& event) {
  device_wait(event);
  check();
}

void initialize() { state().initialized = true; }
bool initialized() { return state().initialized; }

void synchronize() {
  forbid_in_capture("synchronize");
  std::vector<Stream*> all;
  {
    std::lock_guard<std::mutex> lock(state().mutex);
    all = state().streams;
  }
  for (Stream* each : all) each->synchronize();
  check();
}

void forbid_in_capture(const char* what) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (!s.capturing) return;
  s.spoiled = true;
  throw std::runtime_error(
      std::string("simulated device: operation not permitted when stream is capturing: ") + what);
}

std::string progress() {
  std::vector<Stream*> all;
  {
    std::lock_guard<std::mutex> lock(state().mutex);
    all = state().streams;
  }
  std::string found;
  for (Stream* each : all)
    found += std::to_string(each->finished()) + "/" + std::to_string(each->launched()) + " ";
  return found;
}

void launch_or_record(std::function<void()> launch) {
  State& s = state();
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    if (s.capturing) {
      s.recorded.push_back(std::move(launch));
      return;
    }
  }
  launch();
}

bool capturing() {
  std::lock_guard<std::mutex> lock(state().mutex);
  return state().capturing;
}

void begin_capture() {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().capturing = true;
  state().spoiled = false;
  state().recorded.clear();
}

long end_capture() {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.capturing = false;
  if (s.spoiled)
    throw std::runtime_error("simulated device: operation failed due to a previous error during capture");
  s.graphs.push_back(std::move(s.recorded));
  s.recorded.clear();
  return (long)s.graphs.size() - 1;
}

void replay(long graph) {
  std::vector<std::function<void()>> launches;
  {
    std::lock_guard<std::mutex> lock(state().mutex);
    launches = state().graphs.at(graph);
  }
  for (auto& launch : launches) launch();
}

void compute(double milliseconds) {
  long id = current_id;
  launch_or_record([id, milliseconds] {
    stream(id).launch([milliseconds] {
      double end = now() + milliseconds / 1e3;
      while (now() < end && !faulted())
        usleep((useconds_t)std::min(1000.0, std::max(1.0, (end - now()) * 1e6)));
    });
  });
}

}  // namespace simulated
