// NCCL, opened at run time: the module neither links it nor needs its headers.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "sagellm/cuda/dynamic_library.h"
#include "sagellm/kernels/cuda/float_type.h"

namespace sagellm::cuda {

struct NcclFunctions;

/// Names a clique of communicators. One rank makes it and hands the bytes to the others.
struct NcclId {
  std::array<char, 128> bytes{};
};

/// An opened libnccl.
class Nccl {
 public:
  /// Tries libnccl.so.2 in every folder, then where the system looks. Throws DeviceError saying
  /// what was tried and how to get the library, or which version was too old.
  explicit Nccl(const std::vector<std::string>& folders);
  Nccl(const Nccl&) = delete;
  Nccl& operator=(const Nccl&) = delete;
  ~Nccl();

  /// 10000 * major + 100 * minor + patch: 22809 for 2.28.9.
  int version() const { return version_; }
  std::string version_text() const;
  const std::string& path() const { return library_.path(); }
  const NcclFunctions& functions() const { return *functions_; }

  /// Throws CommError when NCCL finds no network interface.
  NcclId make_id() const;

 private:
  DynamicLibrary library_;
  std::unique_ptr<NcclFunctions> functions_;
  int version_ = 0;
};

enum class Reduction { kSum, kMax };

/// One rank of a clique, on the device that was current when it joined. Calls queue work on a
/// stream and return; they must come in the same order on every rank. Not thread-safe. Throws
/// CommError with NCCL's reason. In a recorded stream the calls become part of the graph.
///
/// NCCL's host side may have to wait for other ranks: to join, to connect to them at the first
/// operations, to leave. It does so in the background, and a call that is not through after the
/// timeout cancels the communicator and throws CommError.
class Communicator {
 public:
  using Seconds = std::chrono::duration<double>;
  static constexpr Seconds kTimeout{300.0};

  /// Joins; returns when `size` ranks of the same id have. Ranks of one process need a thread each.
  Communicator(std::shared_ptr<const Nccl> library, const NcclId& id, int rank, int size,
               Seconds timeout = kTimeout);
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  /// Cancels, unless `finish` or `cancel` came before.
  ~Communicator();

  int rank() const { return rank_; }
  int size() const { return size_; }

  // Memory of the device; `in` may be `out` where both have the same length.

  /// Element by element over the ranks, [count] to [count].
  void all_reduce(const void* in, void* out, size_t count, kernels::cuda::FloatType type,
                  Reduction reduction, void* stream);
  /// The same, of which rank r keeps part r: [size * count] to [count].
  void reduce_scatter(const void* in, void* out, size_t count, kernels::cuda::FloatType type,
                      Reduction reduction, void* stream);
  /// The parts of all ranks in their order: [bytes] to [size * bytes].
  void all_gather(const void* in, void* out, size_t bytes, void* stream);
  /// From `root`'s `in` to every `out`; `in` counts on `root` only.
  void broadcast(const void* in, void* out, size_t bytes, int root, void* stream);
  void send(const void* in, size_t bytes, int to, void* stream);
  void receive(void* out, size_t bytes, int from, void* stream);
  /// What `work` calls on this communicator starts as one operation, such as sends and receives
  /// that wait for each other. When `work` throws, the exception passes; what was called before it
  /// may have started.
  void group(const std::function<void()>& work);

  /// Why queued work cannot complete, such as a rank that is gone; empty while all is well. Who
  /// waits for a stream with such work asks now and then, and cancels.
  std::string async_error() const;
  /// Waits for queued work of all ranks and leaves; every rank must call it.
  void finish();
  /// Ends queued work where it stands and leaves, without the other ranks.
  void cancel();

 private:
  /// The communicator; throws InvalidArgument after finish or cancel.
  void* handle() const;
  void check_peer(int peer, const char* name) const;
  /// The status of a call once NCCL is through with it, or that it still is not.
  int settled(int status) const;
  /// Throws unless the call of this status succeeds in time.
  void check(int status, std::string_view call);
  void abandon() noexcept;

  std::shared_ptr<const Nccl> library_;
  void* handle_ = nullptr;
  int rank_;
  int size_;
  Seconds timeout_;
};

}  // namespace sagellm::cuda
