// The process groups' backend on top of a communicator, and the module's functions.
#include <ATen/ATen.h>
#include <c10/core/StreamGuard.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

#include <tuple>

#include "communicator.h"

namespace {

using namespace c10d;
using simulated::Communicator;
using simulated::CommunicatorPtr;
using simulated::MarkerPtr;
using simulated::setting;

const c10::Device DEVICE(c10::DeviceType::PrivateUse1, 0);

std::mutex all_mutex;
std::vector<std::weak_ptr<Communicator>>& all_communicators() {
  static auto* made = new std::vector<std::weak_ptr<Communicator>>;
  return *made;
}

// Host memory of what is on the device; the caller has it read or written by a kernel alone.
at::Tensor host(const at::Tensor& tensor) {
  at::Tensor detached = tensor.detach();
  if (!detached.device().is_privateuseone()) return detached;
  auto options = detached.options().device(at::kCPU);
  c10::Storage storage = detached.storage();
  return at::from_blob(
      detached.data_ptr(), detached.sizes(), detached.strides(), [storage](void*) {}, options);
}

struct SimulatedWork : Work {
  MarkerPtr marker;
  std::vector<at::Tensor> results;
  CommunicatorPtr communicator;
  uint64_t seq;
  SimulatedWork(OpType op, MarkerPtr marker, std::vector<at::Tensor> results, CommunicatorPtr communicator)
      : Work(communicator->rank, op),
        marker(std::move(marker)),
        results(std::move(results)),
        communicator(std::move(communicator)),
        seq(this->communicator->launched) {}
  bool isCompleted() override { return marker->latest->done; }
  bool isSuccess() const override { return marker->latest->done && !communicator->aborting; }
  uint64_t getSequencenumber() const override { return seq; }
  std::vector<at::Tensor> result() override { return results; }
  bool wait(std::chrono::milliseconds) override {
    static const bool blocking = atoi(setting("BLOCKING_WAIT", "0"));
    MarkerPtr mine = marker;
    long id = simulated::current().id;
    simulated::launch_or_record([mine, id] { simulated::stream(id).wait_for(mine->latest); });
    if (blocking && !simulated::capturing()) simulated::host_wait(marker->latest);
    return true;
  }
  void synchronize() override { wait(kNoTimeout); }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    auto type = c10::ListType::create(c10::TensorType::get());
    auto future = c10::make_intrusive<c10::ivalue::Future>(type, std::vector<c10::Device>{DEVICE});
    c10::Stream ours(c10::Stream::UNSAFE, DEVICE, communicator->stream->id);
    c10::StreamGuard guard(ours);
    future->markCompleted(
        c10::IValue(results));  // with an event of our stream, which whoever waits has its own wait for
    return future;
  }
};

struct SimulatedBackend : Backend {
  CommunicatorPtr communicator;
  std::atomic<bool> terminated{false};

