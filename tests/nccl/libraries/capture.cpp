#include "capture.h"

#include <pthread.h>

#include <utility>

namespace simulated {

struct Capture {
  GraphPtr graph = std::make_shared<Graph>();
  std::vector<Stream*> streams;
  unsigned long long id;
  cudaStreamCaptureMode mode;
  pthread_t thread;
};

namespace {

using CapturePtr = std::shared_ptr<Capture>;

// One capture at a time in a process is all that torch's tests of graphs need.
struct Captures {
  std::mutex mutex;
  CapturePtr current;
  std::atomic<bool> any{false};
  unsigned long long ids = 0;
};

Captures& captures() {
  static Captures* made = new Captures;
  return *made;
}

thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;

CapturePtr capture_of(Stream& stream) {
  if (!captures().any) return nullptr;
  std::lock_guard<std::mutex> lock(captures().mutex);
  return stream.capture;
}

void join(Stream& stream, const CapturePtr& capture) {
  std::lock_guard<std::mutex> lock(captures().mutex);
  if (capture != captures().current || stream.capture == capture) return;
  stream.capture = capture;
  capture->streams.push_back(&stream);
}

}  // namespace

uint64_t launch_or_capture(Stream& stream, Work work) {
  CapturePtr capture = capture_of(stream);
  if (!capture) return stream.launch(std::move(work));
  std::lock_guard<std::mutex> lock(captures().mutex);
  capture->graph->work.push_back(std::move(work));
  return 0;
}

bool capturing(Stream& stream) { return capture_of(stream) != nullptr; }

unsigned long long capture_id(Stream& stream) {
  CapturePtr capture = capture_of(stream);
  return capture ? capture->id : 0;
}

cudaError_t begin_capture(Stream& stream, cudaStreamCaptureMode mode) {
  std::lock_guard<std::mutex> lock(captures().mutex);
  if (captures().current) return cudaErrorNotSupported;
  auto capture = std::make_shared<Capture>();
  capture->id = ++captures().ids;
  capture->mode = mode;
  capture->thread = pthread_self();
  capture->streams.push_back(&stream);
  stream.capture = captures().current = capture;
  captures().any = true;
  return cudaSuccess;
}

cudaError_t end_capture(Stream& stream, GraphPtr& graph) {
  std::lock_guard<std::mutex> lock(captures().mutex);
  CapturePtr capture = std::exchange(captures().current, nullptr);
  captures().any = false;
  if (!capture || stream.capture != capture) return cudaErrorInvalidValue;
  for (Stream* each : capture->streams) each->capture = nullptr;
  graph = capture->graph;
  return cudaSuccess;
}

cudaStreamCaptureMode exchange_mode(cudaStreamCaptureMode mode) { return std::exchange(mode_of_thread, mode); }

bool forbidden() {
  if (!captures().any || mode_of_thread == cudaStreamCaptureModeRelaxed) return false;
  std::lock_guard<std::mutex> lock(captures().mutex);
  CapturePtr capture = captures().current;
  if (!capture || capture->mode == cudaStreamCaptureModeRelaxed) return false;
  bool own = pthread_equal(capture->thread, pthread_self());
  return own || (capture->mode == cudaStreamCaptureModeGlobal && mode_of_thread == cudaStreamCaptureModeGlobal);
}

cudaError_t record(const std::shared_ptr<Event>& event, Stream& stream) {
  CapturePtr capture = capture_of(stream);
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    event->capture = capture;
    if (capture) return cudaSuccess;
    event->recorded++;
  }
  stream.launch([event, &stream] {
    stream.spend(0);
    event->record();
  });
  return cudaSuccess;
}

// A stream that waits for an event of a capture takes part in it from then on; in a graph, the order is that of the calls.
cudaError_t wait_on_device(Stream& stream, const std::shared_ptr<Event>& event) {
  uint64_t version;
  CapturePtr capture;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    capture = event->capture;
    version = event->recorded;
    if (!capture && event->completed >= version) return cudaSuccess;
  }
  if (capture)
    join(stream, capture);
  else if (!capturing(stream))
    stream.launch([event, version] { event->wait(version); });
  return cudaSuccess;
}

}  // namespace simulated
