// The dense decoder family (Llama, Qwen2, Qwen3, Gemma 2/3) on a CUDA device, with the contract of
// model::Decoder: one call per engine step.
//
// A step is one upload of all its metadata from pinned memory, launches on one stream, and one
// small download. Decode steps (one token of every sequence) are padded to the next of a few
// shapes, and their launches are recorded when a shape comes a second time, then replayed as a
// graph.
//
// forward.h has the launches of the model, layer_attention.h the plans of its attention, sampler.h
// the choice of tokens.
#pragma once

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

/// Where the results of a step go. Each has one row per logit row.
struct StepOutputs {
  std::span<sample::Result> sampled = {};  // as long as the sampling rules
  float* logits = nullptr;                 // [R, vocab_size], nullable
  float* hidden = nullptr;                 // [R, hidden_size] after the final norm, nullable
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

  /// Queues a step. `sampling` is empty or has one entry per logit row. Throws InvalidArgument
  /// before touching any state when the batch is malformed. What `outputs` points to stays alive
  /// until `wait` has returned; one step at a time.
  void launch(const model::ForwardBatch& batch, std::span<const sample::RowParams> sampling,
              const StepOutputs& outputs);
  /// Waits for the queued step and fills its outputs; throws DeviceError when the device failed.
  void wait();

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
  struct ShapeHash {
    size_t operator()(const StepShape& shape) const;
  };

  void drain() noexcept;
  void check_supported() const;
  KvPoolOptions pool_options(int64_t num_blocks, int32_t block_size) const;
  bool is_decode(const model::ForwardBatch& batch) const;
  void reserve_upload(size_t bytes);
  void prepare(const model::ForwardBatch& batch, std::span<const sample::RowParams> sampling,
               bool decode);
  void write_inputs(const model::ForwardBatch& batch);
  void find_arrays();
  void run_recorded();
  void output(bool decode);

  template <typename T>
  T* pinned(size_t offset) const {
    return reinterpret_cast<T*>(pinned_.data() + offset);
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

  // The present step.
  std::vector<int32_t> query_starts_;
  PinnedBuffer pinned_;
  DeviceBuffer upload_;
  StepShape shape_;
  StepLayout at_;
  StepArrays arrays_;
  size_t upload_bytes_ = 0;  // at_, then the sampling rows
  StepOutputs outputs_;
  int32_t num_rows_ = 0;  // logit rows of the caller
  bool in_flight_ = false;

  std::unordered_map<StepShape, Graph, ShapeHash> graphs_;  // empty until seen twice
  int64_t graph_replays_ = 0;
  double launch_seconds_ = 0.0;
};

}  // namespace sagellm::cuda
