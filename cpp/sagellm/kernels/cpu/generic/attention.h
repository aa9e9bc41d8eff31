// The attention entries of the generic table.
#pragma once

#include "sagellm/kernels/params.h"

namespace sagellm::kernels {

void fill_attention_generic(KernelTable& table);

}  // namespace sagellm::kernels
