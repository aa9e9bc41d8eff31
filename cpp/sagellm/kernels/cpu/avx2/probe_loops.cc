// The multiply-accumulates of AVX2; see kernels/cpu/probe_loops.h.
#include "sagellm/kernels/cpu/probe_loops.h"

#include <immintrin.h>

namespace sagellm::kernels {
namespace {

constexpr int kChains = 10;

void run_f32(int64_t count) {
  __m256 sums[kChains] = {};
#pragma GCC unroll 10
  for (auto& sum : sums) asm volatile("" : "+x"(sum));  // no two are known to be equal
  __m256 x = _mm256_set1_ps(0.5f);
  for (int64_t n = 0; n < count; ++n) {
    asm volatile("" : "+x"(x));
#pragma GCC unroll 10
    for (int i = 0; i < kChains; ++i) sums[i] = _mm256_fmadd_ps(x, x, sums[i]);
  }
#pragma GCC unroll 10
  for (auto& sum : sums) asm volatile("" : : "x"(sum));
}

/// 32 products of bytes per instruction and the least that can be done with them: one addition.
/// Spelled in assembler, because the compiler would compute the same product once.
void run_i8(int64_t count) {
  __m256i sums[kChains] = {};
  const __m256i x = _mm256_set1_epi8(1);
  for (int64_t n = 0; n < count; ++n) {
#pragma GCC unroll 10
    for (int i = 0; i < kChains; ++i) {
      __m256i product;
      asm("vpmaddubsw %[x], %[x], %[product]\n\t"
          "vpaddw %[product], %[sum], %[sum]"
          : [sum] "+x"(sums[i]), [product] "=&x"(product)
          : [x] "x"(x));
    }
  }
#pragma GCC unroll 10
  for (auto& sum : sums) asm volatile("" : : "x"(sum));
}

uint64_t read(const void* data, int64_t bytes, int64_t passes) {
  const auto* lines = static_cast<const __m256i*>(data);
  __m256i sums[8] = {};
  for (int64_t pass = 0; pass < passes; ++pass) {
    asm volatile("" : "+r"(lines));
    for (int64_t i = 0; i < bytes / 32; i += 16) {
      for (int j = 0; j < 16; j += 2) {  // 4 KiB ahead: the hardware stops at the end of a page
        _mm_prefetch(reinterpret_cast<const char*>(lines + i + j + 128), _MM_HINT_T0);
      }
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        sums[j % 8] = _mm256_xor_si256(sums[j % 8], _mm256_loadu_si256(lines + i + j));
      }
    }
  }
  for (int j = 1; j < 8; ++j) sums[0] = _mm256_xor_si256(sums[0], sums[j]);
  return static_cast<uint64_t>(_mm256_extract_epi64(sums[0], 0) ^ _mm256_extract_epi64(sums[0], 1) ^
                               _mm256_extract_epi64(sums[0], 2) ^ _mm256_extract_epi64(sums[0], 3));
}

}  // namespace

void fill_probe_loops_avx2(ProbeLoops& loops) {
  loops.f32 = {"vfmadd ymm", int64_t{2} * 8 * kChains, run_f32};
  loops.bf16 = loops.f32;
  loops.i8 = {"vpmaddubsw + vpaddw ymm", int64_t{2} * 32 * kChains, run_i8};
  loops.read = read;
}

}  // namespace sagellm::kernels
