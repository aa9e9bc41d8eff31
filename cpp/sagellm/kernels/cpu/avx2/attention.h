// The attention entries of the avx2 table.
#pragma once

#include "sagellm/kernels/params.h"

namespace sagellm::kernels {

void fill_attention_avx2(KernelTable& table);

}  // namespace sagellm::kernels
