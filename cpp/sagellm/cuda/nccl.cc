#include "sagellm/cuda/nccl.h"

#include <string_view>
#include <thread>
#include <utility>

#include "sagellm/base/error.h"

namespace sagellm::cuda {

namespace {

using kernels::cuda::FloatType;

// The numbers of NCCL's enumerations, the same in every version 2.
enum Status : int { kSuccess = 0, kInProgress = 7 };
enum DataType : int { kUint8 = 1, kFloat16 = 6, kFloat32 = 7, kBfloat16 = 9 };
enum Operation : int { kOperationSum = 0, kOperationMax = 2 };

constexpr int kOldest = 21800;  // 2.18, the first for CUDA 12.1
constexpr std::array<const char*, 1> kNames{"libnccl.so.2"};
constexpr Communicator::Seconds kLongest{1e6};
constexpr int kQuickPolls = 1000;  // most calls are through within microseconds
constexpr std::chrono::milliseconds kPollPause{1};
constexpr const char* kRemedy = "pip install 'sagellm[nccl]', or install the system's libnccl2";

DataType data_type(FloatType type) {
  switch (type) {
    case FloatType::kBF16:
      return kBfloat16;
    case FloatType::kF16:
      return kFloat16;
    case FloatType::kF32:
      break;
  }
  return kFloat32;
}

Operation operation(Reduction reduction) {
  return reduction == Reduction::kMax ? kOperationMax : kOperationSum;
}

/// ncclConfig_t as it was in 2.14, the first: newer versions give later fields their defaults.
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = 21400;
  int blocking = 0;
};

}  // namespace

struct NcclFunctions {
  int (*get_version)(int* version);
  const char* (*error_string)(int status);
  const char* (*last_error)(void* communicator);
  int (*get_unique_id)(NcclId* id);
  int (*init_rank)(void** communicator, int size, NcclId id, int rank, Config* config);
  int (*finalize)(void* communicator);
  int (*destroy)(void* communicator);
  int (*comm_abort)(void* communicator);
  int (*async_error)(void* communicator, int* status);
  int (*group_start)();
  int (*group_end)();
  int (*all_reduce)(const void* in, void* out, size_t count, int type, int operation,
                    void* communicator, void* stream);
  int (*reduce_scatter)(const void* in, void* out, size_t count, int type, int operation,
                        void* communicator, void* stream);
  int (*all_gather)(const void* in, void* out, size_t count, int type, void* communicator,
                    void* stream);
  int (*broadcast)(const void* in, void* out, size_t count, int type, int root, void* communicator,
                   void* stream);
  int (*send)(const void* in, size_t count, int type, int peer, void* communicator, void* stream);
  int (*receive)(void* out, size_t count, int type, int peer, void* communicator, void* stream);

  void check(int status, std::string_view call) const {
    if (status == kSuccess) [[likely]] {
      return;
    }
    const std::string_view detail = last_error(nullptr);
    fail<CommError>(call, ": ", error_string(status), " (NCCL status ", status, ")",
                    detail.empty() ? "" : ": ", detail);
  }
};

Nccl::Nccl(const std::vector<std::string>& folders)
    : library_(folders, kNames, "NCCL", kRemedy), functions_(std::make_unique<NcclFunctions>()) {
  NcclFunctions& f = *functions_;
  library_.find("ncclGetVersion", f.get_version);
  library_.find("ncclGetErrorString", f.error_string);
  require<DeviceError>(f.get_version(&version_) == kSuccess && version_ >= kOldest, path(),
                       " is version ", version_text(), ", older than 2.18; ", kRemedy);
  library_.find("ncclGetLastError", f.last_error);
  library_.find("ncclGetUniqueId", f.get_unique_id);
  library_.find("ncclCommInitRankConfig", f.init_rank);
  library_.find("ncclCommFinalize", f.finalize);
  library_.find("ncclCommDestroy", f.destroy);
  library_.find("ncclCommAbort", f.comm_abort);
  library_.find("ncclCommGetAsyncError", f.async_error);
  library_.find("ncclGroupStart", f.group_start);
  library_.find("ncclGroupEnd", f.group_end);
  library_.find("ncclAllReduce", f.all_reduce);
  library_.find("ncclReduceScatter", f.reduce_scatter);
  library_.find("ncclAllGather", f.all_gather);
  library_.find("ncclBroadcast", f.broadcast);
  library_.find("ncclSend", f.send);
  library_.find("ncclRecv", f.receive);
}

Nccl::~Nccl() = default;

std::string Nccl::version_text() const {
  return detail::concat(version_ / 10000, ".", version_ / 100 % 100, ".", version_ % 100);
}

NcclId Nccl::make_id() const {
  NcclId id;
  functions_->check(functions_->get_unique_id(&id), "ncclGetUniqueId");
  return id;
}

