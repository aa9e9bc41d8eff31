#include "sagellm/ops/kv_write.h"

#include "sagellm/runtime/op_table.h"

namespace sagellm::ops {

void kv_write(const KvPages& pages, const RaggedBatch& batch, const ConstTensorView& k,
              const ConstTensorView& v) {
  Matcher match("kv_write", pages.device);
  match_pages(match, pages);
  match.tensor("k", k, ElementType::kF32, {"tokens", "kv_heads", "head_dim"});
  match.tensor("v", v, ElementType::kF32, {"tokens", "kv_heads", "head_dim"});
  kernels::KvWriteBatchParams p;
  p.kv = pages.view;
  p.num_kv_heads = pages.num_kv_heads;
  p.batch = match_batch(match, batch, pages, false, 0);
  p.k = k.as<float>();
  p.k_stride = k.strides[0];
  p.v = v.as<float>();
  p.v_stride = v.strides[0];
  runtime::op_table(pages.device).kv_write(pages.device, p);
}

}  // namespace sagellm::ops
