// The entry points of the instruction-set folders. Each function sets the KernelTable entries that
// its folder improves and leaves the others; dispatch.cc calls them from the plainest set upwards.
#pragma once

#include "sagellm/kernels/params.h"

namespace sagellm::kernels {

// act_kind, matmul, quantize and to_bf16.
void fill_matmul_generic(KernelTable& table);
void fill_matmul_avx2(KernelTable& table);
void fill_matmul_avx512(KernelTable& table);
void fill_matmul_avx512_bf16(KernelTable& table);

// The matmul of the avx512 table, to which avx512_bf16 leaves every format but bf16.
void matmul_avx512(const MatmulParams& p);

// quantize and to_bf16 alone; called by fill_matmul_*.
void fill_quantize_generic(KernelTable& table);
void fill_quantize_avx2(KernelTable& table);
void fill_quantize_avx512(KernelTable& table);

// Every other entry.
void fill_ops_generic(KernelTable& table);
void fill_ops_avx2(KernelTable& table);
void fill_ops_avx512(KernelTable& table);
void fill_ops_avx512_bf16(KernelTable& table);

}  // namespace sagellm::kernels
