// One forward pass of a dense decoder on a device: its launches, and the memory between them.
//
//   embedding, tables of the rotation
//   per layer: residual + norm | QKV | bias, q/k norm, rotation, KV write | attention | output
//              residual + norm | gate and up | activation | down
//   residual + norm of the rows that need logits | output head
//
// The residual stream is f32; activations have the type of the weights, bf16 or f16.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "sagellm/cuda/kv_pool.h"
#include "sagellm/cuda/layer_attention.h"
#include "sagellm/cuda/linear.h"
#include "sagellm/cuda/memory.h"
#include "sagellm/cuda/step_shape.h"
#include "sagellm/cuda/stream.h"
#include "sagellm/cuda/weights.h"
#include "sagellm/model/config.h"

namespace sagellm::cuda {

/// A step as its kernels see it: arrays on the device, see StepLayout.
struct StepArrays {
  StepShape shape;
  const int32_t* token_ids = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* slots = nullptr;
  const int32_t* logit_rows = nullptr;
  const int32_t* block_tables = nullptr;
  std::vector<const int32_t*> plans;
};

class ForwardPass {
 public:
  /// For steps of up to `max_tokens`, whose output head takes `head_rows` rows at a time. All
  /// arguments but these stay alive.
  ForwardPass(const model::ModelConfig& config, const DeviceWeights& weights, Linear& linear,
              const Stream& stream, int32_t max_tokens, int32_t head_rows);

  /// Queues everything up to the normed rows that need logits.
  void run(const StepArrays& step, const KvPool& kv, const LayerAttention& attention);
  /// Queues the logits of the rows [first, first + count) of the pass, at most `head_rows`.
  void head(int32_t first, int32_t count);

  const float* logits() const { return logits_; }  // [head_rows][vocab_stride]
  int64_t vocab_stride() const { return vocab_stride_; }
  /// Queues the conversion of `count` normed rows; [count][hidden_size], valid until the next pass.
  const float* hidden(int32_t count);
  size_t bytes() const { return workspace_.size() + rope_frequencies_.size(); }

 private:
  void allocate(int64_t rows);
  void embed();
  void rotate();
  void layer(size_t index);
  void finish_qkv(size_t index);
  void attend(size_t index);
  void feed_forward(const DeviceLayer& w);
  void normalize(const float* weight, const float* post_norm, const float* delta,
                 const int32_t* rows, int32_t num_rows);

  const model::ModelConfig& config_;
  const DeviceWeights& weights_;
  Linear& linear_;
  const Stream& stream_;
  const kernels::cuda::FloatType type_;
  const int32_t head_rows_;
  const int64_t q_size_;
  const int64_t qkv_stride_;
  const int64_t vocab_stride_;

  // The present step.
  StepArrays step_;
  const KvPool* kv_ = nullptr;
  const LayerAttention* attention_ = nullptr;

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
  DeviceBuffer rope_frequencies_;
  std::vector<size_t> rope_offset_;  // in rope_frequencies_, doubles
  std::vector<float*> cos_, sin_;    // one pair per rope
};

}  // namespace sagellm::cuda
