// The input of a matmul phase, in every representation that its weights ask for.
#pragma once

#include <cstdint>
#include <vector>

#include "sagellm/kernels/op_params.h"
#include "sagellm/kernels/params.h"
#include "sagellm/tensor/buffer.h"

namespace sagellm::model {

/// How quantized matmuls represent activations: one int8 plane per 32 values, or two (15 bits).
using Precision = kernels::ActPrecision;

/// A set of representations; which ones a phase needs follows from its weight formats.
struct ActKinds {
  bool i8 = false;
  bool bf16 = false;

  void add(kernels::ActKind kind) {
    i8 |= kind == kernels::ActKind::kI8;
    bf16 |= kind == kernels::ActKind::kBF16;
  }
};

/// Rows of `k` activations: the f32 rows, and what `encode` derives from them. Rows are
/// independent, so threads may work on different rows at the same time.
class ActivationBuffer {
 public:
  /// Reserves what `kinds` will ask of `rows` rows of `k` values.
  ActivationBuffer(int64_t rows, int64_t k, Precision precision, ActKinds kinds);

  int64_t k() const { return k_; }
  float* row(int64_t index) { return f32_ + index * k_; }
  const float* row(int64_t index) const { return f32_ + index * k_; }

  /// Derives the representations in `kinds` for rows [begin, end).
  void encode(const kernels::KernelTable& table, ActKinds kinds, int64_t begin, int64_t end);

  /// Activations starting at row `begin`.
  kernels::Activations view(int64_t begin) const;

  size_t bytes() const { return storage_.size(); }

 private:
  int64_t k_;
  Buffer storage_;
  float* f32_ = nullptr;
  uint16_t* bf16_ = nullptr;
  int8_t* q_ = nullptr;
  int8_t* q_lo_ = nullptr;
  float* d_ = nullptr;
  float* s_ = nullptr;
  int32_t* sum16_ = nullptr;
};

}  // namespace sagellm::model
