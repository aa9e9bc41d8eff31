#include "sagellm/kernels/cuda/attention_launch.h"

#include <algorithm>

#include "sagellm/base/error.h"

namespace sagellm::kernels::cuda {
namespace {

constexpr size_t kReservedPerBlock = 1024;  // what CUDA keeps of every block's shared memory

AttentionInstance instance_for(AttentionKernel kernel, KvType type, int head_dim) {
  if (kernel == AttentionKernel::kWarpgroup) {
#if defined(SAGELLM_CUDA_SM90A)
    require<Unsupported>(!kv_has_scales(type) && head_dim <= kMaxWarpgroupHeadDim,
                         "the warpgroup kernel takes 16-bit pages and heads of up to ",
                         kMaxWarpgroupHeadDim, " dimensions");
    return attention_warpgroup(head_dim, type);
#else
    fail<Unsupported>("this build has no code for compute capability 9.0a; build with 90a-real in ",
                      "SAGELLM_CUDA_ARCHS");
#endif
  }
  if (head_dim <= 64) return attention_d64(kernel, type);
  if (head_dim <= 96) return attention_d96(kernel, type);
  if (head_dim <= 128) return attention_d128(kernel, type);
  return attention_d256(kernel, type);
}

}  // namespace

bool has_warpgroup_attention(KvType type, int head_dim, int major, int minor) {
#if defined(SAGELLM_CUDA_SM90A)
  constexpr bool kCompiled = true;
#else
  constexpr bool kCompiled = false;
#endif
  return kCompiled && major == 9 && minor == 0 && !kv_has_scales(type) &&
         head_dim <= kMaxWarpgroupHeadDim;
}

AttentionLaunch choose_attention(AttentionKernel kernel, KvType type, int head_dim,
                                 size_t shared_bytes_per_block) {
  require<InvalidArgument>(head_dim > 0 && head_dim <= kMaxAttentionHeadDim &&
                               head_dim * kv_element_bytes(type) % 16 == 0,
                           "head_dim is ", head_dim,
                           "; a row of K must be a multiple of 16 bytes and ", "head_dim at most ",
                           kMaxAttentionHeadDim);
  AttentionLaunch how;
  how.kernel = kernel;
  how.instance = instance_for(kernel, type, head_dim);
  const auto bytes = [&](int ring) {
    return static_cast<size_t>(how.instance.fixed_bytes) +
           static_cast<size_t>(
               std::max(ring * how.instance.entry_bytes, how.instance.least_ring_bytes));
  };
  const auto longest = [&](size_t room) {
    int ring = kLongestAttentionRing;
    while (ring >= 2 && bytes(ring) > room) --ring;
    return ring;
  };
  if (kernel != AttentionKernel::kWarpgroup) {
    // A multiprocessor has what one block can have, and what CUDA reserves for that block.
    const size_t half = (shared_bytes_per_block + kReservedPerBlock) / 2;
    how.ring = longest(half - std::min(half, kReservedPerBlock));
  }
  // Decode lives on copies in flight; in prefill two blocks also cover each other's waits.
  const int enough = kernel == AttentionKernel::kNarrow ? 3 : 2;
  if (how.ring < enough) how.ring = longest(shared_bytes_per_block);
  // The warpgroup kernel waits for K of step n + 1 while it holds V of step n - 1, entries 2 n + 2
  // and 2 n - 1: with fewer than four it would wait for ever.
  const int least = kernel == AttentionKernel::kWarpgroup ? 4 : 2;
  require<Unsupported>(how.ring >= least, "attention with head_dim ", head_dim, " needs ",
                       bytes(least), " bytes of shared memory in a block; this device offers ",
                       shared_bytes_per_block);
  how.shared_bytes = bytes(how.ring);
  return how;
}

void launch_attention(const AttentionLaunch& how, AttentionParams params, const TensorMap* pages,
                      int num_bins, void* stream) {
  const KvPages& kv = params.kv;
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  require<InvalidArgument>(how.instance.launch != nullptr, "no attention kernel was chosen");
  require<InvalidArgument>(num_bins > 0 && params.group > 0 && kv.num_kv_heads > 0,
                           "num_bins, group and num_kv_heads must be positive");
  require<InvalidArgument>(kv.page_size == 16 || kv.page_size == 32 || kv.page_size == 64,
                           "page_size is ", kv.page_size, "; it must be 16, 32 or 64");
  require<InvalidArgument>(kv.block_stride % 16 == 0 && aligned(kv.pool) && aligned(params.q) &&
                               aligned(params.out) && aligned(params.accumulators),
                           "q, out, the accumulators and the blocks of the pool must be aligned to "
                           "16 bytes");
  require<InvalidArgument>(
      params.q_stride % 8 == 0 && params.out_stride % 8 == 0 && kv.head_dim % 8 == 0,
      "q_stride is ", params.q_stride, ", out_stride ", params.out_stride, " and head_dim ",
      kv.head_dim, "; all must be multiples of 8");
  require<InvalidArgument>(params.scale > 0.f, "scale is ", params.scale, "; it must be positive");
  require<InvalidArgument>(params.window >= 0, "window is ", params.window,
                           "; it must not be negative");
  require<InvalidArgument>(params.type != FloatType::kF32, "q and out must be bfloat16 or float16");
  require<InvalidArgument>(
      kv_has_scales(kv.type) || (kv.type == KvType::kBF16) == (params.type == FloatType::kBF16),
      "16-bit K and V must have the type of q");
  require<InvalidArgument>(how.kernel != AttentionKernel::kWarpgroup || pages != nullptr,
                           "the warpgroup kernel needs a tensor map of the pages");
  params.ring = how.ring;
  how.instance.launch(params, pages != nullptr ? *pages : TensorMap{},
                      Grid{static_cast<uint32_t>(num_bins), static_cast<uint32_t>(kv.num_kv_heads)},
                      how.shared_bytes, stream);
}

}  // namespace sagellm::kernels::cuda
