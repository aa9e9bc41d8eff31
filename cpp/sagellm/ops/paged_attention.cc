#include "sagellm/ops/paged_attention.h"

#include <cmath>

#include "sagellm/runtime/op_table.h"

namespace sagellm::ops {

void paged_attention(const KvPages& pages, const RaggedBatch& batch, const ConstTensorView& q,
                     const AttentionOptions& options, const TensorView& out) {
  require<InvalidArgument>(std::isfinite(options.scale), "paged_attention: scale is ",
                           options.scale, ", must be finite");
  require<InvalidArgument>(options.window >= 0, "paged_attention: window is ", options.window,
                           ", must be 0 (none) or positive");
  require<InvalidArgument>(options.softcap >= 0.f && std::isfinite(options.softcap),
                           "paged_attention: softcap is ", options.softcap,
                           ", must be 0 (none) or positive and finite");
  Matcher match("paged_attention", pages.device);
  match_pages(match, pages);
  match.tensor("q", q, ElementType::kF32, {"tokens", "heads", "head_dim"});
  match.tensor("out", out, ElementType::kF32, {"tokens", "heads", "head_dim"});
  require<InvalidArgument>(
      match["heads"] % match["kv_heads"] == 0, "paged_attention: axis 1 of q is ", match["heads"],
      ", must be a multiple of ", match["kv_heads"], " (kv_heads of the KV pages)");
  kernels::PagedAttentionParams p;
  p.kv = pages.view;
  p.num_kv_heads = pages.num_kv_heads;
  p.num_heads = match["heads"];
  p.batch = match_batch(match, batch, pages, true, options.window);
  p.q = q.as<float>();
  p.q_stride = q.strides[0];
  p.out = out.as<float>();
  p.out_stride = out.strides[0];
  p.window = options.window;
  p.scale = options.scale;
  p.softcap = options.softcap;
  runtime::op_table(pages.device).paged_attention(pages.device, p);
}

}  // namespace sagellm::ops
