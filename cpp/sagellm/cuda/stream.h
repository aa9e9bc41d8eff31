// Queues of a CUDA device, marks in them, and recordings of them.
#pragma once

#include <functional>

namespace sagellm::cuda {

/// Waits for all work queued on `stream`; throws DeviceError when some of it failed. Null is the
/// default stream of the current device.
void synchronize(void* stream);

/// A queue of the current device, independent of the legacy default stream. `get()` is what launch
/// functions take.
class Stream {
 public:
  Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream();

  void* get() const { return handle_; }
  void synchronize() const { cuda::synchronize(handle_); }

 private:
  void* handle_ = nullptr;
};

/// A mark in a stream.
class Event {
 public:
  /// `timed`: for elapsed_ms.
  explicit Event(bool timed = false);
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event();

  void record(const Stream& stream);
  /// Whether the work before the mark is done; a mark never recorded is.
  bool done() const;
  void synchronize() const;
  /// Work queued on `stream` from now on waits for the mark.
  void block(const Stream& stream) const;
  /// Milliseconds between two timed marks that are done.
  static float elapsed_ms(const Event& start, const Event& end);

 private:
  void* handle_ = nullptr;
};

/// Work of a stream, recorded once and queued again as a whole.
class Graph {
 public:
  Graph() = default;
  /// Records what `work` queues on `stream`; `work` must not synchronize or allocate. When it
  /// throws, the recording ends and the exception passes.
  Graph(const Stream& stream, const std::function<void()>& work);
  Graph(Graph&& other) noexcept;
  Graph& operator=(Graph&& other) noexcept;
  ~Graph();

  explicit operator bool() const { return executable_ != nullptr; }
  void launch(const Stream& stream) const;

 private:
  void* executable_ = nullptr;
};

}  // namespace sagellm::cuda
