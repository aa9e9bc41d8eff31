// What the operations over paged KV share: the pages of a layer and the rows of a step.
#pragma once

#include "sagellm/kernels/op_params.h"
#include "sagellm/kv/kv_storage.h"
#include "sagellm/tensor/matcher.h"
#include "sagellm/tensor/view.h"

namespace sagellm::ops {

/// The pages of one layer, in the layout of kernels/params.h; block 0 is padding.
struct KvPages {
  kernels::KvView view;
  int64_t num_blocks = 0;  // usable: ids 1..num_blocks
  int64_t num_kv_heads = 0;
  Device device;
};

/// The pages of a slot of host memory; throws InvalidArgument when there is no such slot.
KvPages pages_of(kv::KvStorage& storage, int slot);

/// Which rows belong to which sequence, where they stand and where their tokens are kept. int32
/// arrays in host memory on every device: they are read to check and to plan.
struct RaggedBatch {
  ConstTensorView query_starts;  // [sequences + 1], from 0 to tokens, not descending
  ConstTensorView positions;     // [tokens], consecutive within a sequence
  ConstTensorView block_tables;  // [sequences, max_blocks]
};

/// Binds "kv_heads" and "head_dim"; throws InvalidArgument for pages that no kernel can read.
void match_pages(Matcher& match, const KvPages& pages);

/// Checks shapes and every value that a kernel would follow: the blocks of positions that a row
/// writes, or with `attends` sees through `window`. Binds "tokens" if nothing has. Throws
/// InvalidArgument naming operation, sequence and value.
kernels::RaggedParams match_batch(Matcher& match, const RaggedBatch& batch, const KvPages& pages,
                                  bool attends, int32_t window);

}  // namespace sagellm::ops
