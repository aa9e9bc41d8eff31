#include "sagellm/model/config.h"

#include "sagellm/base/error.h"
#include "sagellm/kernels/params.h"

namespace sagellm::model {

void ModelConfig::validate() const {
  const auto positive = [](int64_t value, const char* name) {
    require<InvalidArgument>(value > 0, "model config: ", name, " is ", value,
                             ", must be positive");
  };
  positive(vocab_size, "vocab_size");
  positive(hidden_size, "hidden_size");
  positive(intermediate_size, "intermediate_size");
  positive(num_heads, "num_heads");
  positive(num_kv_heads, "num_kv_heads");
  positive(max_position, "max_position");
  positive(num_layers(), "num_layers");
  require<InvalidArgument>(num_heads % num_kv_heads == 0, "model config: num_heads ", num_heads,
                           " is not a multiple of num_kv_heads ", num_kv_heads);
  require<Unsupported>(
      head_dim > 0 && head_dim % 16 == 0 && head_dim <= kernels::kMaxHeadDim, "head_dim ", head_dim,
      " is not supported; supported: multiples of 16 up to ", kernels::kMaxHeadDim);
  require<Unsupported>(group_size() <= kernels::kAttentionRows, "num_heads / num_kv_heads is ",
                       group_size(), "; at most ", kernels::kAttentionRows, " is supported");
  require<InvalidArgument>(!ropes.empty(), "model config: no rope frequencies");
  for (const Rope& rope : ropes) {
    const auto rotated = static_cast<int64_t>(rope.inverse_frequencies.size()) * 2;
    require<InvalidArgument>(rotated > 0 && rotated <= head_dim, "model config: rope rotates ",
                             rotated, " values of head_dim ", head_dim);
  }
  for (const LayerConfig& layer : layers) {
    require<InvalidArgument>(
        layer.window >= 0 && layer.group >= 0 && layer.slot >= 0 && layer.rope >= 0 &&
            static_cast<size_t>(layer.rope) < ropes.size(),
        "model config: a layer has an invalid window, group, slot or rope index");
  }
}

}  // namespace sagellm::model
