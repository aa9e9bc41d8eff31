// The whole-tensor operations on the CPU, by the kernels of one instruction set. Single-threaded:
// the parallel path is the decoder's. Parameters are checked by ops/. They throw DeviceError when
// scratch memory is refused.
#pragma once

#include "sagellm/kernels/op_params.h"

namespace sagellm::kernels::cpu {

void linear(const KernelTable& table, const LinearParams& p);
void rms_norm(const KernelTable& table, const RmsNormParams& p);
void rope(const KernelTable& table, const RopeParams& p);
void gated_activation(const KernelTable& table, const GatedActivationParams& p);
void kv_write(const KernelTable& table, const KvWriteBatchParams& p);
void paged_attention(const KernelTable& table, const PagedAttentionParams& p);

}  // namespace sagellm::kernels::cpu
