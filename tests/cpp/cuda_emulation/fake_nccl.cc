// A libnccl on the CPU for tests of its caller: ranks are threads of one process, operations happen
// at once and check that all ranks ask for the same.
#include <algorithm>
#include <array>
#include <bit>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace {

constexpr int kSuccess = 0, kInvalidArgument = 4, kInvalidUsage = 5, kRemoteError = 6;

struct Id {
  std::array<char, 128> bytes;
};

enum class Kind { kAllReduce, kReduceScatter, kAllGather, kBroadcast };

/// What a rank asks for; everything but the pointers must be equal on all ranks.
struct Call {
  Kind kind;
  const void* in;
  void* out;
  size_t count;
  int type;
  int detail;  // operation or root
  auto key() const { return std::tuple(kind, count, type, detail); }
};

/// Ranks that joined with the same id.
struct Clique {
  explicit Clique(size_t size) : calls(size) {}

  std::mutex mutex;
  std::condition_variable changed;
  size_t joined = 0, left = 0;
  bool broken = false;  // a rank has aborted
  std::vector<Call> calls;
  size_t arrived = 0;
  uint64_t round = 0;
  int status = kSuccess;                                                   // of the last round
  std::map<std::pair<int, int>, std::deque<std::vector<std::byte>>> mail;  // by sender, receiver
};

struct Comm {
  std::shared_ptr<Clique> clique;
  int rank;
  int size;
};

std::mutex cliques_mutex;
std::map<std::string, std::shared_ptr<Clique>> cliques;
uint64_t next_id = 0;
size_t alive = 0;
thread_local int group_depth = 0;
thread_local std::vector<std::function<int()>> sends, others;  // of the open group

size_t bytes_of(int type) { return type == 7 ? 4 : type == 6 || type == 9 ? 2 : 1; }

float load(const void* memory, int type, size_t index) {
  if (type == 7) return static_cast<const float*>(memory)[index];
  const uint16_t bits = static_cast<const uint16_t*>(memory)[index];
  return type == 6 ? static_cast<float>(std::bit_cast<_Float16>(bits))
                   : std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

void store(std::byte* memory, int type, size_t index, float value) {
  const auto put = [&](auto bits) {
    std::memcpy(memory + index * sizeof bits, &bits, sizeof bits);
  };
  const auto wide = std::bit_cast<uint32_t>(value);
  if (type == 7) return put(value);
  if (type == 6) return put(static_cast<_Float16>(value));
  put(static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16));
}

/// Does what all ranks have asked for. Results go through copies, because `in` may be `out`.
int perform(const std::vector<Call>& calls) {
  const Call& first = calls[0];
  for (const Call& call : calls) {
    if (call.key() != first.key()) return kInvalidUsage;
  }
  const size_t element = bytes_of(first.type), ranks = calls.size();
  std::vector<std::byte> whole;
  if (first.kind == Kind::kBroadcast) {
    const auto* from = static_cast<const std::byte*>(calls[static_cast<size_t>(first.detail)].in);
    whole.assign(from, from + first.count * element);
  } else if (first.kind == Kind::kAllGather) {
    for (const Call& call : calls) {
      const auto* from = static_cast<const std::byte*>(call.in);
      whole.insert(whole.end(), from, from + first.count * element);
    }
  } else {
    const size_t count = first.count * (first.kind == Kind::kReduceScatter ? ranks : 1);
    whole.resize(count * element);
    for (size_t i = 0; i < count; ++i) {
      float value = load(first.in, first.type, i);
      for (size_t r = 1; r < ranks; ++r) {
        const float other = load(calls[r].in, first.type, i);
        value = first.detail == 0 ? value + other : std::max(value, other);
      }
      store(whole.data(), first.type, i, value);
    }
  }
  const bool scattered = first.kind == Kind::kReduceScatter;
  for (size_t r = 0; r < ranks; ++r) {
    const size_t bytes = scattered ? first.count * element : whole.size();
    std::memcpy(calls[r].out, whole.data() + (scattered ? r * bytes : 0), bytes);
  }
  return kSuccess;
}

int meet(const Comm& comm, const Call& call) {
  Clique& clique = *comm.clique;
  std::unique_lock lock(clique.mutex);
  if (clique.broken) return kRemoteError;
  clique.calls[static_cast<size_t>(comm.rank)] = call;
  const uint64_t round = clique.round;
  if (++clique.arrived == clique.calls.size()) {
    clique.arrived = 0;
    clique.status = perform(clique.calls);
    ++clique.round;
    clique.changed.notify_all();
  }
  clique.changed.wait(lock, [&] { return clique.round != round || clique.broken; });
  return clique.round != round ? clique.status : kRemoteError;
}

/// Now, or when the group ends.
int start(std::vector<std::function<int()>>& list, std::function<int()> work) {
  if (group_depth == 0) return work();
  list.push_back(std::move(work));
  return kSuccess;
}

