// AVX-512 attention: bfloat16 K and V widened to fp32.
#include "attention.h"

#include "sagellm/kernels/params.h"

// clang-format off: each of these builds on the ones before
#include "../simd_attention.h"
#include "../simd_math.h"
#include "vmath.h"
// clang-format on

namespace sagellm::kernels {
namespace {

void attention(const AttentionParams& p) { attend<WidenPolicy>(p); }

}  // namespace

void fill_attention_avx512(KernelTable& table) {
  table.attention = attention;
  table.attention_finish = attention_finish;
  table.attention_scratch_bytes = sizeof(AttentionScratch);
}

}  // namespace sagellm::kernels
