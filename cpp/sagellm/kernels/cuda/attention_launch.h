// Choosing and starting an attention kernel. Plain C++.
#pragma once

#include "sagellm/kernels/cuda/attention_params.h"
#include "sagellm/kernels/cuda/launch.h"

namespace sagellm::kernels::cuda {

/// One compiled kernel. Shared memory is fixed_bytes, then max(ring entries, least_ring_bytes).
struct AttentionInstance {
  void (*launch)(const AttentionParams& params, Grid grid, size_t shared_bytes, void* stream);
  int (*resident)(size_t shared_bytes);
  int32_t fixed_bytes;
  int32_t entry_bytes;
  int32_t least_ring_bytes;
};
AttentionInstance attention_d64(AttentionKernel kernel, KvType type);
AttentionInstance attention_d96(AttentionKernel kernel, KvType type);
AttentionInstance attention_d128(AttentionKernel kernel, KvType type);
AttentionInstance attention_d256(AttentionKernel kernel, KvType type);

/// How a kernel is run on a device: `ring` entries of K or V are in flight or in use.
struct AttentionLaunch {
  AttentionInstance instance;
  int32_t ring = 0;
  size_t shared_bytes = 0;
};

/// The kernel for heads of head_dim dimensions, with the longest ring that lets two blocks share a
/// multiprocessor, else the longest that fits. Throws InvalidArgument when head_dim does not suit
/// the type, Unsupported when a block may have too little shared memory.
AttentionLaunch choose_attention(AttentionKernel kernel, KvType type, int head_dim,
                                 size_t shared_bytes_per_block);

/// Queues one launch on `stream` for the `num_bins` bins of params.work. Throws InvalidArgument
/// naming what does not fit.
void launch_attention(const AttentionLaunch& how, AttentionParams params, int num_bins,
                      void* stream);

}  // namespace sagellm::kernels::cuda
