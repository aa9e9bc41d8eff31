// The BERT family of encoders: bidirectional attention over short sequences, no KV cache, one call
// per batch.
//
// Sequences of any lengths lie one after another on one token axis, so nothing is padded. A batch
// runs as phases on the thread pool, separated by barriers, seven per layer:
//   QKV | attention over (sequence, head) | output projection | residual + norm
//   up projection + GELU | down projection | residual + norm
// The projections are cut into tiles of tokens x row blocks. Attention is two of the same matrix
// products, with the keys and the transposed values of one head packed like weights.
//
// A sequence's result depends on its own tokens only, bitwise: every output element is one fixed
// chain of additions, whatever the batch and the number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sagellm/kernels/params.h"
#include "sagellm/model/activation_buffer.h"
#include "sagellm/model/weights.h"
#include "sagellm/quant/pack.h"
#include "sagellm/runtime/thread_pool.h"

namespace sagellm::model {

struct EncoderConfig {
  int32_t vocab_size = 0;
  int32_t hidden_size = 0;
  int32_t intermediate_size = 0;
  int32_t num_layers = 0;
  int32_t num_heads = 0;
  int32_t num_positions = 0;    // rows of the position table
  int32_t position_offset = 0;  // row of a sequence's first token (RoBERTa: 2)
  int32_t num_token_types = 0;  // rows of the token-type table
  float norm_eps = 1e-12f;
  bool has_head = false;  // cross-encoder: dense + tanh over the first token, then one output

  int32_t head_dim() const { return hidden_size / num_heads; }
  int32_t max_tokens() const { return num_positions - position_offset; }  // of one sequence
  /// Throws InvalidArgument or Unsupported naming the first field that no kernel can serve.
  void validate() const;
};

struct EncoderOptions {
  int32_t num_threads = 1;
  int32_t max_batch_tokens = 1024;  // tokens of one call
  std::string isa;                  // empty: the best this machine has (or SAGELLM_CPU_ISA)
};

/// Sequence s owns the tokens query_starts[s] .. query_starts[s + 1].
struct EncoderBatch {
  std::span<const int32_t> token_ids;
  std::span<const int32_t> token_types;
  std::span<const int32_t> query_starts;  // [num_sequences + 1], from 0 to the number of tokens

  int64_t num_tokens() const { return static_cast<int64_t>(token_ids.size()); }
  int64_t num_sequences() const { return static_cast<int64_t>(query_starts.size()) - 1; }
};

enum class Pooling : uint8_t { kMean, kCls };

/// What one call is to produce; null arrays are not wanted.
struct EncoderOutputs {
  float* hidden = nullptr;  // [num_tokens][hidden_size]
  float* pooled = nullptr;  // [num_sequences][hidden_size]
  Pooling pooling = Pooling::kMean;
  bool normalize = false;  // pooled rows get length 1 (a row shorter than 1e-12 is divided by that)
  float* scores = nullptr;  // [num_sequences], the head's output before any activation
};

class Encoder {
 public:
  /// Loads and packs the weights. `sources` maps "embed.word", "embed.position", "embed.type",
  /// "embed.norm", per layer "layers.0.q", .k, .v, .o, .attn_norm, .up, .down, .ffn_norm, and with
  /// a head "head.dense" and "head.out"; all but the tables have a "..._bias". Throws CorruptFile
  /// or Unsupported naming the tensor.
  Encoder(EncoderConfig config, const TensorSources& sources, const EncoderOptions& options);
  ~Encoder();

  /// Runs one batch. Throws InvalidArgument before any work when the batch is malformed. Not
  /// re-entrant.
  void run(const EncoderBatch& batch, const EncoderOutputs& outputs);

  const EncoderConfig& config() const { return config_; }
  const kernels::KernelTable& kernels() const { return table_; }
  int32_t num_threads() const { return pool_.size(); }
  int32_t max_batch_tokens() const { return options_.max_batch_tokens; }
  size_t weight_bytes() const { return weight_bytes_; }
  size_t workspace_bytes() const;

 private:
  struct Linear {
    quant::PackedMatrix matrix;
    std::vector<float> bias;
  };
  struct Norm {
    std::vector<float> weight, bias;
  };
  struct Layer {
    Linear qkv, output, up, down;
    Norm attention_norm, ffn_norm;
  };
  struct Table {  // rows are read straight from the (memory-mapped) checkpoint
    std::shared_ptr<const checkpoint::File> file;
    const checkpoint::TensorInfo* info = nullptr;
  };
  class Loader;
  class Scratch;

  void validate(const EncoderBatch& batch, const EncoderOutputs& outputs) const;
  void forward(const EncoderBatch& batch, int thread);
  void embed(const EncoderBatch& batch, int thread, int& phase);
  void attend(const EncoderBatch& batch, int thread, int& phase);
  void attend_head(int64_t first, int64_t length, int64_t head, Scratch& scratch);
  void add_and_norm(const Norm& norm, int64_t num_tokens, int thread, int& phase);
  void encode_rows(ActivationBuffer& x, int64_t num_tokens, int thread, int& phase);
  /// out = x * matrix (without bias), then finish(row of out, first column, number of columns) for
  /// the tokens of every tile.
  template <typename Finish>
  void project(const Linear& linear, const ActivationBuffer& x, float* out, int64_t num_tokens,
               int thread, int& phase, const Finish& finish);
  void pool(const EncoderBatch& batch, const EncoderOutputs& outputs, int64_t sequence) const;
  void score(const EncoderBatch& batch, float* scores);
  ActKinds all_kinds() const;

  const EncoderConfig config_;
  const EncoderOptions options_;
  const kernels::KernelTable& table_;
  runtime::ThreadPool pool_;
  runtime::WorkQueue queue_;

  Table words_;
  std::vector<float> positions_, types_;
  Norm embedding_norm_;
  std::vector<Layer> layers_;
  Linear head_dense_;
  std::vector<float> head_out_, head_out_bias_;
  size_t weight_bytes_ = 0;

  // Workspace, one row per token of a batch.
  ActKinds kinds_;
  ActivationBuffer hidden_, context_, ffn_;
  Buffer qkv_, projection_;
  std::vector<Scratch> scratch_;  // one per thread
};

}  // namespace sagellm::model
