#include "sagellm/kernels/cpu/avx512_bf16/mm_bf16.h"
#include "sagellm/kernels/cpu/isa_tables.h"

namespace sagellm::kernels {
namespace {

void matmul(const MatmulParams& p) {
  if (p.format == PackedFormat::kBF16) return matmul_bf16(p);
  matmul_avx512(p);
}

}  // namespace

void fill_matmul_avx512_bf16(KernelTable& table) {
  fill_matmul_avx512(table);
  table.act_kind[static_cast<int>(PackedFormat::kBF16)] = ActKind::kBF16;
  table.matmul = matmul;
}

}  // namespace sagellm::kernels
