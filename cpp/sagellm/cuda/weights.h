// Weights of a decoder in device memory, streamed there from the checkpoint through pinned memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "sagellm/base/dtype.h"
#include "sagellm/cuda/memory.h"
#include "sagellm/cuda/stream.h"
#include "sagellm/kernels/cuda/float_type.h"
#include "sagellm/kernels/cuda/fp8.h"
#include "sagellm/kernels/cuda/quantized.h"
#include "sagellm/model/config.h"

namespace sagellm::cuda {

/// A checkpoint tensor in host memory, of any alignment, and what must be done to it.
struct HostTensor {
  Format format = Format::kF32;
  std::vector<int64_t> shape;  // outermost first
  const uint8_t* data = nullptr;
  int32_t unpermute_heads = 0;  // > 0: rows are in interleaved rotary order over this many heads
  bool add_one = false;         // norm weights stored as w - 1
};

/// Canonical name ("layers.3.q") -> tensor; the scales of an FP8 matrix are "layers.3.q_scale".
using HostTensors = std::map<std::string, HostTensor>;

/// Rows [first, first + n) of a linear layer: rearranged for the kernels of quantized.h, FP8 for
/// those of fp8.h, or dense, row-major.
struct WeightPart {
  int64_t first = 0;
  int64_t n = 0;
  bool is_quantized = false;
  bool is_fp8 = false;
  const std::byte* dense = nullptr;
  kernels::cuda::QuantMatrix quantized;
  kernels::cuda::Fp8Matrix fp8;
  int64_t bytes = 0;
};

/// A linear layer: matrices with the same input, one below the other; neighbours of one format are
/// one part.
struct LinearWeights {
  std::vector<WeightPart> parts;
  int64_t n = 0;
  int64_t k = 0;
};

/// One layer. Pointers are null where the architecture has no such tensor; vectors are f32.
struct DeviceLayer {
  LinearWeights qkv, o, gate_up, down;  // q, k, v rows; gate, up rows
  const float* qkv_bias = nullptr;      // [q | k | v]
  const float* attn_norm = nullptr;
  const float* attn_post_norm = nullptr;
  const float* ffn_norm = nullptr;
  const float* ffn_post_norm = nullptr;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
};

class DeviceWeights {
 public:
  /// Loads everything in one allocation. Formats that is_device_format() refuses are expanded to
  /// type(). Throws CorruptFile or Unsupported naming the tensor, DeviceError when memory does not
  /// suffice.
  DeviceWeights(const model::ModelConfig& config, const HostTensors& tensors, const Stream& stream);

  /// Of activations and dense matrices: f16 for a checkpoint in f16, else bf16.
  kernels::cuda::FloatType type() const { return type_; }
  const std::vector<DeviceLayer>& layers() const { return layers_; }
  const float* final_norm() const { return final_norm_; }
  const LinearWeights& head() const { return head_; }
  /// One part, [vocab][hidden].
  const WeightPart& embedding() const {
    return (embedding_.parts.empty() ? head_ : embedding_).parts.front();
  }

  size_t bytes() const { return memory_.size(); }
  /// Bytes of weights read to produce one token at batch 1 (all matrices and the head).
  size_t bytes_per_token() const { return bytes_per_token_; }
  /// Most inputs of a layer with quantized weights; 0 when all are dense.
  int64_t max_quantized_k() const { return max_quantized_k_; }
  /// The same of FP8 weights.
  int64_t max_fp8_k() const { return max_fp8_k_; }

 private:
  kernels::cuda::FloatType type_;
  std::vector<DeviceLayer> layers_;
  const float* final_norm_ = nullptr;
  LinearWeights head_;
  LinearWeights embedding_;  // no parts when tied
  DeviceBuffer memory_;
  size_t bytes_per_token_ = 0;
  int64_t max_quantized_k_ = 0;
  int64_t max_fp8_k_ = 0;
};

}  // namespace sagellm::cuda
