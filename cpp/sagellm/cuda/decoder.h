// The dense decoder family (Llama, Qwen2, Qwen3, Gemma 2/3) on a CUDA device, with the contract of
// model::Decoder: one call per engine step, or two: `launch` queues a step and `wait` takes the
// result of the oldest, so that the host prepares one while the device works on another.
//
// A step is one upload of all its metadata from pinned memory, launches on one stream, and one
// small download. Decode steps (one token of every sequence) are padded to the next of a few
// shapes, and their launches are recorded when a shape comes a second time, then replayed as a
// graph.
//
// forward.h has the launches of the model, layer_attention.h the plans of its attention, sampler.h
// the choice of tokens.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "sagellm/cuda/forward.h"
#include "sagellm/cuda/kv_pool.h"
#include "sagellm/cuda/layer_attention.h"
#include "sagellm/cuda/linear.h"
#include "sagellm/cuda/memory.h"
#include "sagellm/cuda/probe.h"
#include "sagellm/cuda/sampler.h"
#include "sagellm/cuda/step_shape.h"
#include "sagellm/cuda/stream.h"
#include "sagellm/cuda/weights.h"
#include "sagellm/model/config.h"
#include "sagellm/model/forward_batch.h"

namespace sagellm::cuda {

struct DecoderOptions {
  int32_t device = 0;
  int32_t max_batch_tokens = 512;     // tokens of one step
  int32_t max_graph_sequences = 256;  // larger decode steps are not recorded; 0: none is
  kernels::cuda::KvType kv_type = kernels::cuda::KvType::kBF16;  // 16 bits: as the activations
  bool deterministic = false;  // results of a sequence do not depend on the rest of the step
  bool use_cublas = true;      // unless deterministic
  std::vector<std::string> cublas_folders;
};

/// Where arrays of a step go that are asked for, with one row per logit row.
struct StepOutputs {
  std::span<sample::Result> sampled = {};  // as long as the sampling rules; see Decoder::step
  float* logits = nullptr;                 // [R, vocab_size], nullable
  float* hidden = nullptr;                 // [R, hidden_size] after the final norm, nullable
};

/// What a step has chosen, one entry per sampling rule.
struct StepResult {
  std::vector<sample::Result> sampled;
  std::vector<int32_t> num_logprobs;  // as asked for, at most the vocabulary
};

class Decoder {
 public:
  /// Loads the weights; throws what ModelConfig::validate and DeviceWeights throw, and Unsupported
  /// naming what no kernel here can serve.
  Decoder(model::ModelConfig config, const HostTensors& tensors, const DecoderOptions& options);
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;
  ~Decoder();

  /// Allocates the KV pages, once.
  void allocate_kv(int64_t num_blocks, int32_t block_size);
  /// Bytes of one block of all layers.
  int64_t kv_bytes_per_block(int32_t block_size) const;

  /// Computes a step, with no other in flight. `sampling` is empty or has one entry per logit row.
  /// Throws InvalidArgument before touching any state when the batch is malformed, and DeviceError
  /// when the device failed.
  void step(const model::ForwardBatch& batch, std::span<const sample::RowParams> sampling,
            const StepOutputs& outputs);
  /// Queues a step behind at most one that is in flight; its arguments may change afterwards.
  /// `token_sources` is empty, or has for each token the logit row of the step before that chooses
  /// it, or -1: token_ids. Throws as `step` does, and then leaves the queue as it was.
  void launch(const model::ForwardBatch& batch, std::span<const sample::RowParams> sampling,
              std::span<const int32_t> token_sources);
  /// Waits for the oldest step in flight; throws DeviceError when the device failed.
  StepResult wait();
  int32_t num_in_flight() const { return static_cast<int32_t>(num_launched_ - num_finished_); }

  const model::ModelConfig& config() const { return config_; }
  const DeviceWeights& weights() const { return weights_; }
  kernels::cuda::KvType kv_type() const { return kv_type_; }
  /// What multiplies: a library, or own kernels.
  std::string matmul() const;
  /// Bytes of the device that nobody has taken yet.
  size_t free_bytes() const;
  size_t kv_bytes() const { return kv_ ? kv_->bytes() : 0; }
  size_t workspace_bytes() const;
  size_t num_graphs() const;
  int64_t graph_replays() const { return graph_replays_; }
  /// Host time of the last `launch`, in seconds.
  double launch_seconds() const { return launch_seconds_; }

 private:
  /// What belongs to one step until it is done.
  struct Flight {
    PinnedBuffer upload;
    Choices choices;
    int32_t num_rows = 0;  // that choose tokens
    Event done;
  };
  struct ShapeHash {
    size_t operator()(const StepShape& shape) const;
  };

  void drain() noexcept;
  void check_supported() const;
  KvPoolOptions pool_options(int64_t num_blocks, int32_t block_size) const;
  bool is_decode(const model::ForwardBatch& batch) const;
  void queue(const model::ForwardBatch& batch, std::span<const sample::RowParams> sampling,
             std::span<const int32_t> token_sources, const StepOutputs& outputs);
  void check_sources(std::span<const int32_t> sources, int32_t num_tokens) const;
  void reserve_upload(size_t bytes);
  void prepare(const model::ForwardBatch& batch, std::span<const sample::RowParams> sampling,
               std::span<const int32_t> token_sources, bool decode);
  void write_inputs(const model::ForwardBatch& batch, std::span<const int32_t> token_sources);
  void find_arrays();
  void run_recorded();
  void output(const StepOutputs& outputs, bool decode);

  /// The step that is being launched.
  Flight& present() { return flights_[static_cast<size_t>(num_launched_ % 2)]; }
  template <typename T>
  T* pinned(size_t offset) {
    return reinterpret_cast<T*>(present().upload.data() + offset);
  }

  const model::ModelConfig config_;
  const DecoderOptions options_;
  const DeviceInfo device_;
  Stream stream_;
  DeviceWeights weights_;
  const kernels::cuda::KvType kv_type_;
  const int32_t head_rows_;  // logit rows per pass over the output head
  std::shared_ptr<const CublasLt> library_;
  Linear linear_;
  ForwardPass forward_;
  Sampler sampler_;
  std::unique_ptr<KvPool> kv_;
  std::unique_ptr<LayerAttention> attention_;

  std::array<Flight, 2> flights_;
  int64_t num_launched_ = 0;
  int64_t num_finished_ = 0;
  DeviceBuffer upload_;

  // The step that is being launched.
  std::vector<int32_t> query_starts_;
  StepShape shape_;
  StepLayout at_;
  StepArrays arrays_;
  size_t upload_bytes_ = 0;  // at_, then the sampling rows
  int32_t num_rows_ = 0;     // logit rows of the caller

  std::unordered_map<StepShape, Graph, ShapeHash> graphs_;  // empty until seen twice
  int64_t graph_replays_ = 0;
  double launch_seconds_ = 0.0;
};

}  // namespace sagellm::cuda
