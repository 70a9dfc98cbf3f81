// The device: streams that run what was launched on them in order, on threads of their own that need no GIL;
// events; faults, which stay; the capture of graphs.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "journal.h"

namespace simulated {

// An error of the device stays, as CUDA's do: whatever is asked of it from then on raises.
void fault(const std::string& why);
bool faulted();
void check();

struct Event {
  std::atomic<bool> done{false};
};
using EventPtr = std::shared_ptr<Event>;

// Where the event is that was recorded last: a captured graph records a new one at each replay.
struct Marker {
  EventPtr latest = [] {
    auto made = std::make_shared<Event>();
    made->done = true;
    return made;
  }();
};
using MarkerPtr = std::shared_ptr<Marker>;

class Stream {
 public:
  Stream(long id, std::string name);
  const long id;
  const std::string name;
  // Blocks while the launch queue is full. Call without the GIL.
  EventPtr launch(std::function<void()> kernel);
  void wait_for(const EventPtr& event);  // on the device
  void synchronize();                    // the host
  bool idle();
  unsigned long launched();
  unsigned long finished();

 private:
  void run();
  std::deque<std::pair<std::function<void()>, EventPtr>> queue_;
  unsigned long launched_ = 0, finished_ = 0;
};

Stream& make_stream(const std::string& name);
Stream& stream(long id);
Stream& current();
Stream& exchange(long id);  // of this thread; returns the one that was current
void host_wait(const EventPtr& event);
void device_wait(const EventPtr& event);

void initialize();
bool initialized();
void synchronize();  // everything; raises during a capture, and spoils it, as cudaDeviceSynchronize does
void forbid_in_capture(const char* what);
std::string progress();  // changes while the device does

// What a capture records is launched by each replay. `launch` happens at once otherwise.
void launch_or_record(std::function<void()> launch);
bool capturing();
void begin_capture();
long end_capture();
void replay(long graph);

void compute(double milliseconds);  // a kernel of the program's own, on the current stream

}  // namespace simulated
