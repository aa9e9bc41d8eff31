// The dense decoder family (Llama, Qwen2, Qwen3, Gemma 2/3) on a CUDA device, with the contract of
// model::Decoder: one call per engine step.
//
// A step is one upload of all its metadata from pinned memory, launches on one stream, and one
// small download. Decode steps (one token of every sequence) are padded to the next of a few
// shapes, and their launches are recorded when a shape comes a second time, then replayed as a
// graph.
//
//   embedding, tables of the rotation
//   per layer: residual + norm | QKV | bias, q/k norm, rotation, KV write | attention | output
//              residual + norm | gate and up | activation | down
//   residual + norm of the rows that need logits | output head | sampling
//
// The residual stream is f32; activations have the type of the weights, bf16 or f16.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "sagellm/cuda/attention.h"
#include "sagellm/cuda/kv_pool.h"
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
  const std::string& matmul() const { return matmul_; }
  /// Bytes of the device that nobody has taken yet.
  size_t free_bytes() const;
  size_t kv_bytes() const { return kv_ ? kv_->bytes() : 0; }
  size_t workspace_bytes() const;
  size_t num_graphs() const;
  int64_t graph_replays() const { return graph_replays_; }
  /// Host time of the last `launch`, in seconds.
  double launch_seconds() const { return launch_seconds_; }

 private:
  /// Layers with the same window and the same block tables share a plan.
  struct LayerKind {
    int32_t window = 0;
    int32_t group = 0;
    std::unique_ptr<PagedAttention> attention;
    AttentionCapacity capacity;  // of the present step
  };
  struct ShapeHash {
    size_t operator()(const StepShape& shape) const;
  };

  void drain() noexcept;
  void check_supported() const;
  void allocate_workspace();
  void make_layer_kinds(int32_t block_size);
  bool is_decode(const model::ForwardBatch& batch) const;
  void prepare(const model::ForwardBatch& batch, std::span<const sample::RowParams> sampling,
               bool decode);
  void write_inputs(const model::ForwardBatch& batch);
  void reserve_upload(size_t bytes);
  void forward();
  void run_recorded();
  void embed();
  void layer(size_t index);
  void finish_qkv(size_t index);
  void attend(size_t index);
  void normalize(const float* weight, const float* post_norm, const float* delta,
                 const int32_t* rows, int32_t num_rows);
  void head(int32_t first, int32_t count);
  void output(std::span<const sample::RowParams> sampling, bool decode);

  template <typename T>
  T* uploaded(size_t offset) const {
    return reinterpret_cast<T*>(upload_.data() + offset);
  }
  template <typename T>
  T* pinned(size_t offset) const {
    return reinterpret_cast<T*>(pinned_.data() + offset);
  }

  const model::ModelConfig config_;
  const DecoderOptions options_;
  const DeviceInfo device_;
  Stream stream_;
  DeviceWeights weights_;
  const kernels::cuda::FloatType type_;
  const kernels::cuda::KvType kv_type_;
  std::string matmul_;
  std::unique_ptr<Linear> linear_;
  std::unique_ptr<KvPool> kv_;
  std::unique_ptr<Sampler> sampler_;

  std::vector<LayerKind> kinds_;
  std::vector<int32_t> kind_of_layer_;
  AttentionWorkspace attention_workspace_;

  // Workspace, rows of tokens.
  DeviceBuffer workspace_;
  float* residual_ = nullptr;
  float* projection_ = nullptr;
  std::byte* normed_ = nullptr;
  std::byte* qkv_ = nullptr;  // later the output of attention
  std::byte* q_ = nullptr;
  std::byte* gate_up_ = nullptr;
  std::byte* ffn_ = nullptr;
  float* logits_ = nullptr;
  int64_t qkv_stride_;
  int64_t vocab_stride_;
  int32_t head_rows_;  // logit rows per pass over the output head
  DeviceBuffer rope_frequencies_;
  std::vector<size_t> rope_offset_;  // in rope_frequencies_, doubles
  std::vector<float*> cos_, sin_;    // one pair per rope

  // The present step.
  std::vector<int32_t> query_starts_;
  PinnedBuffer pinned_;
  DeviceBuffer upload_;
  StepShape shape_;
  StepLayout at_;
  size_t upload_bytes_ = 0;  // at_, then the sampling rows
  StepOutputs outputs_;
  int32_t num_rows_ = 0;  // logit rows of the caller
  bool in_flight_ = false;

  std::unordered_map<StepShape, Graph, ShapeHash> graphs_;  // empty until seen twice
  int64_t graph_replays_ = 0;
  double launch_seconds_ = 0.0;
};

}  // namespace sagellm::cuda
