// Attention of all layers of a model on a device: their plans of a step, and their launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "sagellm/cuda/attention.h"
#include "sagellm/cuda/probe.h"
#include "sagellm/cuda/step_shape.h"
#include "sagellm/cuda/stream.h"
#include "sagellm/model/config.h"

namespace sagellm::cuda {

/// The tokens of a step in host memory, padded to its shape.
struct PaddedStep {
  std::span<const int32_t> query_starts;  // [sequences + 1]
  const int32_t* positions = nullptr;     // [tokens]
  const int32_t* block_tables = nullptr;  // [groups][sequences][table_width]
};

class LayerAttention {
 public:
  /// `options` without a window, which each layer has its own of. Throws InvalidArgument or
  /// Unsupported.
  LayerAttention(const model::ModelConfig& config, const PagedAttentionOptions& options,
                 const DeviceInfo& device);

  /// Plans a step of `shape`. `decode`: the room of its arrays depends on the shape alone, whose
  /// `wide_kinds` are set. Returns whether memory has moved that recordings use. Waits for `stream`
  /// when memory must grow.
  bool plan(const PaddedStep& step, StepShape& shape, bool decode, const Stream& stream);
  /// Of the plan of each kind of layer.
  const std::vector<int64_t>& words() const { return words_; }
  /// Writes the plan of a kind to `out` [words].
  void write(size_t kind, int32_t* out) const;

  size_t kind_of(size_t layer) const { return kind_of_layer_[layer]; }
  /// Queues a layer of the planned step.
  void run(size_t layer, const AttentionStep& step, const Stream& stream) const;

  size_t workspace_bytes() const { return workspace_.bytes(); }

 private:
  /// Layers with the same window and the same block tables share a plan.
  struct Kind {
    int32_t window = 0;
    int32_t group = 0;
    std::unique_ptr<PagedAttention> attention;
    AttentionCapacity capacity;  // of the present step
  };

  int32_t page_size_;
  std::vector<Kind> kinds_;
  std::vector<size_t> kind_of_layer_;
  std::vector<int64_t> words_;
  AttentionWorkspace workspace_;
};

}  // namespace sagellm::cuda
