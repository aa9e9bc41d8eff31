// AVX2 attention: bfloat16 K and V widened to fp32.
#include "sagellm/kernels/params.h"

#include "vmath.h"
//
#include "../simd_math.h"
//
#include "../simd_attention.h"
#include "attention.h"

namespace sagellm::kernels {
namespace {

void attention(const AttentionParams& p) { attend<WidenPolicy>(p); }

}  // namespace

void fill_attention_avx2(KernelTable& table) {
  table.attention = attention;
  table.attention_finish = attention_finish;
  table.attention_scratch_bytes = sizeof(AttentionScratch);
}

}  // namespace sagellm::kernels
