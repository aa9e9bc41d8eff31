// The attention entries of the avx512 table.
#pragma once

#include "sagellm/kernels/params.h"

namespace sagellm::kernels {

void fill_attention_avx512(KernelTable& table);

}  // namespace sagellm::kernels
