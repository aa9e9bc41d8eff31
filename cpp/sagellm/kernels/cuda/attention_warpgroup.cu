#include "sagellm/kernels/cuda/attention_warpgroup.cuh"

namespace sagellm::kernels::cuda {
namespace {

template <int kDim, typename T>
AttentionInstance instance() {
  using Shape = WarpgroupShape<kDim>;
  return {.launch =
              [](const AttentionParams& p, const TensorMap& pages, Grid grid, size_t shared_bytes,
                 void* stream) {
                launch(attention_warpgroup_kernel<kDim, T>, grid, Shape::kThreads, shared_bytes,
                       stream, {pages, p});
              },
          .resident =
              [](size_t shared_bytes) {
                return resident_blocks(attention_warpgroup_kernel<kDim, T>, Shape::kThreads,
                                       shared_bytes);
              },
          .fixed_bytes = Shape::kFixedBytes,
          .entry_bytes = Shape::kEntryBytes,
          .least_ring_bytes = 0};
}

}  // namespace

AttentionInstance attention_warpgroup(int head_dim, KvType type) {
  const bool is_bf16 = type == KvType::kBF16;
  if (head_dim <= 64) return is_bf16 ? instance<64, bf16>() : instance<64, f16>();
  return is_bf16 ? instance<128, bf16>() : instance<128, f16>();
}

}  // namespace sagellm::kernels::cuda
