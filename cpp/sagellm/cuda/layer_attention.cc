#include "sagellm/cuda/layer_attention.h"

#include <algorithm>

#include "sagellm/base/error.h"

namespace sagellm::cuda {

LayerAttention::LayerAttention(const model::ModelConfig& config,
                               const PagedAttentionOptions& options, const DeviceInfo& device)
    : page_size_(options.plan.page_size) {
  for (const model::LayerConfig& layer : config.layers) {
    auto kind = std::find_if(kinds_.begin(), kinds_.end(), [&](const Kind& k) {
      return k.window == layer.window && k.group == layer.group;
    });
    if (kind == kinds_.end()) {
      PagedAttentionOptions own = options;
      own.plan.window = layer.window;
      kinds_.push_back({.window = layer.window,
                        .group = layer.group,
                        .attention = std::make_unique<PagedAttention>(own, device),
                        .capacity = {}});
      kind = kinds_.end() - 1;
    }
    kind_of_layer_.push_back(static_cast<size_t>(kind - kinds_.begin()));
  }
  require<Unsupported>(kinds_.size() <= 64, "the model has ", kinds_.size(),
                       " kinds of attention layers; at most 64 are supported");
}

bool LayerAttention::plan(const PaddedStep& step, StepShape& shape, bool decode,
                          const Stream& stream) {
  const int64_t stride = shape.table_width;
  const int64_t plane = shape.sequences * stride;
  bool moved = false;
  words_.clear();
  shape.wide_kinds = 0;
  for (Kind& kind : kinds_) {
    AttentionPlanner& planner = kind.attention->planner();
    planner.plan(
        {.query_starts = step.query_starts,
         .positions = {step.positions, static_cast<size_t>(shape.tokens)},
         .block_tables = {step.block_tables + kind.group * plane, static_cast<size_t>(plane)},
         .block_tables_stride = stride});
    kind.capacity = planner.required();
    if (decode) {
      const bool wide = kind.capacity.wide_items > 0;
      kind.capacity = planner.capacity(shape.sequences, shape.tokens, 1, stride * page_size_);
      if (!wide) kind.capacity.wide_items = 0;  // one launch less in every layer
      shape.wide_kinds |= uint64_t{wide} << words_.size();
    }
    words_.push_back(planner.upload_layout(kind.capacity).words);
    const float* accumulators = workspace_.accumulators();
    const int32_t* arrivals = workspace_.arrivals();
    workspace_.reserve(planner, kind.capacity, stream.get());
    moved |= accumulators != workspace_.accumulators() || arrivals != workspace_.arrivals();
  }
  return moved;
}

void LayerAttention::write(size_t kind, int32_t* out) const {
  kinds_[kind].attention->planner().write_upload(kinds_[kind].capacity,
                                                 {out, static_cast<size_t>(words_[kind])});
}

void LayerAttention::run(size_t layer, const AttentionStep& step, const Stream& stream) const {
  const Kind& kind = kinds_[kind_of_layer_[layer]];
  kind.attention->run(step, kind.capacity, workspace_, stream.get());
}

}  // namespace sagellm::cuda
