// The AVX-512 matmul and quantize kernels, compiled from the same source over SIMDe, on a machine
// without AVX-512.
#include <gtest/gtest.h>

#include "matmul_checks.h"

namespace sagellm::kernels {
namespace {

TEST(SimdEmulation, Avx512MatmulEqualsGenericAndIsBatchInvariant) {
  KernelTable table{};
  table.name = "avx512 (emulated)";
  fill_matmul_avx512(table);
  testing::check_matmul(table, {1, 3, 13, 23});
}

TEST(SimdEmulation, Avx512Bf16MatmulIsExactEnoughAndBatchInvariant) {
  KernelTable table{};
  table.name = "avx512_bf16 (emulated)";
  fill_matmul_avx512_bf16(table);
  testing::check_matmul(table, {2, 31});
}

TEST(SimdEmulation, Avx512QuantizeEqualsGeneric) {
  KernelTable table{};
  table.name = "avx512 (emulated)";
  fill_quantize_avx512(table);
  testing::check_quantize(table);
}

}  // namespace
}  // namespace sagellm::kernels
