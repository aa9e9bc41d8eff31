// The AVX-512 attention and element-wise kernels, run through SIMDe on machines that have AVX2
// only. This folder's CMakeLists.txt compiles the sources of kernels/cpu/avx512 and avx512_bf16
// with SAGELLM_SIMDE defined.
#include <gtest/gtest.h>

#include "attention_cases.h"
#include "sagellm/kernels/cpu/isa_tables.h"

namespace sagellm::kernels {
namespace {

KernelTable generic() {
  KernelTable table{};
  table.name = "generic";
  fill_ops_generic(table);
  return table;
}

KernelTable emulated_avx512() {
  KernelTable table = generic();
  table.name = "avx512";
  fill_ops_avx512(table);
  return table;
}

KernelTable emulated_avx512_bf16() {
  KernelTable table = emulated_avx512();
  table.name = "avx512_bf16";
  fill_ops_avx512_bf16(table);
  return table;
}

class EmulatedAttention : public ::testing::TestWithParam<KernelTable (*)()> {};

TEST_P(EmulatedAttention, AgreesWithGeneric) {
  for (const KvDtype dtype : kDtypes) expect_agreement(GetParam()(), generic(), dtype);
}
TEST_P(EmulatedAttention, RowsAreBitwiseIndependent) {
  for (const KvDtype dtype : kDtypes) expect_row_independence(GetParam()(), dtype);
}
TEST_P(EmulatedAttention, SplitsMergeToTheSameBits) {
  for (const KvDtype dtype : kDtypes) expect_split_merge(GetParam()(), dtype);
}
TEST_P(EmulatedAttention, WritesTheCodesOfGeneric) { expect_same_codes(GetParam()(), generic()); }
TEST_P(EmulatedAttention, ElementwiseAgreesWithGeneric) {
  expect_elementwise_agreement(GetParam()(), generic());
}

INSTANTIATE_TEST_SUITE_P(Isa, EmulatedAttention,
                         ::testing::Values(&emulated_avx512, &emulated_avx512_bf16));

}  // namespace
}  // namespace sagellm::kernels
