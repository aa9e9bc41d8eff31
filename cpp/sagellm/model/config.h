// The shape of a dense decoder, as the Python checkpoint layer hands it over.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sagellm::model {

enum class Activation : uint8_t { kSilu, kGeluTanh };

/// Rotary frequencies of one kind of layer; all scaling rules are already applied to
/// `inverse_frequencies`.
struct Rope {
  std::vector<double> inverse_frequencies;  // radians per position, [rotated values / 2]
  float attention_factor = 1.f;             // multiplies cos and sin
};

/// One decoder layer's place in the KV cache and its view of the context.
struct LayerConfig {
  int32_t window = 0;  // 0: full attention
  int32_t group = 0;   // KV group, selects the block table
  int32_t slot = 0;    // place of the layer inside a block
  int32_t rope = 0;    // index into ModelConfig::ropes
};

struct ModelConfig {
  int32_t vocab_size = 0;
  int32_t hidden_size = 0;
  int32_t intermediate_size = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t max_position = 0;
  float norm_eps = 1e-5f;
  float attention_scale = 1.f;
  float attention_softcap = 0.f;  // 0: none
  float final_softcap = 0.f;      // 0: none
  float embedding_scale = 1.f;
  Activation activation = Activation::kSilu;
  bool qkv_bias = false;
  bool qk_norm = false;
  bool post_norms = false;
  bool tie_embeddings = false;
  std::vector<Rope> ropes;
  std::vector<LayerConfig> layers;

  int32_t num_layers() const { return static_cast<int32_t>(layers.size()); }
  int32_t group_size() const { return num_heads / num_kv_heads; }

  /// Throws InvalidArgument or Unsupported naming the first field that no kernel can serve.
  void validate() const;
};

}  // namespace sagellm::model
