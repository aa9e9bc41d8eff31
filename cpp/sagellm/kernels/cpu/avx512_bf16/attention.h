// The attention entries of the avx512_bf16 table.
#pragma once

#include "sagellm/kernels/params.h"

namespace sagellm::kernels {

void fill_attention_avx512_bf16(KernelTable& table);

}  // namespace sagellm::kernels
