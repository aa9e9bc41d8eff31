#include "sagellm/kernels/cuda/attention_kernel.cuh"

namespace sagellm::kernels::cuda {

AttentionInstance attention_d96(AttentionKernel kernel, KvType type) {
  return attention_instances<96>(kernel, type);
}

}  // namespace sagellm::kernels::cuda
