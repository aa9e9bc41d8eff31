#include "sagellm/kernels/cuda/attention_kernel.cuh"

namespace sagellm::kernels::cuda {

AttentionInstance attention_d128(AttentionKernel kernel, KvType type) {
  return attention_instances<128>(kernel, type);
}

}  // namespace sagellm::kernels::cuda