int collective(Comm* comm, const Call& call) {
  const bool moves = call.kind == Kind::kAllGather || call.kind == Kind::kBroadcast;
  const bool good_type =
      moves ? call.type == 1 : call.type == 6 || call.type == 7 || call.type == 9;
  const bool good_detail = call.kind == Kind::kBroadcast ? call.detail < comm->size
                                                         : call.detail == 0 || call.detail == 2;
  if (call.out == nullptr || !good_type || !good_detail) return kInvalidArgument;
  return start(others, [comm, call] { return meet(*comm, call); });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int ncclGetVersion(int* version) {
  *version = 22809;
  return kSuccess;
}
EXPORT const char* ncclGetErrorString(int status) {
  return status == kInvalidArgument ? "invalid argument"
         : status == kInvalidUsage  ? "invalid usage"
         : status == kRemoteError   ? "remote process exited or there was a network error"
                                    : "no error";
}
EXPORT const char* ncclGetLastError(void*) { return "fake"; }
/// For tests: communicators that were neither destroyed nor aborted.
EXPORT size_t fake_nccl_alive() {
  const std::lock_guard lock(cliques_mutex);
  return alive;
}

EXPORT int ncclGetUniqueId(Id* id) {
  const std::lock_guard lock(cliques_mutex);
  id->bytes.fill('i');
  std::memcpy(id->bytes.data(), &++next_id, sizeof next_id);
  return kSuccess;
}
EXPORT int ncclCommInitRank(void** communicator, int size, Id id, int rank) {
  std::shared_ptr<Clique> clique;
  {
    const std::lock_guard lock(cliques_mutex);
    auto& known = cliques[std::string(id.bytes.begin(), id.bytes.end())];
    if (known == nullptr) known = std::make_shared<Clique>(static_cast<size_t>(size));
    clique = known;
    if (clique->calls.size() != static_cast<size_t>(size)) return kInvalidUsage;
    ++alive;
  }
  std::unique_lock lock(clique->mutex);
  ++clique->joined;
  clique->changed.notify_all();
  clique->changed.wait(lock, [&] { return clique->joined == static_cast<size_t>(size); });
  *communicator = new Comm{clique, rank, size};
  return kSuccess;
}
EXPORT int ncclCommFinalize(Comm* comm) {
  Clique& clique = *comm->clique;
  std::unique_lock lock(clique.mutex);
  ++clique.left;
  clique.changed.notify_all();
  clique.changed.wait(lock, [&] { return clique.left == clique.calls.size() || clique.broken; });
  return clique.broken ? kRemoteError : kSuccess;
}
EXPORT int ncclCommDestroy(Comm* comm) {
  const std::lock_guard lock(cliques_mutex);
  delete comm;
  --alive;
  return kSuccess;
}
EXPORT int ncclCommAbort(Comm* comm) {
  {
    const std::lock_guard lock(comm->clique->mutex);
    comm->clique->broken = true;
    comm->clique->changed.notify_all();
  }
  return ncclCommDestroy(comm);
}
EXPORT int ncclCommGetAsyncError(Comm* comm, int* status) {
  const std::lock_guard lock(comm->clique->mutex);
  *status = comm->clique->broken ? kRemoteError : kSuccess;
  return kSuccess;
}

EXPORT int ncclGroupStart() {
  ++group_depth;
  return kSuccess;
}
EXPORT int ncclGroupEnd() {
  if (group_depth == 0) return kInvalidUsage;
  if (--group_depth > 0) return kSuccess;
  const auto first = std::exchange(sends, {}), second = std::exchange(others, {});
  int status = kSuccess;
  for (const auto* list : {&first, &second}) {
    for (const auto& work : *list) {
      if (status == kSuccess) status = work();
    }
  }
  return status;
}

EXPORT int ncclAllReduce(const void* in, void* out, size_t count, int type, int operation,
                         Comm* comm, void*) {
  return collective(comm, {Kind::kAllReduce, in, out, count, type, operation});
}
EXPORT int ncclReduceScatter(const void* in, void* out, size_t count, int type, int operation,
                             Comm* comm, void*) {
  return collective(comm, {Kind::kReduceScatter, in, out, count, type, operation});
}
EXPORT int ncclAllGather(const void* in, void* out, size_t count, int type, Comm* comm, void*) {
  return collective(comm, {Kind::kAllGather, in, out, count, type, 0});
}
EXPORT int ncclBroadcast(const void* in, void* out, size_t count, int type, int root, Comm* comm,
                         void*) {
  return collective(comm, {Kind::kBroadcast, in, out, count, type, root});
}
EXPORT int ncclSend(const void* in, size_t count, int type, int peer, Comm* comm, void*) {
  if (in == nullptr || type != 1 || peer >= comm->size) return kInvalidArgument;
  return start(sends, [=] {
    Clique& clique = *comm->clique;
    const auto* from = static_cast<const std::byte*>(in);
    const std::lock_guard lock(clique.mutex);
    clique.mail[{comm->rank, peer}].emplace_back(from, from + count);
    clique.changed.notify_all();
    return clique.broken ? kRemoteError : kSuccess;
  });
}
EXPORT int ncclRecv(void* out, size_t count, int type, int peer, Comm* comm, void*) {
  if (out == nullptr || type != 1 || peer >= comm->size) return kInvalidArgument;
  return start(others, [=] {
    Clique& clique = *comm->clique;
    std::unique_lock lock(clique.mutex);
    auto& box = clique.mail[{peer, comm->rank}];
    clique.changed.wait(lock, [&] { return !box.empty() || clique.broken; });
    if (box.empty()) return kRemoteError;
    const std::vector<std::byte> letter = std::move(box.front());
    box.pop_front();
    if (letter.size() != count) return kInvalidUsage;
    std::memcpy(out, letter.data(), count);
    return kSuccess;
  });
}
