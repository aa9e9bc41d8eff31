// Weights of a decoder: checkpoint tensors packed for the kernels (R16), loaded by all threads.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "sagellm/checkpoint/file.h"
#include "sagellm/model/config.h"
#include "sagellm/quant/pack.h"
#include "sagellm/runtime/thread_pool.h"

namespace sagellm::model {

/// Where a canonical tensor comes from, and what must be done to it.
struct TensorSource {
  std::shared_ptr<const checkpoint::File> file;
  std::string tensor;
  int32_t unpermute_heads = 0;  // > 0: rows are in interleaved rotary order over this many heads
  bool add_one = false;         // norm weights stored as w - 1
};

/// Canonical name ("layers.3.q") -> source.
using TensorSources = std::map<std::string, TensorSource>;

/// One layer. Vectors are empty where the architecture has no such tensor.
struct LayerWeights {
  quant::PackedMatrix q, k, v, o, gate, up, down;
  std::vector<float> q_bias, k_bias, v_bias;
  std::vector<float> attn_norm, attn_post_norm, ffn_norm, ffn_post_norm;
  std::vector<float> q_norm, k_norm;
};

/// All weights of a model. With tied embeddings `head` serves both ends; otherwise embedding rows
/// are read straight from the (memory-mapped) checkpoint, one row per token.
class Weights {
 public:
  /// Loads and packs everything; throws CorruptFile or Unsupported naming the tensor.
  Weights(const ModelConfig& config, const TensorSources& sources, runtime::ThreadPool& pool);

  /// Writes the f32 embedding of `token` (unscaled) to out[hidden_size].
  void embedding(int32_t token, float* out) const;

  /// Bytes of packed weights and vectors held in memory.
  size_t bytes() const { return bytes_; }
  /// Bytes of weights read to produce one token at batch 1 (all matrices and the head).
  size_t bytes_per_token() const { return bytes_per_token_; }

  const std::vector<LayerWeights>& layers() const { return layers_; }
  const std::vector<float>& final_norm() const { return final_norm_; }
  const quant::PackedMatrix& head() const { return head_; }

 private:
  std::vector<LayerWeights> layers_;
  std::vector<float> final_norm_;
  quant::PackedMatrix head_;
  std::shared_ptr<const checkpoint::File> embedding_file_;  // null when tied
  Format embedding_format_ = Format::kF32;
  const uint8_t* embedding_rows_ = nullptr;
  int64_t embedding_row_bytes_ = 0;
  int64_t hidden_size_ = 0;
  size_t bytes_ = 0;
  size_t bytes_per_token_ = 0;
};

}  // namespace sagellm::model
