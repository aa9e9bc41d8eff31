// The AVX-512 intrinsics: the compiler's, or with SAGELLM_SIMDE (tests only) SIMDe's emulation, so
// that the same kernels run on machines without AVX-512. No other file of this folder or of
// avx512_bf16 includes intrinsics.
#pragma once

#ifdef SAGELLM_SIMDE
#include "avx512_emulation.h"  // tests/cpp/simd_emulation
#define SAGELLM_INLINE inline  // emulated instructions are long: calls keep compile times sane
#else
#include <immintrin.h>
#define SAGELLM_INLINE inline __attribute__((always_inline))
#endif
