// Attention and element-wise kernels of every table that runs here, through the C++ interface:
// agreement with the generic table, bitwise row independence, and exact bounds of what is read and
// written (ASan sees the rest).
#include <gtest/gtest.h>

#include <string>

#include "attention_cases.h"
#include "sagellm/kernels/cpu/dispatch.h"

namespace sagellm::kernels {
namespace {

class Attention : public ::testing::TestWithParam<std::string> {
 protected:
  const KernelTable& table() { return kernel_table(GetParam()); }
};

TEST_P(Attention, AgreesWithGeneric) {
  for (const KvDtype dtype : kDtypes) expect_agreement(table(), kernel_table("generic"), dtype);
}
TEST_P(Attention, RowsAreBitwiseIndependent) {
  for (const KvDtype dtype : kDtypes) expect_row_independence(table(), dtype);
}
TEST_P(Attention, SplitsMergeToTheSameBits) {
  for (const KvDtype dtype : kDtypes) expect_split_merge(table(), dtype);
}
TEST_P(Attention, WritesTheCodesOfGeneric) { expect_same_codes(table(), kernel_table("generic")); }
TEST_P(Attention, ElementwiseAgreesWithGeneric) {
  expect_elementwise_agreement(table(), kernel_table("generic"));
}

INSTANTIATE_TEST_SUITE_P(Isa, Attention, ::testing::ValuesIn(available_isas()),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace sagellm::kernels
