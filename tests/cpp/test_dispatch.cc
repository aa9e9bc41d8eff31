// Choice of the kernel table, and the matmul and quantize entries of every table that this machine runs.
#include "sagellm/kernels/cpu/dispatch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "sagellm/base/error.h"
#include "simd_emulation/matmul_checks.h"

namespace sagellm::kernels {
namespace {

TEST(Dispatch, GenericRunsEverywhereAndComesFirst) {
  ASSERT_FALSE(available_isas().empty());
  EXPECT_EQ(available_isas().front(), "generic");
}

TEST(Dispatch, EveryTableIsCompleteAndNamed) {
  for (const std::string& isa : available_isas()) {
    SCOPED_TRACE(isa);
    const KernelTable& table = kernel_table(isa);
    EXPECT_EQ(table.name, isa);
    EXPECT_NE(table.matmul, nullptr);
    EXPECT_NE(table.quantize, nullptr);
    EXPECT_NE(table.to_bf16, nullptr);
    EXPECT_NE(table.rms_norm, nullptr);
    EXPECT_NE(table.add, nullptr);
    EXPECT_NE(table.scale, nullptr);
    EXPECT_NE(table.rope, nullptr);
    EXPECT_NE(table.silu_mul, nullptr);
    EXPECT_NE(table.gelu_tanh_mul, nullptr);
    EXPECT_NE(table.softcap, nullptr);
    EXPECT_NE(table.kv_write, nullptr);
    EXPECT_NE(table.attention, nullptr);
    EXPECT_NE(table.attention_finish, nullptr);
    EXPECT_GT(table.attention_scratch_bytes, 0u);
    EXPECT_NE(table.argmax, nullptr);
    EXPECT_NE(table.sum_exp, nullptr);
  }
}

TEST(Dispatch, UnknownNameIsRefusedWithTheAvailableOnes) {
  try {
    kernel_table("sse9");
    FAIL() << "no error";
  } catch (const Unsupported& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("sse9"), std::string::npos);
    for (const std::string& isa : available_isas()) EXPECT_NE(message.find(isa), std::string::npos);
  }
}

// The choice is made once per process, so each case runs in a process of its own.
TEST(DispatchDeathTest, EnvironmentVariableChoosesTheTable) {
  const auto exit_with_choice = [](const char* value, const std::string& expected) {
    setenv("SAGELLM_CPU_ISA", value, 1);
    std::exit(kernel_table().name == expected ? 0 : 1);
  };
  for (const std::string& isa : available_isas()) {
    EXPECT_EXIT(exit_with_choice(isa.c_str(), isa), ::testing::ExitedWithCode(0), "");
  }
  EXPECT_EXIT(exit_with_choice("", available_isas().back()), ::testing::ExitedWithCode(0), "");
}

TEST(DispatchDeathTest, EnvironmentVariableWithAnUnknownNameIsAnErrorEveryTime) {
  const auto refuse_twice = [] {
    setenv("SAGELLM_CPU_ISA", "mmx", 1);
    int refused = 0;
    for (int i = 0; i < 2; ++i) {
      try {
        kernel_table();
      } catch (const Unsupported&) {
        ++refused;
      }
    }
    std::exit(refused == 2 ? 0 : 1);
  };
  EXPECT_EXIT(refuse_twice(), ::testing::ExitedWithCode(0), "");
}

TEST(CpuInfo, FeaturesCoverTheTablesThatRun) {
  const auto names = cpu_info().features();
  const auto has = [&](const char* name) { return std::find(names.begin(), names.end(), name) != names.end(); };
  for (const std::string& isa : available_isas()) {
    if (isa == "avx2") EXPECT_TRUE(has("avx2") && has("fma") && has("f16c"));
    if (isa == "avx512") EXPECT_TRUE(has("avx512f") && has("avx512vnni"));
    if (isa == "avx512_bf16") EXPECT_TRUE(has("avx512bf16"));
  }
}

class Tables : public ::testing::TestWithParam<std::string> {};

TEST_P(Tables, MatmulEqualsGenericAndIsBatchInvariant) {
  testing::check_matmul(kernel_table(GetParam()), {1, 2, 3, 5, 8, 13, 37});
}

TEST_P(Tables, QuantizeEqualsGeneric) { testing::check_quantize(kernel_table(GetParam())); }

INSTANTIATE_TEST_SUITE_P(Isa, Tables, ::testing::ValuesIn(available_isas()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace sagellm::kernels
