// Choosing and starting an attention kernel. Plain C++.
#pragma once

#include "sagellm/kernels/cuda/attention_params.h"
#include "sagellm/kernels/cuda/launch.h"
#include "sagellm/kernels/cuda/tensor_map.h"

namespace sagellm::kernels::cuda {

/// One compiled kernel. Shared memory is fixed_bytes, then max(ring entries, least_ring_bytes).
/// Only kWarpgroup looks at `pages`.
struct AttentionInstance {
  void (*launch)(const AttentionParams& params, const TensorMap& pages, Grid grid,
                 size_t shared_bytes, void* stream);
  int (*resident)(size_t shared_bytes);
  int32_t fixed_bytes;
  int32_t entry_bytes;
  int32_t least_ring_bytes;
};
AttentionInstance attention_d64(AttentionKernel kernel, KvType type);
AttentionInstance attention_d96(AttentionKernel kernel, KvType type);
AttentionInstance attention_d128(AttentionKernel kernel, KvType type);
AttentionInstance attention_d256(AttentionKernel kernel, KvType type);
AttentionInstance attention_warpgroup(int head_dim, KvType type);

/// Whether kWarpgroup exists for these heads, in this build, on a device of this compute
/// capability.
bool has_warpgroup_attention(KvType type, int head_dim, int major, int minor);
/// The box of the pages' tensor map, in elements: kWarpgroupBoxDims dimensions of a page's tokens.
inline constexpr int kWarpgroupBoxDims = 64;

/// How a kernel is run on a device: `ring` entries of K or V are in flight or in use.
struct AttentionLaunch {
  AttentionKernel kernel = AttentionKernel::kNarrow;
  AttentionInstance instance;
  int32_t ring = 0;
  size_t shared_bytes = 0;
};

/// The kernel for heads of head_dim dimensions, with the longest ring that lets two blocks share a
/// multiprocessor (kWarpgroup has one), else the longest that fits. Throws InvalidArgument when
/// head_dim does not suit the type, Unsupported when a block may have too little shared memory.
AttentionLaunch choose_attention(AttentionKernel kernel, KvType type, int head_dim,
                                 size_t shared_bytes_per_block);

/// Queues one launch on `stream` for the `num_bins` bins of params.work; kWarpgroup needs the map
/// of params.kv. Throws InvalidArgument naming what does not fit.
void launch_attention(const AttentionLaunch& how, AttentionParams params, const TensorMap* pages,
                      int num_bins, void* stream);

}  // namespace sagellm::kernels::cuda
