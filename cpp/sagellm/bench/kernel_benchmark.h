// Times single kernels the way the decoder calls them: on its pages, its packed weights and its
// thread pool. Times are those of one call of the kernel on the whole problem by all threads.
#pragma once

#include <cstdint>
#include <string_view>

#include "sagellm/kernels/params.h"
#include "sagellm/model/activation_buffer.h"
#include "sagellm/quant/pack.h"
#include "sagellm/runtime/timing.h"

namespace sagellm::bench {

/// Who runs it and for how long.
struct Run {
  const kernels::KernelTable& table;
  int num_threads = 1;
  double seconds = 0.2;
};

/// weights [n, k] times `num_tokens` encoded rows. `copies` of the weights are used in turn: with
/// more bytes than the caches hold, every round reads them from memory.
runtime::Timing time_matmul(const Run& run, const quant::PackedMatrix& weights, int32_t num_tokens,
                            model::Precision precision, int32_t copies);

struct AttentionShape {
  int32_t num_kv_heads = 1;
  int32_t group = 1;  // query heads per KV head
  int32_t head_dim = 64;
  int32_t context = 256;      // positions that the last query token sees
  int32_t num_tokens = 1;     // query tokens: 1 is decode, `context` is prefill
  int32_t num_layers = 1;     // used in turn, and then
  int32_t num_sequences = 1;  // those of the next sequence, as `copies` above
  kernels::KvDtype dtype = kernels::KvDtype::kBF16;
};

/// Attention of one sequence and the merge of its splits.
runtime::Timing time_attention(const Run& run, const AttentionShape& shape);

/// Writes K and V of `num_tokens` positions, all heads.
runtime::Timing time_kv_write(const Run& run, const AttentionShape& shape);

/// A row-wise kernel by name (rms_norm, quantize, rope, silu_mul, gelu_tanh_mul or argmax) over
/// `rows` rows of `columns` floats per thread, which stay in the caches.
runtime::Timing time_rows(const Run& run, std::string_view kernel, int64_t rows, int64_t columns);

/// One choice per thread from random logits of a normal distribution with deviation 3.
runtime::Timing time_sampler(const Run& run, int64_t vocab, double temperature, int64_t top_k,
                             double top_p);

}  // namespace sagellm::bench
