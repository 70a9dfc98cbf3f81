// Process groups with NCCL's semantics: a collective is launched at once, on a stream of the group, and its
// kernel waits on the device for all ranks, polling their memory. What a real fabric does when that memory
// goes away under a kernel is a FAULT here (the strict reading: ai2cm/ace#1398, #1425, #1438).
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <ATen/ATen.h>
#include <c10/core/StreamGuard.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

#include <algorithm>
#include <list>
#include <tuple>
#include <thread>

#include "device.h"

namespace {

using namespace c10d;
using simulated::EventPtr;
using simulated::journal;
using simulated::MarkerPtr;
using simulated::nap;
using simulated::now;
using simulated::setting;

constexpr int RANKS = 16;
constexpr size_t SLOT = 1 << 18;
const c10::Device DEVICE(c10::DeviceType::PrivateUse1, 0);

enum State { ABSENT, THERE, ABORTED, LEAVING, FREED };

// What the ranks of a communicator see of each other: this is the memory that kernels poll.
struct Shared {
  std::atomic<int> state[RANKS], pid[RANKS], running[RANKS];
  std::atomic<uint64_t> arrived[RANKS], left[RANKS];
  char slot[RANKS][SLOT];
};

struct Record {  // of the flight recorder
  uint64_t seq;
  std::string op;
  double launched, timeout;
  std::atomic<double> started{0};
  EventPtr done;
};

struct Communicator {
  std::string name;
  const int rank, size;
  const double timeout;
  std::atomic<uint64_t> launched{0}, finished{0}, rounds{0};
  std::atomic<bool> aborting{false}, over{false};
  std::mutex held;  // by abort and by shutdown, all the time that they take (pytorch/pytorch#192105)
  std::mutex recording;
  std::list<std::shared_ptr<Record>> records;
  std::vector<int> processes;  // pidfds
  Shared* shared;
  simulated::Stream* stream;
  const bool verbose = atoi(setting("VERBOSE", "0"));
  const bool nvlink = std::string(setting("LINK", "nvlink")) == "nvlink";
  const double tail =
      atof(setting("TAIL_MS", "0")) / 1e3;  // this rank's kernels end so much later than the others'
  const double teardown = atof(setting("ABORT_MS", "5")) / 1e3;

  Communicator(const c10::intrusive_ptr<Store>& store, std::string name, int rank, int size, double timeout)
      : name(std::move(name)), rank(rank), size(size), timeout(timeout) {
    TORCH_CHECK(size <= RANKS, "at most ", RANKS, " ranks");
    std::string path;
    if (rank == 0) {
      path = "/dev/shm/simulated-" + std::to_string(getpid()) + "-" + std::to_string((long)(now() * 1e9));
      store->set("simulated", std::vector<uint8_t>(path.begin(), path.end()));
    } else {
      auto found = store->get("simulated");
      path.assign(found.begin(), found.end());
    }
    int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    TORCH_CHECK(file >= 0 && ftruncate(file, sizeof(Shared)) == 0, "no shared memory");
    void* mapped = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    TORCH_CHECK(mapped != MAP_FAILED, "no shared memory");
    shared = static_cast<Shared*>(mapped);
    shared->pid[rank] = getpid();
    shared->state[rank] = THERE;
    double since = now();
    while (!everybody([this](int peer) { return shared->state[peer] != ABSENT; })) nap(since);
    if (rank == 0) unlink(path.c_str());
    for (int peer = 0; peer < size; peer++)
      processes.push_back((int)syscall(SYS_pidfd_open, shared->pid[peer].load(), 0));
    simulated::initialize();
    stream = &simulated::make_stream(this->name);
    journal(who() + " of " + std::to_string(size) + " is there");
  }

  std::string who() const { return name + " rank " + std::to_string(rank); }

  template <class Test>
  bool everybody(Test test) const {
    for (int peer = 0; peer < size; peer++)
      if (!test(peer)) return false;
    return true;
  }

  bool exited(int peer) const {
    pollfd process{processes[peer], POLLIN, 0};
    return processes[peer] < 0 || poll(&process, 1, 0) > 0;
  }

  // -- on the device
  // -----------------------------------------------------------------------------------------------

  // What a kernel meets that polls its peers' memory: false if it has to end.
  bool polls() {
    if (aborting || simulated::faulted()) return false;
    if (!nvlink) return true;
    for (int peer = 0; peer < size; peer++) {
      if (peer == rank) continue;
      int state = shared->state[peer];
      const char* what = state == ABORTED ? "aborted"
                         : state == FREED ? "destroyed"
                         : exited(peer)   ? "exited"
                                          : nullptr;
      if (what == nullptr) continue;
      if (aborting) return false;
      simulated::fault(who() + ": peer " + std::to_string(peer) + " " + what + " under a running kernel");
      return false;
    }
    return true;
  }

  template <class Test>
  bool wait_polling(Test test) {
    double since = now();
    while (!test()) {
      if (!polls()) return false;
      nap(since);
    }
    return polls();
  }

