// The multiply-accumulates of AVX-512 with VNNI; see kernels/cpu/probe_loops.h.
#include "sagellm/kernels/cpu/probe_loops.h"

#include <immintrin.h>

namespace sagellm::kernels {
namespace {

constexpr int kChains = 16;

void run_f32(int64_t count) {
  __m512 sums[kChains] = {};
#pragma GCC unroll 16
  for (auto& sum : sums) asm volatile("" : "+v"(sum));  // no two are known to be equal
  __m512 x = _mm512_set1_ps(0.5f);
  for (int64_t n = 0; n < count; ++n) {
    asm volatile("" : "+v"(x));
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_fmadd_ps(x, x, sums[i]);
  }
#pragma GCC unroll 16
  for (auto& sum : sums) asm volatile("" : : "v"(sum));
}

void run_i8(int64_t count) {
  __m512i sums[kChains] = {};
#pragma GCC unroll 16
  for (auto& sum : sums) asm volatile("" : "+v"(sum));  // no two are known to be equal
  __m512i x = _mm512_set1_epi8(1);
  for (int64_t n = 0; n < count; ++n) {
    asm volatile("" : "+v"(x));
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], x, x);
  }
#pragma GCC unroll 16
  for (auto& sum : sums) asm volatile("" : : "v"(sum));
}

uint64_t read(const void* data, int64_t bytes, int64_t passes) {
  const auto* lines = static_cast<const __m512i*>(data);
  __m512i sums[8] = {};
  for (int64_t pass = 0; pass < passes; ++pass) {
    asm volatile("" : "+r"(lines));
    for (int64_t i = 0; i < bytes / 64; i += 8) {
      for (int j = 0; j < 8; ++j) {  // 4 KiB ahead: the hardware stops at the end of a page
        _mm_prefetch(reinterpret_cast<const char*>(lines + i + j + 64), _MM_HINT_T0);
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j)
        sums[j] = _mm512_xor_si512(sums[j], _mm512_loadu_si512(lines + i + j));
    }
  }
  for (int j = 1; j < 8; ++j) sums[0] = _mm512_xor_si512(sums[0], sums[j]);
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(sums[0]));
}

}  // namespace

void fill_probe_loops_avx512(ProbeLoops& loops) {
  loops.f32 = {"vfmadd zmm", int64_t{2} * 16 * kChains, run_f32};
  loops.bf16 = loops.f32;
  loops.i8 = {"vpdpbusd zmm", int64_t{2} * 64 * kChains, run_i8};
  loops.read = read;
}

}  // namespace sagellm::kernels
