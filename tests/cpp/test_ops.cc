// Shape checks, the table of every device, and what Python cannot reach of the operations: strided
// rows, every instruction set, registration from many threads.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/kernels/cpu/dispatch.h"
#include "sagellm/kernels/cpu/ops_cpu.h"
#include "sagellm/ops/gated_activation.h"
#include "sagellm/ops/kv_write.h"
#include "sagellm/ops/linear.h"
#include "sagellm/ops/paged_attention.h"
#include "sagellm/ops/rms_norm.h"
#include "sagellm/ops/rope.h"
#include "sagellm/quant/codec.h"
#include "sagellm/runtime/op_table.h"
#include "sagellm/tensor/matcher.h"

namespace sagellm {
namespace {

constexpr Device kCuda1{.kind = Device::Kind::kCuda, .index = 1};

std::vector<float> random_floats(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

/// The message of the E that `call` throws.
template <typename E>
std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const E& error) {
    return error.what();
  }
  ADD_FAILURE() << "no error";
  return "";
}

TEST(Device, NamesAreReadAndWritten) {
  EXPECT_EQ(parse_device("cpu"), Device{});
  EXPECT_EQ(parse_device("cuda"), (Device{Device::Kind::kCuda, 0}));
  EXPECT_EQ(parse_device("cuda:1"), kCuda1);
  EXPECT_EQ(to_string(kCuda1), "cuda:1");
  EXPECT_EQ(to_string(Device{}), "cpu");
  for (const char* bad : {"", "cpu:0", "cuda:", "cuda:-1", "cuda:1x", "cuda:99999999999", "gpu"})
    EXPECT_THROW(parse_device(bad), InvalidArgument) << bad;
}

TEST(Matcher, BindsNamesOnFirstUseAndComparesAfter) {
  std::vector<float> memory(12);
  Matcher match("op", Device{});
  match.tensor("x", dense_view(memory.data(), {3, 4}), ElementType::kF32, {"rows", "n"});
  match.tensor("weight", dense_view(memory.data(), {4}), ElementType::kF32, {"n"});
  match.tensor("pair", dense_view(memory.data(), {2}), ElementType::kF32, {2});
  EXPECT_EQ(match["rows"], 3);
  EXPECT_EQ(match["n"], 4);
  EXPECT_THROW(match["m"], InvalidArgument);
  EXPECT_THROW(match.bind("n", 4, "again"), InvalidArgument);
}

TEST(Matcher, EveryMismatchNamesOperationTensorAxisExpectedAndFound) {
  std::vector<float> memory(64);
  const auto check = [](ConstTensorView view) {
    return message_of<InvalidArgument>([&] {
      Matcher match("op", Device{});
      match.bind("n", 4, "weight");
      match.tensor("x", view, ElementType::kF32, {"rows", "n"});
    });
  };
  ConstTensorView x = dense_view(memory.data(), {3, 5});
  EXPECT_EQ(check(x), "op: axis 1 of x is 5, must be 4 (n of weight)");
  EXPECT_EQ(check(dense_view(memory.data(), {4})), "op: x has 1 axes, must have shape [rows, n]");
  EXPECT_EQ(check(dense_view(memory.data(), {-1, 4})), "op: axis 0 of x is -1, must be positive");
  EXPECT_EQ(check(dense_view(memory.data(), {3, 0})), "op: axis 1 of x is 0, must be positive");
  x = dense_view(memory.data(), {3, 4});
  x.type = ElementType::kBF16;
  EXPECT_EQ(check(x), "op: x is bfloat16, must be float32");
  x = dense_view(memory.data(), {3, 4}, kCuda1);
  EXPECT_EQ(check(x), "op: x is on cuda:1, must be on cpu");
  x = dense_view(memory.data(), {3, 4});
  x.strides[1] = 2;
  EXPECT_EQ(check(x), "op: axis 1 of x has stride 2, must be 1");
  x.strides = {3, 1};
  EXPECT_EQ(check(x), "op: axis 0 of x has stride 3, must be 4 or more");
  x = dense_view(static_cast<float*>(nullptr), {3, 4});
  EXPECT_EQ(check(x), "op: x has no memory");
}

TEST(Matcher, AcceptsStridedRowsEmptyTensorsAndAnyStrideOfOneRow) {
  std::vector<float> memory(64);
  Matcher match("op", Device{});
  ConstTensorView x = dense_view(memory.data(), {3, 4});
  x.strides[0] = 20;
  match.tensor("strided", x, ElementType::kF32, {3, "n"});
  x.shape[0] = 1;
  x.strides[0] = -7;
  match.tensor("single", x, ElementType::kF32, {1, "n"});
  match.tensor("empty", dense_view(static_cast<float*>(nullptr), {0, 4}), ElementType::kF32,
               {0, "n"});
}

std::atomic<int> calls{0};
constexpr runtime::OpTable kCounting{
    .linear = [](Device, const kernels::LinearParams&) {},
    .rms_norm = [](Device device, const kernels::RmsNormParams&) { calls += device.index; },
    .rope = [](Device, const kernels::RopeParams&) {},
    .gated_activation = [](Device, const kernels::GatedActivationParams&) {},
    .kv_write = [](Device, const kernels::KvWriteBatchParams&) {},
    .paged_attention = [](Device, const kernels::PagedAttentionParams&) {},
};

TEST(OpTable, AnAbsentDeviceIsRefusedUntilItsTableIsRegisteredOnce) {
  float value = 1.f;
  const TensorView x = dense_view(&value, {1, 1}, kCuda1);
  const TensorView weight = dense_view(&value, {1}, kCuda1);
  EXPECT_EQ(message_of<Unsupported>([&] { ops::rms_norm(x, weight, 0.f, x); }),
            "no operations for device cuda:1 in this process; present: cpu");
  runtime::OpTable incomplete = kCounting;
  incomplete.rope = nullptr;
  EXPECT_THROW(runtime::register_op_table(Device::Kind::kCuda, &incomplete), InvalidArgument);
  EXPECT_THROW(runtime::register_op_table(Device::Kind::kCuda, nullptr), InvalidArgument);
  const runtime::OpTableHandover other{
      .layout = runtime::op_table_layout() + 1, .kind = Device::Kind::kCuda, .table = &kCounting};
  EXPECT_THROW(runtime::register_op_table(other), InvalidArgument);

  const std::vector<runtime::OpTable> rivals(8, kCounting);
  std::atomic<int> accepted{0};
  std::vector<std::thread> threads;
  for (const runtime::OpTable& rival : rivals) {
    threads.emplace_back([&] {
      try {
        runtime::register_op_table(Device::Kind::kCuda, &rival);
        ++accepted;
      } catch (const InvalidArgument&) {  // another thread was first
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(accepted, 1);
  const runtime::OpTable& winner = runtime::op_table(kCuda1);
  runtime::register_op_table({.kind = Device::Kind::kCuda, .table = &winner});
  EXPECT_THROW(runtime::register_op_table(Device::Kind::kCpu, &winner), InvalidArgument);
  EXPECT_EQ(runtime::device_kinds().size(), 2u);
  ops::rms_norm(x, weight, 0.f, x);
  EXPECT_EQ(calls, 1);  // routed by kind, with the index passed on
  EXPECT_EQ(value, 1.f);
}

class OpsCpu : public ::testing::TestWithParam<std::string> {
 protected:
  const kernels::KernelTable& table() const { return kernels::kernel_table(GetParam()); }
};

TEST_P(OpsCpu, LinearIsBatchInvariantAndStaysInsideItsRows) {
  constexpr int64_t kN = 37, kK = 64, kTokens = 100, kXStride = 70, kOutStride = 41;
  for (const Format format : {Format::kF32, Format::kBF16, Format::kQ8_0}) {
    const std::vector<float> values = random_floats(kN * kK, 1);
    const int64_t row = row_bytes(format, kK);
    std::vector<uint8_t> raw(static_cast<size_t>(kN * row));
    quant::quantize_row(format, values.data(), raw.data(), kN * kK);
    quant::PackedMatrix matrix = quant::make_packed(format, kN, kK);
    quant::pack_row_blocks(format, raw.data(), static_cast<size_t>(row), {}, matrix, 0,
                           matrix.num_row_blocks());
    const std::vector<float> x = random_floats(kTokens * kXStride, 2);
    std::vector<float> out(static_cast<size_t>(kTokens * kOutStride), -7.f);
    kernels::LinearParams p;
    p.format = matrix.format;
    p.weights = matrix.storage.data();
    p.n = kN;
    p.k = kK;
    p.precision = kernels::ActPrecision::kA15;
    p.num_tokens = kTokens;
    p.x = x.data();
    p.x_stride = kXStride;
    p.out = out.data();
    p.out_stride = kOutStride;
    kernels::cpu::linear(table(), p);
    std::vector<float> single(kN);
    p.num_tokens = 1;
    p.out = single.data();
    for (int64_t t = 0; t < kTokens; ++t) {
      p.x = x.data() + t * kXStride;
      kernels::cpu::linear(table(), p);
      for (int64_t i = 0; i < kOutStride; ++i) {
        const float expected = i < kN ? single[static_cast<size_t>(i)] : -7.f;
        ASSERT_EQ(out[static_cast<size_t>(t * kOutStride + i)], expected) << t << " " << i;
      }
    }
  }
}

TEST_P(OpsCpu, AttentionOfARaggedBatchEqualsItsTokensOneByOne) {
  constexpr int kHeads = 6, kKvHeads = 2, kDim = 32, kBlock = 16;
  kv::KvStorage storage(64, 2, kKvHeads, kDim, kBlock);
  // Three sequences of 5, 40 and 1 rows that start at positions 0, 11 and 530.
  const std::vector<int32_t> starts{0, 5, 45, 46}, first{0, 11, 530};
  constexpr int64_t kTokens = 46, kMaxBlocks = 34;
  std::vector<int32_t> tables(3 * kMaxBlocks);
  for (size_t i = 0; i < tables.size(); ++i) tables[i] = static_cast<int32_t>(1 + (i * 7) % 64);
  std::vector<int32_t> positions;
  for (size_t s = 0; s < 3; ++s) {
    for (int32_t t = starts[s]; t < starts[s + 1]; ++t)
      positions.push_back(first[s] + t - starts[s]);
  }
  const std::vector<float> q = random_floats(kTokens * kHeads * kDim, 1);
  std::vector<float> out(q.size());
  kernels::PagedAttentionParams p;
  p.kv = storage.view(1);
  const std::vector<float> pages = random_floats(65 * p.kv.block_stride, 2);
  for (int block = 0; block < 65; ++block)
    table().to_bf16(pages.data(),
                    reinterpret_cast<uint16_t*>(p.kv.pool + block * p.kv.block_stride),
                    kKvHeads * p.kv.head_stride / 2);
  p.num_kv_heads = kKvHeads;
  p.num_heads = kHeads;
  p.batch = {3, starts.data(), positions.data(), tables.data(), kMaxBlocks};
  p.q = q.data();
  p.q_stride = p.out_stride = kHeads * kDim;
  p.out = out.data();
  p.window = 25;
  p.scale = 0.2f;
  kernels::cpu::paged_attention(table(), p);
  const std::vector<int32_t> one{0, 1};
  std::vector<float> single(kHeads * kDim);
  for (size_t s = 0; s < 3; ++s) {
    for (int32_t t = starts[s]; t < starts[s + 1]; ++t) {
      const int64_t at = int64_t{t} * kHeads * kDim;
      p.batch = {1, one.data(), positions.data() + t, tables.data() + s * kMaxBlocks, kMaxBlocks};
      p.q = q.data() + at;
      p.out = single.data();
      kernels::cpu::paged_attention(table(), p);
      for (size_t i = 0; i < single.size(); ++i)
        ASSERT_EQ(out[static_cast<size_t>(at) + i], single[i]) << t << " " << i;
    }
  }
}

TEST_P(OpsCpu, KvWriteTakesKeysAndValuesOfDifferentStrides) {
  constexpr int kDim = 16, kTokens = 21;
  kv::KvStorage together(4, 1, 1, kDim, 16), apart(4, 1, 1, kDim, 16);
  const std::vector<int32_t> starts{0, kTokens}, blocks{3, 1};
  std::vector<int32_t> positions(kTokens);
  std::iota(positions.begin(), positions.end(), 3);
  const std::vector<float> k = random_floats(kTokens * kDim, 1);
  const std::vector<float> v = random_floats(kTokens * kDim, 2);
  std::vector<float> wide(kTokens * 40);
  for (size_t t = 0; t < kTokens; ++t) std::copy_n(v.data() + t * kDim, kDim, wide.data() + t * 40);
  kernels::KvWriteBatchParams p;
  p.num_kv_heads = 1;
  p.batch = {1, starts.data(), positions.data(), blocks.data(), 2};
  p.k = k.data();
  p.k_stride = p.v_stride = kDim;
  p.v = v.data();
  p.kv = together.view(0);
  kernels::cpu::kv_write(table(), p);
  p.v = wide.data();
  p.v_stride = 40;
  p.kv = apart.view(0);
  kernels::cpu::kv_write(table(), p);
  const uint8_t* a = together.view(0).pool;
  const uint8_t* b = apart.view(0).pool;
  EXPECT_TRUE(std::equal(a, a + together.bytes(), b));
  EXPECT_NE(std::count(a, a + together.bytes(), 0), together.bytes());
}

INSTANTIATE_TEST_SUITE_P(Isa, OpsCpu, ::testing::ValuesIn(kernels::available_isas()),
                         [](const auto& parameter) { return parameter.param; });

TEST(Ops, WeightsAndPagesThatNoKernelCanReadAreRefused) {
  std::vector<float> memory(64);
  const TensorView x = dense_view(memory.data(), {1, 40});
  ops::LinearWeight weight{kernels::PackedFormat::kQ4_0, memory.data(), 16, 40, Device{}};
  EXPECT_THROW(ops::linear(weight, x, kernels::ActPrecision::kA8, x), InvalidArgument);
  weight.data = nullptr;
  EXPECT_THROW(ops::linear(weight, x, kernels::ActPrecision::kA8, x), InvalidArgument);
  uint8_t page = 0;
  constexpr auto kBF16 = kernels::KvDtype::kBF16;
  const TensorView q = dense_view(memory.data(), {1, 1, 16});
  for (const kernels::KvView& view :
       {kernels::KvView{nullptr, 1024, 1024, 16, 16, 1024, kBF16},
        kernels::KvView{&page, 1024, 1024, 8, 16, 1024, kBF16},
        kernels::KvView{&page, 1536, 1536, 16, 24, 1536, kBF16},
        kernels::KvView{&page, 32768, 32768, 16, 512, 32768, kBF16},
        kernels::KvView{&page, 1024, 1024, 16, 16, 1024, kernels::KvDtype::kI8}}) {
    EXPECT_THROW(ops::kv_write({view, 1, 1, Device{}}, {}, q, q), InvalidArgument);
  }
}

}  // namespace
}  // namespace sagellm
