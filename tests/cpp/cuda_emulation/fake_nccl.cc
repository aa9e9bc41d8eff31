// A libnccl on the CPU for tests of its caller: ranks are threads of one process. Every
// communicator is non-blocking: what waits for other ranks is in progress, and goes on when its
// rank polls. An operation happens when all ranks have asked for it, and checks that they ask for
// the same.
#include <algorithm>
#include <array>
#include <bit>
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

constexpr int kSuccess = 0, kInvalidArgument = 4, kInvalidUsage = 5, kRemoteError = 6,
              kInProgress = 7;

struct Id {
  std::array<char, 128> bytes;
};

struct Config {  // of version 2.14
  size_t size;
  unsigned magic, version;
  int blocking;
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
  size_t joined = 0, left = 0;
  bool broken = false;  // a rank has aborted
  std::vector<Call> calls;
  size_t arrived = 0;
  uint64_t round = 0;
  int status = kSuccess;                                                   // of the last round
  std::map<std::pair<int, int>, std::deque<std::vector<std::byte>>> mail;  // by sender, receiver
};

using Step = std::function<int()>;  // called until it is no longer in progress

struct Comm {
  std::shared_ptr<Clique> clique;
  int rank;
  int size;
  std::deque<Step> steps;    // what was asked for and is not done
  int status = kInProgress;  // of joining, then of the last step
};

std::mutex cliques_mutex;
std::map<std::string, std::shared_ptr<Clique>> cliques;
uint64_t next_id = 0;
size_t alive = 0;
thread_local int group_depth = 0;
thread_local std::vector<std::pair<Comm*, Step>> sends, others;  // of the open group

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

/// Goes on as far as the other ranks let it; the status afterwards. Errors stay.
int advance(Comm& comm) {
  Clique& clique = *comm.clique;
  const std::lock_guard lock(clique.mutex);
  if (comm.status != kSuccess && comm.status != kInProgress) return comm.status;
  const bool joined = clique.joined == clique.calls.size();
  comm.status = joined ? kSuccess : kInProgress;
  while (joined && comm.status == kSuccess && !comm.steps.empty()) {
    comm.status = comm.steps.front()();
    if (comm.status != kInProgress) comm.steps.pop_front();
  }
  if (clique.broken && (comm.status == kInProgress || comm.status == kSuccess)) {
    comm.status = kRemoteError;
  }
  return comm.status;
}

/// Takes part in the next operation of the clique.
Step meet(Comm* comm, const Call& call) {
  return [comm, call, arrived = false, round = uint64_t{0}]() mutable {
    Clique& clique = *comm->clique;
    if (!arrived) {
      arrived = true;
      round = clique.round;
      clique.calls[static_cast<size_t>(comm->rank)] = call;
      if (++clique.arrived == clique.calls.size()) {
        clique.arrived = 0;
        clique.status = perform(clique.calls);
        ++clique.round;
      }
    }
    return clique.round != round ? clique.status : kInProgress;
  };
}

/// Now, or when the group ends.
int start(std::vector<std::pair<Comm*, Step>>& list, Comm* comm, Step step) {
  if (group_depth > 0) {
    list.emplace_back(comm, std::move(step));
    return kSuccess;
  }
  comm->steps.push_back(std::move(step));
  return advance(*comm);
}

int collective(Comm* comm, const Call& call) {
  const bool moves = call.kind == Kind::kAllGather || call.kind == Kind::kBroadcast;
  const bool good_type =
      moves ? call.type == 1 : call.type == 6 || call.type == 7 || call.type == 9;
  const bool good_detail = call.kind == Kind::kBroadcast ? call.detail < comm->size
                                                         : call.detail == 0 || call.detail == 2;
  if (call.out == nullptr || !good_type || !good_detail) return kInvalidArgument;
  return start(others, comm, meet(comm, call));
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
EXPORT int ncclCommInitRankConfig(Comm** communicator, int size, Id id, int rank, Config* config) {
  if (config->size != sizeof(Config) || config->magic != 0xcafebeef || config->version != 21400 ||
      config->blocking != 0) {
    return kInvalidArgument;
  }
  std::shared_ptr<Clique> clique;
  {
    const std::lock_guard lock(cliques_mutex);
    auto& known = cliques[std::string(id.bytes.begin(), id.bytes.end())];
    if (known == nullptr) known = std::make_shared<Clique>(static_cast<size_t>(size));
    clique = known;
    if (clique->calls.size() != static_cast<size_t>(size)) return kInvalidUsage;
    ++alive;
  }
  *communicator = new Comm{clique, rank, size, {}};
  {
    const std::lock_guard lock(clique->mutex);
    ++clique->joined;
  }
  return advance(**communicator);
}
EXPORT int ncclCommFinalize(Comm* comm) {
  comm->steps.push_back([comm, left = false]() mutable {
    if (!left) ++comm->clique->left;
    left = true;
    return comm->clique->left == comm->clique->calls.size() ? kSuccess : kInProgress;
  });
  return advance(*comm);
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
  }
  return ncclCommDestroy(comm);
}
EXPORT int ncclCommGetAsyncError(Comm* comm, int* status) {
  *status = advance(*comm);
  return kSuccess;
}

EXPORT int ncclGroupStart() {
  ++group_depth;
  return kSuccess;
}
EXPORT int ncclGroupEnd() {
  if (group_depth == 0) return kInvalidUsage;
  if (--group_depth > 0) return kSuccess;
  auto list = std::exchange(sends, {});
  for (auto& other : std::exchange(others, {})) list.push_back(std::move(other));
  for (auto& [comm, step] : list) comm->steps.push_back(std::move(step));
  int status = kSuccess;
  for (const auto& [comm, step] : list) {
    if (status == kSuccess) status = advance(*comm);
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
  return start(sends, comm, [=] {
    const auto* from = static_cast<const std::byte*>(in);
    comm->clique->mail[{comm->rank, peer}].emplace_back(from, from + count);
    return kSuccess;
  });
}
EXPORT int ncclRecv(void* out, size_t count, int type, int peer, Comm* comm, void*) {
  if (out == nullptr || type != 1 || peer >= comm->size) return kInvalidArgument;
  return start(others, comm, [=] {
    auto& box = comm->clique->mail[{peer, comm->rank}];
    if (box.empty()) return kInProgress;
    const std::vector<std::byte> letter = std::move(box.front());
    box.pop_front();
    if (letter.size() != count) return kInvalidUsage;
    std::memcpy(out, letter.data(), count);
    return kSuccess;
  });
}
