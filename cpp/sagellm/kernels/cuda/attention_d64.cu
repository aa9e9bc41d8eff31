#include "sagellm/kernels/cuda/attention_kernel.cuh"

namespace sagellm::kernels::cuda {

AttentionInstance attention_d64(AttentionKernel kernel, KvType type) {
  return attention_instances<64>(kernel, type);
}

}  // namespace sagellm::kernels::cuda
