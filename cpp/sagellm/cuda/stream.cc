#include "sagellm/cuda/stream.h"

#include <utility>

#include "sagellm/cuda/check.h"

namespace sagellm::cuda {

namespace {

cudaEvent_t native_event(void* event) { return static_cast<cudaEvent_t>(event); }
cudaGraphExec_t native_graph(void* graph) { return static_cast<cudaGraphExec_t>(graph); }

}  // namespace

void synchronize(void* stream) {
  check(cudaStreamSynchronize(native(stream)), "cudaStreamSynchronize");
}

Stream::Stream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  handle_ = stream;
}

Stream::~Stream() { (void)cudaStreamDestroy(native(handle_)); }

Event::Event(bool timed) {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, timed ? 0 : cudaEventDisableTiming),
        "cudaEventCreateWithFlags");
  handle_ = event;
}

Event::~Event() { (void)cudaEventDestroy(native_event(handle_)); }

void Event::record(const Stream& stream) {
  check(cudaEventRecord(native_event(handle_), native(stream.get())), "cudaEventRecord");
}

bool Event::done() const {
  const cudaError_t error = cudaEventQuery(native_event(handle_));
  if (error == cudaErrorNotReady) {
    (void)cudaGetLastError();
    return false;
  }
  check(error, "cudaEventQuery");
  return true;
}

void Event::synchronize() const {
  check(cudaEventSynchronize(native_event(handle_)), "cudaEventSynchronize");
}

void Event::block(const Stream& stream) const {
  check(cudaStreamWaitEvent(native(stream.get()), native_event(handle_), 0), "cudaStreamWaitEvent");
}

float Event::elapsed_ms(const Event& start, const Event& end) {
  float milliseconds = 0.0f;
  check(cudaEventElapsedTime(&milliseconds, native_event(start.handle_), native_event(end.handle_)),
        "cudaEventElapsedTime");
  return milliseconds;
}

Graph::Graph(const Stream& stream, const std::function<void()>& work) {
  check(cudaStreamBeginCapture(native(stream.get()), cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  try {
    work();
  } catch (...) {
    (void)cudaStreamEndCapture(native(stream.get()), &graph);
    if (graph != nullptr) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(native(stream.get()), &graph), "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  (void)cudaGraphDestroy(graph);
  check(error, "cudaGraphInstantiate");
  executable_ = executable;
}

Graph::Graph(Graph&& other) noexcept : executable_(std::exchange(other.executable_, nullptr)) {}

Graph& Graph::operator=(Graph&& other) noexcept {
  std::swap(executable_, other.executable_);
  return *this;
}

Graph::~Graph() {
  if (executable_ != nullptr) (void)cudaGraphExecDestroy(native_graph(executable_));
}

void Graph::launch(const Stream& stream) const {
  check(cudaGraphLaunch(native_graph(executable_), native(stream.get())), "cudaGraphLaunch");
}

}  // namespace sagellm::cuda
