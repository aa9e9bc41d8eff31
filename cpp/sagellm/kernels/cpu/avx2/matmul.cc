#include "sagellm/kernels/cpu/avx2/mm_float.h"
#include "sagellm/kernels/cpu/avx2/mm_quantized.h"
#include "sagellm/kernels/cpu/isa_tables.h"

namespace sagellm::kernels {
namespace {

using F = PackedFormat;

void matmul(const MatmulParams& p) {
  switch (p.format) {
    case F::kF32:
      return matmul_float<F::kF32>(p);
    case F::kF16:
      return matmul_float<F::kF16>(p);
    case F::kBF16:
      return matmul_float<F::kBF16>(p);
    case F::kF8:
      return matmul_float<F::kF8>(p);
    case F::kQ4_0:
      return matmul_quantized<F::kQ4_0>(p);
    case F::kQ4_1:
      return matmul_quantized<F::kQ4_1>(p);
    case F::kQ5_0:
      return matmul_quantized<F::kQ5_0>(p);
    case F::kQ5_1:
      return matmul_quantized<F::kQ5_1>(p);
    case F::kQ8_0:
      return matmul_quantized<F::kQ8_0>(p);
    case F::kQ4_K:
      return matmul_quantized<F::kQ4_K>(p);
    case F::kQ5_K:
      return matmul_quantized<F::kQ5_K>(p);
    case F::kQ6_K:
      return matmul_quantized<F::kQ6_K>(p);
  }
}

}  // namespace

void fill_matmul_avx2(KernelTable& table) {
  for (int i = 0; i < kNumPackedFormats; ++i) {
    const bool is_float = i <= static_cast<int>(F::kF8);
    table.act_kind[i] = is_float ? ActKind::kF32 : ActKind::kI8;
  }
  table.matmul = matmul;
  fill_quantize_avx2(table);
}

}  // namespace sagellm::kernels
