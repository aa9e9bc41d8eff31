// AVX2 element-wise kernels.
#include "attention.h"
#include "sagellm/kernels/cpu/isa_tables.h"
#include "sagellm/kernels/params.h"

// clang-format off: each of these builds on the ones before
#include "../simd_elementwise.h"
#include "../simd_math.h"
#include "vmath.h"
// clang-format on

namespace sagellm::kernels {

void fill_ops_avx2(KernelTable& table) {
  fill_elementwise(table);
  fill_attention_avx2(table);
}

}  // namespace sagellm::kernels
