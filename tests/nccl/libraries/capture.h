// The capture of graphs. A captured graph is a list of work in the order of the calls, which a launch runs in one go.
#pragma once
#include <memory>
#include <vector>

#include "device.h"

namespace simulated {

struct Graph {
  std::vector<Work> work;
};
using GraphPtr = std::shared_ptr<Graph>;

// Launches the work on the stream, or adds it to the graph that the stream is capturing. 0: it was added.
uint64_t launch_or_capture(Stream& stream, Work work);

bool capturing(Stream& stream);
unsigned long long capture_id(Stream& stream);
cudaError_t begin_capture(Stream& stream, cudaStreamCaptureMode mode);
cudaError_t end_capture(Stream& stream, GraphPtr& graph);
cudaStreamCaptureMode exchange_mode(cudaStreamCaptureMode mode);  // of this thread

// Whether this thread may not make a call that could synchronise, because of a capture here or elsewhere.
bool forbidden();
cudaError_t record(const std::shared_ptr<Event>& event, Stream& stream);
cudaError_t wait_on_device(Stream& stream, const std::shared_ptr<Event>& event);

}  // namespace simulated
