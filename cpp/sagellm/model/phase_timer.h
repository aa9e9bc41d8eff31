// Where the time of a decoder step goes, by thread and phase. Off unless asked: then a phase costs
// a branch.
//
// A thread's time is cut by laps: `lap` gives everything since the thread's last lap to one phase.
// So the phases of every thread add up to the wall time of the steps, waiting included.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace sagellm::model {

enum class Phase : uint8_t {
  kPrepare,     // checks, attention plan, head plan: thread 0, while the others wait
  kEmbed,       // embedding rows, RoPE angles
  kNormEncode,  // residual, norms, quantization of a phase's input
  kQkv,         // projections, bias, q/k norm, RoPE, KV write
  kAttention,
  kMerge,   // split states to one, quantization for the output projection
  kOutput,  // output projection of attention
  kGateUp,  // with the activation
  kDown,
  kHead,
  kSample,
  kWait,  // barriers, and the wake-up of the team
};
inline constexpr size_t kNumPhases = 12;

std::string_view phase_name(Phase phase);

class PhaseTimer {
 public:
  struct alignas(64) ThreadTimes {
    int64_t last = 0;  // ns of the steady clock
    std::array<int64_t, kNumPhases> ns{};
  };

  explicit PhaseTimer(int num_threads) : threads_(static_cast<size_t>(num_threads)) {}

  /// Starts from zero, or stops. Between steps only.
  void enable(bool enabled);

  /// Thread 0 before the team starts, and after it has come together.
  void begin_step() {
    if (enabled_) begin();
  }
  void end_step() {
    if (enabled_) end();
  }
  /// What `thread` did since its last lap was `phase`.
  void lap(int thread, Phase phase) {
    if (enabled_) record(thread, phase);
  }

  int64_t num_steps() const { return num_steps_; }
  int64_t step_ns() const { return step_ns_; }
  const std::vector<ThreadTimes>& threads() const { return threads_; }

 private:
  void begin();
  void end();
  void record(int thread, Phase phase);

  bool enabled_ = false;
  int64_t num_steps_ = 0;
  int64_t step_ns_ = 0;
  int64_t begun_ = 0;
  std::vector<ThreadTimes> threads_;
};

}  // namespace sagellm::model
