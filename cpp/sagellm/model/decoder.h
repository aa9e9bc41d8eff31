// The dense decoder family (Llama, Qwen2, Qwen3, Gemma 2/3) over a paged KV cache: one call per
// engine step.
//
// A step runs as phases on the thread pool, separated by barriers, five per layer at batch 1:
//   norm + encode, QKV (+ bias, q/k norm, RoPE, KV write by the owner of the head)      | barrier
//   attention over (tile, kv head, split)                                               | barrier
//   merge states + encode, output projection                                            | barrier
//   residual, norm + encode, gate and up with the activation in the same rows           | barrier
//   encode, down projection                                                             | barrier
// Row-wise work (norm, encode) is done by every thread for itself while a step has few tokens, and
// is shared out by token, at the price of one more barrier, when it has many.
//
// Logits depend on the tokens of their own sequence only, bitwise: every output element is one
// fixed chain of additions, whatever the batch, the chunking and the number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sagellm/kernels/params.h"
#include "sagellm/kv/kv_storage.h"
#include "sagellm/model/activation_buffer.h"
#include "sagellm/model/attention_plan.h"
#include "sagellm/model/config.h"
#include "sagellm/model/forward_batch.h"
#include "sagellm/model/head_plan.h"
#include "sagellm/model/phase_timer.h"
#include "sagellm/model/rope_tables.h"
#include "sagellm/model/weights.h"
#include "sagellm/runtime/thread_pool.h"
#include "sagellm/sample/sampler.h"

namespace sagellm::model {

struct DecoderOptions {
  int32_t num_threads = 1;
  int32_t max_batch_tokens = 512;  // tokens of one step
  Precision precision = Precision::kA8;
  std::string isa;  // empty: the best this machine has (or SAGELLM_CPU_ISA)
};

/// Where the results of a step go. Each has one row per logit row.
struct StepOutputs {
  std::span<sample::Result> sampled = {};  // as long as the sampling rules
  float* logits = nullptr;                 // [R, vocab_size], nullable
  float* hidden = nullptr;                 // [R, hidden_size] after the final norm, nullable
};

class Decoder {
 public:
  /// Loads the weights; throws what ModelConfig::validate and Weights throw.
  Decoder(ModelConfig config, const TensorSources& sources, const DecoderOptions& options);

  /// Gives the model its KV pages; must match the config's heads, slots and groups.
  void attach_kv(std::shared_ptr<kv::KvStorage> storage);

  /// Runs one step. `sampling` is empty or has one entry per logit row. Throws InvalidArgument
  /// before touching any state when the batch is malformed. Not re-entrant.
  ///
  /// When every row may choose from an allowed set only and nobody asks for logits or
  /// log-probabilities, the row blocks of the output head without an allowed token are left out;
  /// the choice is the same. (What is not computed is not checked to be finite either.)
  void step(const ForwardBatch& batch, std::span<const sample::RowParams> sampling,
            const StepOutputs& outputs);

  const ModelConfig& config() const { return config_; }
  const Weights& weights() const { return weights_; }
  const kernels::KernelTable& kernels() const { return table_; }
  int32_t num_threads() const { return pool_.size(); }
  size_t workspace_bytes() const;
  /// Row blocks of the output head that the last step computed.
  int64_t last_head_blocks() const { return head_plan_.num_blocks(); }
  /// Off at first; to be enabled and read between steps.
  PhaseTimer& phase_timer() { return phase_timer_; }

 private:
  struct StepState;  // what the phases of one step share
  struct Units {     // work of a phase, handed out at most `max_chunk` at a time
    int64_t total;
    int64_t max_chunk;
  };

  void validate(const ForwardBatch& batch) const;
  void prepare(const ForwardBatch& batch);
  void run_step(StepState& step, int thread);
  void embed(StepState& step, int thread, int& phase);
  void attention_block(StepState& step, int layer, int thread, int& phase);
  void feed_forward(StepState& step, int layer, int thread, int& phase);
  void output_head(StepState& step, int thread, int& phase);
  void choose(StepState& step, int64_t row, float* logits, sample::Scratch& scratch);

  /// Calls body(token) for the tokens this thread must prepare: all of them (private copies) in a
  /// small step, its share otherwise, followed by a barrier. The time is `kind`'s.
  template <typename Body>
  void for_tokens(const StepState& step, Phase kind, int thread, int64_t count, int& phase,
                  const Body& body);
  /// Shares the units of a phase among the threads, then meets them at a barrier.
  template <typename Body>
  void for_units(const Units& units, Phase kind, int thread, int& phase, const Body& body);
  static Units units(const quant::PackedMatrix& matrix);

  /// One unit of a step's attention: an item of the plan for one kv head. `next` is the unit that
  /// this thread probably computes then, -1 if none.
  void attention_unit(StepState& step, const LayerConfig& place, const AttentionPlan& plan,
                      int64_t unit, int64_t next, int thread);
  void qkv_unit(StepState& step, int layer, int64_t unit, const kernels::Activations& x);
  void finish_projection(const quant::PackedMatrix& matrix, const float* bias, const float* norm,
                         bool rotate, int layer, int64_t first_row, const kernels::Activations& x,
                         float* out, int64_t num_tokens);
  void matmul(const quant::PackedMatrix& matrix, int64_t block_begin, int64_t block_end,
              const kernels::Activations& x, int64_t num_tokens, float* out,
              int64_t out_stride) const;
  void add_projection(float* x, const float* projection, const std::vector<float>& post_norm,
                      float* scratch) const;
  ActKinds kinds(std::initializer_list<const quant::PackedMatrix*> matrices) const;
  ActKinds all_kinds() const;

  const ModelConfig config_;
  const DecoderOptions options_;
  const kernels::KernelTable& table_;
  runtime::ThreadPool pool_;
  Weights weights_;
  runtime::WorkQueue queue_;
  PhaseTimer phase_timer_;
  std::shared_ptr<kv::KvStorage> kv_;

  // Workspace. Arrays of `rows_` rows have a private copy of the first rows per thread in a small
  // step.
  int64_t rows_;
  int64_t hidden_stride_;  // padded to whole row blocks, as are the others
  int64_t qkv_stride_;
  int64_t ffn_stride_;
  int64_t vocab_stride_;
  Buffer residual_, projection_, qkv_, gate_, up_, logits_, norm_scratch_;
  RopeTables rope_tables_;
  ActivationBuffer hidden_in_, attention_in_, ffn_in_;
  std::vector<AttentionPlan> plans_;  // one per distinct window
  std::vector<int32_t> plan_of_layer_;
  std::vector<float> state_m_, state_l_, state_acc_;
  Buffer attention_scratch_;
  std::vector<sample::Scratch> sample_scratch_;  // one per thread
  HeadPlan head_plan_;
};

}  // namespace sagellm::model
