// The avx512_bf16 table: everything but attention is inherited from avx512.
#include "attention.h"
#include "sagellm/kernels/cpu/isa_tables.h"
#include "sagellm/kernels/params.h"

namespace sagellm::kernels {

void fill_ops_avx512_bf16(KernelTable& table) { fill_attention_avx512_bf16(table); }

}  // namespace sagellm::kernels
