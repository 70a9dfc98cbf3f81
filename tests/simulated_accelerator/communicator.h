// A communicator with NCCL's semantics: a collective is launched at once, on a stream of the communicator's,
// and its kernel waits on the device for all ranks, polling their memory. What a real fabric does when that
// memory goes away under a kernel is a FAULT here (the strict reading: ai2cm/ace#1398, #1425, #1438).
#pragma once
#include <unistd.h>

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <list>
#include <optional>
#include <thread>

#include "device.h"
#include "peers.h"

namespace simulated {

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
  std::atomic<uint64_t> launched{0}, finished{0};
  std::atomic<bool> aborting{false}, over{false};
  std::mutex held;  // by abort and by shutdown, all the time that they take (pytorch/pytorch#192105)
  std::mutex recording;
  std::list<std::shared_ptr<Record>> records;
  std::optional<Peers> peers;
  Stream* stream;
  const bool verbose = atoi(setting("VERBOSE", "0"));
  const bool nvlink = std::string(setting("LINK", "nvlink")) == "nvlink";
  const double tail =
      atof(setting("TAIL_MS", "0")) / 1e3;  // this rank's kernels end so much later than the others'
  const double teardown = atof(setting("ABORT_MS", "20")) / 1e3;

  Communicator(const c10::intrusive_ptr<c10d::Store>& store, std::string name, int rank, int size,
               double timeout)
      : name(std::move(name)), rank(rank), size(size), timeout(timeout) {
    std::string path;
    if (rank == 0) {
      path = "/dev/shm/simulated-" + std::to_string(getpid()) + "-" + std::to_string((long)(now() * 1e9));
      store->set("simulated", std::vector<uint8_t>(path.begin(), path.end()));
    } else {
      auto found = store->get("simulated");
      path.assign(found.begin(), found.end());
    }
    peers.emplace(path, rank, size);
    initialize();
    stream = &make_stream(this->name);
    journal(who() + " of " + std::to_string(size) + " is there");
  }

  std::string who() const { return name + " rank " + std::to_string(rank); }

  // -- on the device --

  // What a kernel meets that polls its peers' memory: false if it has to end.
  bool polls() {
    if (aborting || faulted()) return false;
    if (!nvlink) return true;
    std::string missing = peers->missing();
    if (missing.empty()) return true;
    if (!aborting) fault(who() + ": " + missing + " under a running kernel");
    return false;
  }

  // Every rank's part, one row a rank, through the slots; undefined if the kernel was ended.
  at::Tensor exchange(const at::Tensor& part) {
    at::Tensor bytes = part.contiguous().view(-1).view(at::kByte);
    int64_t length = bytes.numel();
    at::Tensor all = at::empty({size, length}, at::kByte);
    const char* sent = static_cast<const char*>(bytes.data_ptr());
    if (!peers->exchange(sent, length, static_cast<char*>(all.data_ptr()), [this] { return polls(); })) return {};
    if (length == 0) return all;
    return all.view(part.scalar_type());
  }

  // -- on the host
  // -------------------------------------------------------------------------------------------------

  using Take = std::function<void(const at::Tensor& rows)>;

  EventPtr launch(const std::string& op, const at::Tensor& part, Take take) {
    if (aborting || over)
      throw std::runtime_error("simulated: communicator was aborted or destroyed: " + name);
    check();
    EventPtr ready = current().launch([] {});  // what this reads is computed on the current stream
    auto record = std::make_shared<Record>();
    record->seq = ++launched;
    record->op = op;
    record->launched = now();
    record->timeout = timeout;
    EventPtr done = stream->launch([this, ready, record, part, take] {
      at::NoGradGuard no_grad;
      device_wait(ready);
      record->started = now();
      peers->running() = 1;
      if (verbose) journal(who() + " kernel " + std::to_string(record->seq) + " starts");
      at::Tensor rows = exchange(part);
      double end = now() + tail;
      while (now() < end && polls()) nap(end);
      if (rows.defined() && !aborting)
        take(rows);
      else if (!faulted())
        journal(who() + " kernel " + std::to_string(record->seq) + " ends as garbage");
      peers->running() = 0;
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
    while (finished < launched && !faulted()) nap(since);
    // ncclCommAbort waits for its kernels and proxies, and only then frees.
    usleep((useconds_t)(teardown * 1e6));
    std::string under;
    for (int peer = 0; peer < size; peer++)
      if (peer != rank && peers->running_at(peer)) under += " " + std::to_string(peer);
    peers->state() = ABORTED;
    over = true;
    journal(who() + " abort ends" + (under.empty() ? "" : "; kernels run at" + under));
  }

  void destroy() {
    std::lock_guard<std::mutex> lock(held);
    if (over) return;
    journal(who() + (launched > finished ? " destroy begins, in flight" : " destroy begins"));
    double since = now();
    while (finished < launched && !faulted()) nap(since);
    peers->state() = LEAVING;
    while (!peers->everybody([this](int peer) { return peers->state_of(peer) >= LEAVING; })) nap(since);
    peers->state() = FREED;
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
        if (peer != rank && peers->exited(peer) && peers->state_of(peer) == THERE && !over && !aborting) {
          journal(who() + " WATCHDOG: remote process " + std::to_string(peer) + " exited");
          usleep(200000);
          std::abort();
        }
    }
  }
};

using CommunicatorPtr = std::shared_ptr<Communicator>;

}  // namespace simulated
