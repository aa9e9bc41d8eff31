// What Python cannot see of packing: ranges packed by several threads, source strides, exact bounds
// (ASan).
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "sagellm/base/dtype.h"
#include "sagellm/base/error.h"
#include "sagellm/quant/codec.h"
#include "sagellm/quant/pack.h"
#include "sagellm/quant/unpack.h"

namespace sagellm::quant {
namespace {

constexpr int64_t kColumns = 512;

std::vector<Format> packable() {
  std::vector<Format> out;
  for (int i = 0; i < kNumFormats; ++i) {
    if (static_cast<Format>(i) != Format::kQ2_K) out.push_back(static_cast<Format>(i));
  }
  return out;
}

std::vector<uint8_t> random_bytes(size_t size) {
  std::mt19937 random(7);
  std::vector<uint8_t> out(size);
  for (uint8_t& byte : out)
    byte = static_cast<uint8_t>(random() & 0x3f);  // small exponents: scales are finite
  return out;
}

class Pack : public testing::TestWithParam<Format> {};

TEST_P(Pack, DisjointRangesMayBePackedByThreads) {
  const int64_t n = 16 * 9 + 3;
  const auto row = static_cast<size_t>(row_bytes(GetParam(), kColumns));
  const std::vector<uint8_t> src = random_bytes(row * static_cast<size_t>(n));
  PackedMatrix whole = make_packed(GetParam(), n, kColumns);
  pack_row_blocks(GetParam(), src.data(), row, {}, whole, 0, whole.num_row_blocks());
  PackedMatrix parts = make_packed(GetParam(), n, kColumns);
  const auto pack = [&](int64_t begin, int64_t end) {
    pack_row_blocks(GetParam(), src.data(), row, {}, parts, begin, end);
  };
  std::thread other(pack, 4, parts.num_row_blocks());
  pack(0, 4);
  other.join();
  ASSERT_EQ(whole.bytes(), parts.bytes());
  EXPECT_EQ(std::memcmp(whole.storage.data(), parts.storage.data(), whole.bytes()), 0);
}

TEST_P(Pack, RowsMayLieApartAtAnyAddress) {
  const int64_t n = 5;
  const auto row = static_cast<size_t>(row_bytes(GetParam(), kColumns));
  const size_t stride = row + 3;
  const std::vector<uint8_t> src =
      random_bytes(1 + stride * static_cast<size_t>(n) - 3);  // ends with the last row
  PackedMatrix packed = make_packed(GetParam(), n, kColumns);
  pack_row_blocks(GetParam(), src.data() + 1, stride, {}, packed, 0, 1);
  std::vector<float> got(kColumns);
  std::vector<float> expected(kColumns);
  for (int64_t i = 0; i < n; ++i) {
    unpack_row(packed, i, got.data());
    dequantize_row(GetParam(), src.data() + 1 + stride * static_cast<size_t>(i), expected.data(),
                   kColumns);
    EXPECT_EQ(std::memcmp(got.data(), expected.data(), kColumns * sizeof(float)), 0) << i;
  }
}

TEST_P(Pack, RefusesWhatDoesNotFit) {
  const auto row = static_cast<size_t>(row_bytes(GetParam(), kColumns));
  const std::vector<uint8_t> src(row * 16);
  PackedMatrix packed = make_packed(GetParam(), 16, kColumns);
  const std::vector<int64_t> short_map(15);
  EXPECT_THROW(pack_row_blocks(GetParam(), src.data(), row, {}, packed, 0, 2), InvalidArgument);
  EXPECT_THROW(pack_row_blocks(GetParam(), src.data(), row, {}, packed, -1, 1), InvalidArgument);
  EXPECT_THROW(pack_row_blocks(GetParam(), src.data(), row, short_map, packed, 0, 1),
               InvalidArgument);
  EXPECT_THROW(pack_row_blocks(GetParam(), src.data(), row - 1, {}, packed, 0, 1), InvalidArgument);
  std::vector<float> out(kColumns);
  EXPECT_THROW(unpack_row(packed, 16, out.data()), InvalidArgument);
  EXPECT_THROW(unpack_row(packed, -1, out.data()), InvalidArgument);
}

INSTANTIATE_TEST_SUITE_P(Formats, Pack, testing::ValuesIn(packable()), [](const auto& test) {
  return std::string(format_info(test.param).name);
});

TEST(MakePacked, RefusesImpossibleSizes) {
  EXPECT_THROW(make_packed(Format::kF32, 0, 4), InvalidArgument);
  EXPECT_THROW(make_packed(Format::kF32, 4, 0), InvalidArgument);
  EXPECT_THROW(make_packed(Format::kF32, -1, 4), InvalidArgument);
  EXPECT_THROW(make_packed(Format::kF32, int64_t{1} << 32, 4), InvalidArgument);
  EXPECT_THROW(make_packed(Format::kQ4_K, 16, 32), InvalidArgument);
  EXPECT_THROW(make_packed(Format::kQ2_K, 16, 256), Unsupported);
}

TEST(PackRowBlocks, RefusesAMatrixMadeForAnotherFormat) {
  PackedMatrix packed = make_packed(Format::kQ4_0, 16, 32);
  const std::vector<uint8_t> src(16 * 20);
  EXPECT_THROW(pack_row_blocks(Format::kQ4_1, src.data(), 20, {}, packed, 0, 1), InvalidArgument);
}

TEST(Codec, RefusesPartialBlocks) {
  float value[256] = {};
  uint8_t bytes[512] = {};
  EXPECT_THROW(dequantize_row(Format::kQ4_0, bytes, value, 31), InvalidArgument);
  EXPECT_THROW(dequantize_row(Format::kQ6_K, bytes, value, 32), InvalidArgument);
  EXPECT_THROW(quantize_row(Format::kQ8_0, value, bytes, 33), InvalidArgument);
  EXPECT_THROW(quantize_row(Format::kQ6_K, value, bytes, 256), Unsupported);
  EXPECT_NO_THROW(dequantize_row(Format::kQ4_0, bytes, value, 0));
}

}  // namespace
}  // namespace sagellm::quant
