// Writing keys and values into the paged cache.
#pragma once

#include "sagellm/ops/ragged_batch.h"

namespace sagellm::ops {

/// Stores k and v [tokens, kv_heads, head_dim], float32, in the blocks of their positions and in
/// the dtype of the pages (see KvWriteParams). Throws InvalidArgument naming what does not fit,
/// before anything is written.
void kv_write(const KvPages& pages, const RaggedBatch& batch, const ConstTensorView& k,
              const ConstTensorView& v);

}  // namespace sagellm::ops
