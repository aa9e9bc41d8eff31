// AVX-512 element-wise kernels.
#include "attention.h"
#include "sagellm/kernels/cpu/isa_tables.h"
#include "sagellm/kernels/params.h"

// The vector type comes first, then what is written in terms of it.
// clang-format off
#include "vmath.h"
#include "../simd_math.h"
#include "../kv_page.h"
#include "../simd_elementwise.h"
// clang-format on

namespace sagellm::kernels {

void fill_ops_avx512(KernelTable& table) {
  fill_elementwise(table);
  fill_attention_avx512(table);
}

}  // namespace sagellm::kernels