Communicator::Communicator(std::shared_ptr<const Nccl> library, const NcclId& id, int rank,
                           int size, Seconds timeout)
    : library_(std::move(library)), rank_(rank), size_(size), timeout_(timeout) {
  require<InvalidArgument>(size >= 1 && rank >= 0 && rank < size, "rank ", rank, " of ", size,
                           " ranks; it must be at least 0 and less than their number");
  require<InvalidArgument>(timeout.count() > 0 && timeout <= kLongest, "the timeout is ",
                           timeout.count(), " s; it must be above 0 and at most ",
                           kLongest.count());
  Config config;
  try {
    check(library_->functions().init_rank(&handle_, size, id, rank, &config),
          "ncclCommInitRankConfig");
  } catch (...) {
    abandon();
    throw;
  }
}

Communicator::~Communicator() { abandon(); }

void Communicator::abandon() noexcept {
  if (handle_ != nullptr) {
    (void)library_->functions().comm_abort(std::exchange(handle_, nullptr));
  }
}

int Communicator::settled(int status) const {
  const auto end = std::chrono::steady_clock::now() + timeout_;
  for (int polls = 0; status == kInProgress && std::chrono::steady_clock::now() < end; ++polls) {
    if (polls < kQuickPolls) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kPollPause);
    }
    const int asked = library_->functions().async_error(handle(), &status);
    if (asked != kSuccess) return asked;
  }
  return status;
}

void Communicator::check(int status, std::string_view call) {
  status = settled(status);
  if (status == kInProgress) [[unlikely]] {
    abandon();
    fail<CommError>(call, ": rank ", rank_, " of ", size_, " waited ", timeout_.count(),
                    " s for the other ranks; start every rank with the same id, let them reach "
                    "each other (NCCL_DEBUG=INFO tells what each does, NCCL_SOCKET_IFNAME chooses "
                    "the network interface), or raise timeout_s");
  }
  library_->functions().check(status, call);
}

void* Communicator::handle() const {
  require<InvalidArgument>(handle_ != nullptr, "this communicator has ended");
  return handle_;
}

void Communicator::check_peer(int peer, const char* name) const {
  require<InvalidArgument>(peer >= 0 && peer < size_, name, " is ", peer, "; there are ", size_,
                           " ranks");
}

void Communicator::all_reduce(const void* in, void* out, size_t count, FloatType type,
                              Reduction reduction, void* stream) {
  const NcclFunctions& f = library_->functions();
  check(f.all_reduce(in, out, count, data_type(type), operation(reduction), handle(), stream),
        "ncclAllReduce");
}

void Communicator::reduce_scatter(const void* in, void* out, size_t count, FloatType type,
                                  Reduction reduction, void* stream) {
  const NcclFunctions& f = library_->functions();
  check(f.reduce_scatter(in, out, count, data_type(type), operation(reduction), handle(), stream),
        "ncclReduceScatter");
}

void Communicator::all_gather(const void* in, void* out, size_t bytes, void* stream) {
  const NcclFunctions& f = library_->functions();
  check(f.all_gather(in, out, bytes, kUint8, handle(), stream), "ncclAllGather");
}

void Communicator::broadcast(const void* in, void* out, size_t bytes, int root, void* stream) {
  check_peer(root, "root");
  const NcclFunctions& f = library_->functions();
  check(f.broadcast(in, out, bytes, kUint8, root, handle(), stream), "ncclBroadcast");
}

void Communicator::send(const void* in, size_t bytes, int to, void* stream) {
  check_peer(to, "the receiver");
  const NcclFunctions& f = library_->functions();
  check(f.send(in, bytes, kUint8, to, handle(), stream), "ncclSend");
}

void Communicator::receive(void* out, size_t bytes, int from, void* stream) {
  check_peer(from, "the sender");
  const NcclFunctions& f = library_->functions();
  check(f.receive(out, bytes, kUint8, from, handle(), stream), "ncclRecv");
}

void Communicator::group(const std::function<void()>& work) {
  const NcclFunctions& f = library_->functions();
  (void)handle();
  f.check(f.group_start(), "ncclGroupStart");
  try {
    work();
  } catch (...) {
    (void)settled(f.group_end());  // the first error is the one to know
    throw;
  }
  check(f.group_end(), "ncclGroupEnd");
}

std::string Communicator::async_error() const {
  const NcclFunctions& f = library_->functions();
  int status = kSuccess;
  f.check(f.async_error(handle(), &status), "ncclCommGetAsyncError");
  return status == kSuccess || status == kInProgress ? "" : f.error_string(status);
}

void Communicator::finish() {
  const NcclFunctions& f = library_->functions();
  check(f.finalize(handle()), "ncclCommFinalize");
  f.check(f.destroy(std::exchange(handle_, nullptr)), "ncclCommDestroy");
}

void Communicator::cancel() {
  const NcclFunctions& f = library_->functions();
  void* ending = handle();
  handle_ = nullptr;
  f.check(f.comm_abort(ending), "ncclCommAbort");
}

}  // namespace sagellm::cuda
