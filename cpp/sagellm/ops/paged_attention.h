// Causal attention over the paged cache.
#pragma once

#include "sagellm/ops/ragged_batch.h"

namespace sagellm::ops {

struct AttentionOptions {
  float scale = 1.f;    // multiplies q.k
  int32_t window = 0;   // > 0: a row sees this many positions, its own included
  float softcap = 0.f;  // > 0: scores become softcap * tanh(score / softcap)
};

/// Attention of q [tokens, heads, head_dim] over the positions 0 .. its own of each row's sequence;
/// out has the shape of q, float32, disjoint. K and V of the rows themselves are written before.
/// Query head h reads kv head h / (heads / kv_heads). Results are bitwise independent of the other
/// rows. Throws InvalidArgument naming what does not fit.
void paged_attention(const KvPages& pages, const RaggedBatch& batch, const ConstTensorView& q,
                     const AttentionOptions& options, const TensorView& out);

}  // namespace sagellm::ops
