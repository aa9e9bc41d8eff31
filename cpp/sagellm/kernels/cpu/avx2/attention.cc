// AVX2 attention: bfloat16 K and V widened to fp32, int8 codes multiplied as integers.
#include "attention.h"

#include "sagellm/kernels/params.h"

// The vector type comes first, then what is written in terms of it.
// clang-format off
#include "vmath.h"
#include "../simd_math.h"
#include "../kv_page.h"
#include "../simd_attention.h"
#include "../simd_attention_coded.h"
// clang-format on

namespace sagellm::kernels {
namespace {

void attention(const AttentionParams& p) {
  if (p.kv.dtype == KvDtype::kI8) return attend<CodedPolicy>(p);
  attend<WidenPolicy>(p);
}

}  // namespace

void fill_attention_avx2(KernelTable& table) {
  table.attention = attention;
  table.attention_finish = attention_finish;
  table.attention_scratch_bytes = sizeof(AttentionScratch);
}

}  // namespace sagellm::kernels