  // Every rank's part, one row a rank, through the slots; undefined if the kernel was ended.
  at::Tensor exchange(const at::Tensor& part) {
    at::Tensor bytes = part.contiguous().view(-1).view(at::kByte);
    int64_t length = bytes.numel();
    at::Tensor all = at::empty({size, length}, at::kByte);
    int64_t at = 0;
    do {
      int64_t piece = std::min<int64_t>(SLOT, length - at);
      uint64_t round = ++rounds;
      if (!wait_polling([&] { return everybody([&](int peer) { return shared->left[peer] >= round - 1; }); }))
        return {};
      memcpy(shared->slot[rank], static_cast<char*>(bytes.data_ptr()) + at, piece);
      shared->arrived[rank] = round;
      if (!wait_polling([&] { return everybody([&](int peer) { return shared->arrived[peer] >= round; }); }))
        return {};
      for (int peer = 0; peer < size; peer++)
        memcpy(static_cast<char*>(all.data_ptr()) + peer * length + at, shared->slot[peer], piece);
      shared->left[rank] = round;
      at += piece;
    } while (at < length);
    if (length == 0) return all;
    return all.view(part.scalar_type());
  }

  // -- on the host
  // -------------------------------------------------------------------------------------------------

  using Take = std::function<void(const at::Tensor& rows)>;

  EventPtr launch(const std::string& op, const at::Tensor& part, Take take) {
    if (aborting || over)
      throw std::runtime_error("simulated: communicator was aborted or destroyed: " + name);
    simulated::check();
    EventPtr ready = simulated::current().launch([] {});  // what this reads is computed on the current stream
    auto record = std::make_shared<Record>();
    record->seq = ++launched;
    record->op = op;
    record->launched = now();
    record->timeout = timeout;
    EventPtr done = stream->launch([this, ready, record, part, take] {
      at::NoGradGuard no_grad;
      simulated::device_wait(ready);
      record->started = now();
      shared->running[rank] = 1;
      if (verbose) journal(who() + " kernel " + std::to_string(record->seq) + " starts");
      at::Tensor rows = exchange(part);
      double end = now() + tail;
      while (now() < end && polls()) nap(end);
      if (rows.defined() && !aborting)
        take(rows);
      else if (!simulated::faulted())
        journal(who() + " kernel " + std::to_string(record->seq) + " ends as garbage");
      shared->running[rank] = 0;
      finished = record->seq;
    });
    record->done = done;
    std::lock_guard<std::mutex> lock(recording);
    records.push_back(record);
    if (records.size() > 200) records.pop_front();
    return done;
  }

  void abort() {
    std::lock_guard<std::mutex> lock(held);
    if (over) return;
    journal(who() + (launched > finished ? " abort begins" : " abort begins, idle"));
    aborting = true;
    double since = now();
    while (finished < launched && !simulated::faulted()) nap(since);
    // ncclCommAbort waits for its kernels and proxies, and only then frees.
    usleep((useconds_t)(teardown * 1e6));
    std::string under;
    for (int peer = 0; peer < size; peer++)
      if (peer != rank && shared->running[peer]) under += " " + std::to_string(peer);
    shared->state[rank] = ABORTED;
    over = true;
    journal(who() + " abort ends" + (under.empty() ? "" : "; kernels run at" + under));
  }

  void destroy() {
    std::lock_guard<std::mutex> lock(held);
    if (over) return;
    journal(who() + (launched > finished ? " destroy begins, in flight" : " destroy begins"));
    double since = now();
    while (finished < launched && !simulated::faulted()) nap(since);
    shared->state[rank] = LEAVING;
    while (!everybody([this](int peer) { return shared->state[peer] >= LEAVING; })) nap(since);
    shared->state[rank] = FREED;
    over = true;
    journal(who() + " destroy ends");
  }

  // -- its watchdog
  // ------------------------------------------------------------------------------------------------

  std::shared_ptr<Record> oldest() {
    std::lock_guard<std::mutex> lock(recording);
    for (auto& record : records)
      if (!record->done->done) return record;
    return nullptr;
  }

  void watch() {
    const bool remote = atoi(setting("REMOTE_ERRORS", "0"));
    while (!over) {
      usleep(100000);
      auto record = oldest();
      if (record && now() - record->launched > record->timeout && !aborting) {
        journal(who() + " WATCHDOG: " + record->op + " " + std::to_string(record->seq) + " timed out");
        std::abort();
      }
      if (!remote || aborting) continue;
      for (int peer = 0; peer < size; peer++)
        if (peer != rank && exited(peer) && shared->state[peer] == THERE && !over && !aborting) {
          journal(who() + " WATCHDOG: remote process " + std::to_string(peer) + " exited");
          usleep(200000);
          std::abort();
        }
    }
  }
};

using CommunicatorPtr = std::shared_ptr<Communicator>;

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
  for (auto& communicator : communicators()) found.emplace_back(communicator->launched, communicator->finished);
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
