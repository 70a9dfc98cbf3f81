// ncclGroupStart and ncclGroupEnd: what is called between them happens at the end. Operations of one communicator on one
// stream are one kernel.
#pragma once
#include <functional>
#include <string>

#include "communicator.h"

namespace simulated {

struct Operation {
  ncclComm* comm;
  cudaStream_t stream;
  const char* kind;
  std::function<bool()> collective;  // all of it; false: it was ended
  std::function<bool()> step;        // of a send or a receive: whether that is over
};

ncclResult_t in_group(std::function<ncclResult_t()> work);  // on the host
ncclResult_t in_group(Operation operation);

}  // namespace simulated
