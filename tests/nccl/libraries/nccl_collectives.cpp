// libnccl: collectives, sends and receives. All of them collect every rank's part and take what they need of it.
#include <string.h>

#include <algorithm>

#include "group.h"

using namespace simulated;

namespace {

size_t size_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
    case ncclFloat8e4m3:
    case ncclFloat8e5m2: return 1;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32: return 4;
    default: return 8;
  }
}

// -- reductions: of the halves and the bytes of float8, the result is rank 0's part --

template <class T>
void reduce_as(char* to, const char* from, size_t bytes, ncclRedOp_t op) {
  T* sum = reinterpret_cast<T*>(to);
  const T* part = reinterpret_cast<const T*>(from);
  for (size_t i = 0; i < bytes / sizeof(T); i++) switch (op) {
      case ncclProd: sum[i] = (T)(sum[i] * part[i]); break;
      case ncclMax: sum[i] = std::max(sum[i], part[i]); break;
      case ncclMin: sum[i] = std::min(sum[i], part[i]); break;
      default: sum[i] = (T)(sum[i] + part[i]);
    }
}

template <class T>
void divide_as(char* data, size_t bytes, int by) {
  T* numbers = reinterpret_cast<T*>(data);
  for (size_t i = 0; i < bytes / sizeof(T); i++) numbers[i] = (T)(numbers[i] / by);
}

void reduce(char* to, const char* from, size_t bytes, ncclDataType_t type, ncclRedOp_t op) {
  switch (type) {
    case ncclInt8: return reduce_as<int8_t>(to, from, bytes, op);
    case ncclUint8: return reduce_as<uint8_t>(to, from, bytes, op);
    case ncclInt32: return reduce_as<int32_t>(to, from, bytes, op);
    case ncclUint32: return reduce_as<uint32_t>(to, from, bytes, op);
    case ncclInt64: return reduce_as<int64_t>(to, from, bytes, op);
    case ncclUint64: return reduce_as<uint64_t>(to, from, bytes, op);
    case ncclFloat32: return reduce_as<float>(to, from, bytes, op);
    case ncclFloat64: return reduce_as<double>(to, from, bytes, op);
    default: return;
  }
}

// The rows of all ranks, reduced into the first.
void reduce_rows(std::vector<char>& rows, size_t bytes, int size, ncclDataType_t type, ncclRedOp_t op) {
  for (int peer = 1; peer < size; peer++) reduce(rows.data(), rows.data() + peer * bytes, bytes, type, op);
  if (op == ncclAvg && type == ncclFloat32) divide_as<float>(rows.data(), bytes, size);
  if (op == ncclAvg && type == ncclFloat64) divide_as<double>(rows.data(), bytes, size);
}

using Take = std::function<void(std::vector<char>& rows)>;

ncclResult_t collective(const char* kind, const void* part, size_t bytes, ncclComm_t comm, cudaStream_t stream,
                        Take take) {
  auto run = [=] {
    std::vector<char> rows(bytes * comm->size);
    if (!comm->exchange(part, bytes, rows.data())) return false;
    if (bytes) take(rows);
    return true;
  };
  return in_group({comm, stream, kind, run, nullptr});
}

// One end of a message: its next piece, if the other end has come that far.
ncclResult_t message(const char* kind, char* data, size_t bytes, bool sends, int peer, ncclComm_t comm,
                     cudaStream_t stream) {
  auto step = [=, at = std::make_shared<size_t>(0)] {
    Pair& pair = sends ? comm->extra().pairs[comm->rank][peer] : comm->extra().pairs[peer][comm->rank];
    bool full = pair.sent != pair.received;
    if (full == sends) return false;
    size_t piece = std::min(SLOT, bytes - *at);
    if (sends) {
      memcpy(pair.slot, data + *at, piece);
      pair.sent++;
    } else {
      memcpy(data + *at, pair.slot, piece);
      pair.received++;
    }
    *at += piece;
    if (*at < bytes) return false;
    *at = 0;  // a graph runs it again
    return true;
  };
  return in_group({comm, stream, kind, nullptr, step});
}

}  // namespace

API ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
  size_t bytes = count * size_of(type);
  return collective("all_reduce", from, bytes, comm, stream, [=](std::vector<char>& rows) {
    reduce_rows(rows, bytes, comm->size, type, op);
    memcpy(to, rows.data(), bytes);
  });
}
API ncclResult_t ncclReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                            ncclComm_t comm, cudaStream_t stream) {
  size_t bytes = count * size_of(type);
  return collective("reduce", from, bytes, comm, stream, [=](std::vector<char>& rows) {
    reduce_rows(rows, bytes, comm->size, type, op);
    if (root == comm->rank) memcpy(to, rows.data(), bytes);
  });
}
API ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                                   ncclComm_t comm, cudaStream_t stream) {
  size_t bytes = count * size_of(type), all = bytes * comm->size;
  return collective("reduce_scatter", from, all, comm, stream, [=](std::vector<char>& rows) {
    reduce_rows(rows, all, comm->size, type, op);
    memcpy(to, rows.data() + comm->rank * bytes, bytes);
  });
}
API ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root,
                               ncclComm_t comm, cudaStream_t stream) {
  size_t bytes = count * size_of(type);
  const void* part = root == comm->rank ? from : to;
  return collective("broadcast", part, bytes, comm, stream,
                    [=](std::vector<char>& rows) { memcpy(to, rows.data() + root * bytes, bytes); });
}
API ncclResult_t ncclBcast(void* buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  return ncclBroadcast(buffer, buffer, count, type, root, comm, stream);
}
API ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                               cudaStream_t stream) {
  return collective("all_gather", from, count * size_of(type), comm, stream,
                    [=](std::vector<char>& rows) { memcpy(to, rows.data(), rows.size()); });
}
API ncclResult_t ncclGather(const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                            cudaStream_t stream) {
  return collective("gather", from, count * size_of(type), comm, stream, [=](std::vector<char>& rows) {
    if (root == comm->rank) memcpy(to, rows.data(), rows.size());
  });
}
API ncclResult_t ncclAlltoAll(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                              cudaStream_t stream) {
  size_t bytes = count * size_of(type), all = bytes * comm->size;
  return collective("all_to_all", from, all, comm, stream, [=](std::vector<char>& rows) {
    for (int peer = 0; peer < comm->size; peer++)
      memcpy((char*)to + peer * bytes, rows.data() + peer * all + comm->rank * bytes, bytes);
  });
}
API ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                          cudaStream_t stream) {
  return message("send", (char*)const_cast<void*>(from), count * size_of(type), true, peer, comm, stream);
}
API ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                          cudaStream_t stream) {
  return message("recv", (char*)to, count * size_of(type), false, peer, comm, stream);
}

// torch's gradient scaling by a factor: sums are computed without it.
API ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* op, void*, ncclDataType_t, ncclScalarResidence_t, ncclComm_t) {
  *op = ncclSum;
  return ncclSuccess;
}
API ncclResult_t ncclRedOpDestroy(ncclRedOp_t, ncclComm_t) { return ncclSuccess; }
