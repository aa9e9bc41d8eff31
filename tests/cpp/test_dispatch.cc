// Choice of the kernel table, and the matmul and quantize entries of every table that this machine
// runs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "sagellm/base/error.h"
#include "sagellm/kernels/cpu/dispatch.h"
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
    EXPECT_NE(table.sampling_weights, nullptr);
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
  const auto has = [&](const char* name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  for (const std::string& isa : available_isas()) {
    if (isa == "avx2") {
      EXPECT_TRUE(has("avx2") && has("fma") && has("f16c"));
    }
    if (isa == "avx512") {
      EXPECT_TRUE(has("avx512f") && has("avx512vnni"));
    }
    if (isa == "avx512_bf16") {
      EXPECT_TRUE(has("avx512bf16"));
    }
  }
}

class Tables : public ::testing::TestWithParam<std::string> {};

TEST_P(Tables, MatmulEqualsGenericAndIsBatchInvariant) {
  testing::check_matmul(kernel_table(GetParam()), {1, 2, 3, 5, 8, 13, 37});
}

TEST_P(Tables, QuantizeEqualsGeneric) { testing::check_quantize(kernel_table(GetParam())); }

TEST_P(Tables, ToBf16RoundsToNearestEvenAndKeepsNan) {
  const uint32_t bits[] = {0x3f800000, 0x3f808000, 0x3f808001, 0x3f818000, 0xbf817fff,
                           0x7f7fffff, 0x7f800000, 0x7f800001, 0xffffffff, 0x00000001,
                           0x00008001, 0x80000000, 0x7fc00000, 0x3f807fff, 0x40490fdb,
                           0xc2f6e979, 0x3f818000, 0x7f800001, 0x3eaaaaab};
  const uint16_t expected[] = {0x3f80, 0x3f80, 0x3f81, 0x3f82, 0xbf81, 0x7f80, 0x7f80,
                               0x7fc0, 0xffff, 0x0000, 0x0001, 0x8000, 0x7fc0, 0x3f80,
                               0x4049, 0xc2f7, 0x3f82, 0x7fc0, 0x3eab};
  float x[std::size(bits)];
  std::memcpy(x, bits, sizeof(x));
  for (size_t n = 0; n <= std::size(bits); ++n) {
    std::vector<uint16_t> out(std::size(bits), 0xabcd);
    kernel_table(GetParam()).to_bf16(x, out.data(), static_cast<int64_t>(n));
    for (size_t i = 0; i < out.size(); ++i)
      EXPECT_EQ(out[i], i < n ? expected[i] : 0xabcd) << i << " of " << n;
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, Tables, ::testing::ValuesIn(available_isas()),
                         [](const auto& parameter) { return parameter.param; });

}  // namespace
}  // namespace sagellm::kernels
