#include "sagellm/model/phase_timer.h"

#include <chrono>

namespace sagellm::model {

namespace {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void give(PhaseTimer::ThreadTimes& times, Phase phase, int64_t now) {
  times.ns[static_cast<size_t>(phase)] += now - times.last;
  times.last = now;
}

}  // namespace

std::string_view phase_name(Phase phase) {
  switch (phase) {
    case Phase::kPrepare:
      return "prepare";
    case Phase::kEmbed:
      return "embed";
    case Phase::kNormEncode:
      return "norm_encode";
    case Phase::kQkv:
      return "qkv";
    case Phase::kAttention:
      return "attention";
    case Phase::kMerge:
      return "merge";
    case Phase::kOutput:
      return "output";
    case Phase::kGateUp:
      return "gate_up";
    case Phase::kDown:
      return "down";
    case Phase::kHead:
      return "head";
    case Phase::kSample:
      return "sample";
    case Phase::kWait:
      return "wait";
  }
  return "";
}

void PhaseTimer::enable(bool enabled) {
  enabled_ = enabled;
  num_steps_ = 0;
  step_ns_ = 0;
  threads_.assign(threads_.size(), ThreadTimes{});
}

void PhaseTimer::begin() {
  begun_ = now_ns();
  for (ThreadTimes& times : threads_) times.last = begun_;
}

void PhaseTimer::end() {
  const int64_t now = now_ns();
  for (ThreadTimes& times : threads_) give(times, Phase::kWait, now);
  step_ns_ += now - begun_;
  ++num_steps_;
}

void PhaseTimer::record(int thread, Phase phase) {
  give(threads_[static_cast<size_t>(thread)], phase, now_ns());
}

}  // namespace sagellm::model