  SimulatedBackend(const c10::intrusive_ptr<Store>& store, const std::string& name, int rank, int size,
                   double timeout)
      : Backend(rank, size), communicator(std::make_shared<Communicator>(store, name, rank, size, timeout)) {
    {
      std::lock_guard<std::mutex> lock(all_mutex);
      all_communicators().push_back(communicator);
    }
    std::thread([kept = communicator] { kept->watch(); }).detach();
  }
  ~SimulatedBackend() override {
    if (!terminated) communicator->abort();
  }
  const std::string getBackendName() const override { return "simulated"; }
  c10::intrusive_ptr<Options> getBackendOptions() override {
    auto milliseconds = std::chrono::milliseconds((long)(communicator->timeout * 1e3));
    return c10::make_intrusive<Options>("simulated", milliseconds);
  }
  void abort() override {
    terminated = true;
    communicator->abort();
  }
  void shutdown() override {
    communicator->destroy();
    terminated = true;
  }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return communicator->launched; }
  bool supportsSplitting() const override { return true; }
  c10::intrusive_ptr<Backend> split(const c10::intrusive_ptr<Store>& store, const std::vector<int>& ranks,
                                    const c10::intrusive_ptr<Options>& options) override {
    auto mine = std::find(ranks.begin(), ranks.end(), rank_);
    if (mine == ranks.end()) return nullptr;
    std::string name = options->group_name.empty() ? communicator->name + "/split" : options->group_name;
    return c10::make_intrusive<SimulatedBackend>(store, name, (int)(mine - ranks.begin()), (int)ranks.size(),
                                                 communicator->timeout);
  }

  // A capture records the launch, and has its number when it is replayed.
  c10::intrusive_ptr<Work> start(OpType type, const at::Tensor& part, Communicator::Take take,
                                 std::vector<at::Tensor> results) {
    auto kept = communicator;
    std::string op = opTypeToString(type);
    at::Tensor held = part;  // as long as the kernel reads it
    at::Tensor bytes = host(part);
    auto marker = std::make_shared<simulated::Marker>();
    simulated::launch_or_record(
        [kept, op, bytes, held, take, marker] { marker->latest = kept->launch(op, bytes, take); });
    return c10::make_intrusive<SimulatedWork>(type, marker, std::move(results), kept);
  }

  static at::Tensor reduced(const at::Tensor& rows, const ReduceOp& op) {
    switch (op) {
      case ReduceOp::SUM:
        return rows.sum(0).to(rows.scalar_type());
      case ReduceOp::AVG:
        return rows.sum(0).div(rows.size(0)).to(rows.scalar_type());
      case ReduceOp::MAX:
        return rows.amax(0);
      case ReduceOp::MIN:
        return rows.amin(0);
      case ReduceOp::PRODUCT:
        return rows.prod(0).to(rows.scalar_type());
      default:
        throw std::runtime_error("simulated: no such reduction");
    }
  }

  c10::intrusive_ptr<Work> allreduce(std::vector<at::Tensor>& tensors,
                                     const AllreduceOptions& options) override {
    at::Tensor to = host(tensors[0]);
    ReduceOp op = options.reduceOp;
    return start(
        OpType::ALLREDUCE, tensors[0],
        [to, op](const at::Tensor& rows) { to.copy_(reduced(rows, op).view(to.sizes())); }, tensors);
  }
  c10::intrusive_ptr<Work> allreduce_coalesced(std::vector<at::Tensor>& tensors,
                                               const AllreduceCoalescedOptions& options) override {
    c10::intrusive_ptr<Work> last;
    for (at::Tensor& each : tensors) {
      std::vector<at::Tensor> one{each};
      last = allreduce(one, options);
    }
    return last;
  }
  c10::intrusive_ptr<Work> reduce(std::vector<at::Tensor>& tensors, const ReduceOptions& options) override {
    at::Tensor to = host(tensors[0]);
    ReduceOp op = options.reduceOp;
    bool mine = options.rootRank == rank_;
    auto take = [to, op, mine](const at::Tensor& rows) {
      if (mine) to.copy_(reduced(rows, op).view(to.sizes()));
    };
    return start(OpType::REDUCE, tensors[0], take, tensors);
  }
  c10::intrusive_ptr<Work> broadcast(std::vector<at::Tensor>& tensors,
                                     const BroadcastOptions& options) override {
    at::Tensor to = host(tensors[0]);
    int64_t root = options.rootRank;
    return start(
        OpType::BROADCAST, tensors[0],
        [to, root](const at::Tensor& rows) { to.copy_(rows[root].view(to.sizes())); }, tensors);
  }
  c10::intrusive_ptr<Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                     std::vector<at::Tensor>& inputs, const AllgatherOptions&) override {
    std::vector<at::Tensor> to;
    for (at::Tensor& each : outputs[0]) to.push_back(host(each));
    auto take = [to](const at::Tensor& rows) {
      for (size_t i = 0; i < to.size(); i++) to[i].copy_(rows[(int64_t)i].view(to[i].sizes()));
    };
    return start(OpType::ALLGATHER, inputs[0], take, outputs[0]);
  }
  c10::intrusive_ptr<Work> _allgather_base(at::Tensor& output, at::Tensor& input,
                                           const AllgatherOptions&) override {
    at::Tensor to = host(output);
    return start(OpType::_ALLGATHER_BASE, input,
                 [to](const at::Tensor& rows) { to.copy_(rows.reshape(to.sizes())); }, {output});
  }
  c10::intrusive_ptr<Work> allgather_into_tensor_coalesced(std::vector<at::Tensor>& outputs,
                                                           std::vector<at::Tensor>& inputs,
                                                           const AllgatherOptions& options) override {
    c10::intrusive_ptr<Work> last;
    for (size_t i = 0; i < inputs.size(); i++) last = _allgather_base(outputs[i], inputs[i], options);
    return last;
  }
  c10::intrusive_ptr<Work> reduce_scatter(std::vector<at::Tensor>& outputs,
                                          std::vector<std::vector<at::Tensor>>& inputs,
                                          const ReduceScatterOptions& options) override {
    at::Tensor flat = at::cat([&] {
      std::vector<at::Tensor> parts;
      for (auto& each : inputs[0]) parts.push_back(each.reshape(-1));
      return parts;
    }());
    return _reduce_scatter_base(outputs[0], flat, options);
  }
  c10::intrusive_ptr<Work> _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                const ReduceScatterOptions& options) override {
    at::Tensor to = host(output);
    ReduceOp op = options.reduceOp;
    int64_t size = size_, rank = rank_;
    auto take = [to, op, size, rank](const at::Tensor& rows) {
      to.copy_(reduced(rows, op).view({size, -1})[rank].view(to.sizes()));
    };
    return start(OpType::_REDUCE_SCATTER_BASE, input, take, {output});
  }
  c10::intrusive_ptr<Work> reduce_scatter_tensor_coalesced(std::vector<at::Tensor>& outputs,
                                                           std::vector<at::Tensor>& inputs,
                                                           const ReduceScatterOptions& options) override {
    c10::intrusive_ptr<Work> last;
    for (size_t i = 0; i < inputs.size(); i++) last = _reduce_scatter_base(outputs[i], inputs[i], options);
    return last;
  }
  c10::intrusive_ptr<Work> alltoall_base(at::Tensor& output, at::Tensor& input,
                                         std::vector<int64_t>& to_splits, std::vector<int64_t>& from_splits,
                                         const AllToAllOptions&) override {
    TORCH_CHECK(to_splits.empty() && from_splits.empty(), "simulated: all-to-all in equal parts alone");
    at::Tensor to = host(output);
    int64_t size = size_, rank = rank_;
    auto take = [to, size, rank](const at::Tensor& rows) {
      to.copy_(rows.view({size, size, -1}).select(1, rank).reshape(to.sizes()));
    };
    return start(OpType::ALLTOALL_BASE, input, take, {output});
  }
  c10::intrusive_ptr<Work> barrier(const BarrierOptions&) override {
    at::Tensor nothing = at::zeros({1}, at::kByte);
    auto work = start(OpType::BARRIER, nothing, [](const at::Tensor&) {}, {});
    simulated::host_wait(
        static_cast<SimulatedWork*>(work.get())->marker->latest);  // NCCL's blocks the host, too
    return work;
  }
};

