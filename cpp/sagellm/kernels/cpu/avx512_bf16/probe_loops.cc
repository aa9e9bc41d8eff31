// The multiply-accumulate of AVX-512 BF16; see kernels/cpu/probe_loops.h.
#include "sagellm/kernels/cpu/probe_loops.h"

#include <immintrin.h>

namespace sagellm::kernels {
namespace {

constexpr int kChains = 16;

void run_bf16(int64_t count) {
  __m512 sums[kChains] = {};
#pragma GCC unroll 16
  for (auto& sum : sums) asm volatile("" : "+v"(sum));  // no two are known to be equal
  __m512i x = _mm512_set1_epi16(0x3f00);                // 0.5
  for (int64_t n = 0; n < count; ++n) {
    asm volatile("" : "+v"(x));
    const __m512bh pairs = (__m512bh)x;
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], pairs, pairs);
  }
#pragma GCC unroll 16
  for (auto& sum : sums) asm volatile("" : : "v"(sum));
}

}  // namespace

void fill_probe_loops_avx512_bf16(ProbeLoops& loops) {
  loops.bf16 = {"vdpbf16ps zmm", int64_t{2} * 32 * kChains, run_bf16};
}

}  // namespace sagellm::kernels