std::vector<CommunicatorPtr> communicators() {
  std::lock_guard<std::mutex> lock(all_mutex);
  std::vector<CommunicatorPtr> found;
  for (auto& weak : all_communicators())
    if (auto communicator = weak.lock()) found.push_back(communicator);
  return found;
}

// (number of the group, its name, operation, sequence number, state), one for each of the last collectives
using Row = std::tuple<size_t, std::string, std::string, uint64_t, std::string>;
std::vector<Row> records() {
  std::vector<Row> rows;
  auto all = communicators();
  for (size_t number = 0; number < all.size(); number++) {
    std::lock_guard<std::mutex> lock(all[number]->recording);
    for (auto& record : all[number]->records) {
      const char* state = record->done->done ? "completed" : record->started > 0 ? "started" : "scheduled";
      rows.emplace_back(number, all[number]->name, record->op, record->seq, state);
    }
  }
  return rows;
}

// For each group: the last collective that was launched, and that has ended.
std::vector<std::pair<uint64_t, uint64_t>> counters() {
  std::vector<std::pair<uint64_t, uint64_t>> found;
  for (auto& communicator : communicators())
    found.emplace_back(communicator->launched, communicator->finished);
  return found;
}

c10::intrusive_ptr<Backend> create(const DistributedBackendOptions& options, const py::object&) {
  py::gil_scoped_release without_gil;
  return c10::make_intrusive<SimulatedBackend>(options.store, options.group_id, options.group_rank,
                                               options.group_size, options.timeout.count());
}

}  // namespace

namespace c10d {

// DistributedDataParallel wants one for each kind of device.
struct Stopwatch : Timer {
  explicit Stopwatch(c10::Device) {}
  void record(Event event) override { getTimeRef(event) = current_time_in_nanos(); }
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    return getTimeRef(end) - getTimeRef(start);
  }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::DeviceType::PrivateUse1, Stopwatch);

}  // namespace c10d

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using Released = py::call_guard<py::gil_scoped_release>;
  m.def("create", &create);
  m.def("records", &records, Released());
  m.def("counters", &counters, Released());
  m.def("initialize", &simulated::initialize);
  m.def("is_initialized", &simulated::initialized);
  m.def("synchronize", &simulated::synchronize, Released());
  m.def("compute", &simulated::compute, Released());
  m.def("progress", &simulated::progress, Released());
  m.def("journal", &simulated::journal, Released());
  m.def("capturing", &simulated::capturing);
  m.def("begin_capture", &simulated::begin_capture);
  m.def("end_capture", &simulated::end_capture, Released());
  m.def("replay", &simulated::replay, Released());
  m.def("fault", [] { return simulated::faulted(); });
  m.def("pending", [] { return simulated::stream(0).launched() - simulated::stream(0).finished(); });
}
