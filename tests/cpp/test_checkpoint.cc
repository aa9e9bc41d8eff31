// What Python cannot see of the readers: exact bounds (under ASan), types of metadata, lifetimes,
// text.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/checkpoint/gguf.h"
#include "sagellm/checkpoint/json_cursor.h"
#include "sagellm/checkpoint/safetensors.h"
#include "sagellm/checkpoint/text.h"

namespace sagellm::checkpoint {
namespace {

/// Builds a file field by field.
class Bytes {
 public:
  template <typename T>
  Bytes& put(T value) {
    const auto* p = reinterpret_cast<const uint8_t*>(&value);
    bytes_.insert(bytes_.end(), p, p + sizeof value);
    return *this;
  }
  Bytes& chars(std::string_view text) {
    bytes_.insert(bytes_.end(), text.begin(), text.end());
    return *this;
  }
  Bytes& string(std::string_view text) { return put(uint64_t{text.size()}).chars(text); }
  Bytes& pad(size_t alignment) {
    bytes_.resize((bytes_.size() + alignment - 1) / alignment * alignment);
    return *this;
  }
  const std::vector<uint8_t>& get() const { return bytes_; }

 private:
  std::vector<uint8_t> bytes_;
};

Bytes gguf_header(uint64_t tensors, uint64_t values) {
  Bytes out;
  out.chars("GGUF").put(uint32_t{3}).put(tensors).put(values);
  return out;
}

std::vector<uint8_t> small_gguf() {
  Bytes out = gguf_header(1, 3);
  out.string("a").put(uint32_t{6}).put(0.5f);
  out.string("b").put(uint32_t{9}).put(uint32_t{8}).put(uint64_t{2}).string("x").string("yz");
  out.string("c")
      .put(uint32_t{9})
      .put(uint32_t{3})
      .put(uint64_t{2})
      .put(int16_t{-1})
      .put(int16_t{2});
  out.string("w")
      .put(uint32_t{2})
      .put(uint64_t{2})
      .put(uint64_t{3})
      .put(uint32_t{0})
      .put(uint64_t{0});
  out.pad(32);
  for (int i = 0; i < 6; ++i) out.put(static_cast<float>(i));
  return out.get();
}

TEST(Gguf, KeepsTheTypesOfMetadata) {
  const std::vector<uint8_t> bytes = small_gguf();
  const GgufFile file(bytes, "m.gguf");
  EXPECT_EQ(std::get<double>(file.metadata().at("a").value), 0.5);
  const auto& strings = std::get<std::vector<std::string_view>>(file.metadata().at("b").value);
  EXPECT_EQ(strings, (std::vector<std::string_view>{"x", "yz"}));
  const auto& numbers = std::get<GgufNumbers>(file.metadata().at("c").value);
  EXPECT_EQ(numbers.type, GgufType::kInt16);
  EXPECT_EQ(numbers.count, 2u);
}

TEST(Gguf, ShapeIsOutermostFirstAndDataPointsIntoTheFile) {
  const std::vector<uint8_t> bytes = small_gguf();
  const std::shared_ptr<const File> file = std::make_shared<GgufFile>(bytes, "m.gguf");
  const TensorInfo& w = file->tensor("w");
  EXPECT_EQ(w.shape, (std::vector<int64_t>{3, 2}));
  EXPECT_EQ(w.nbytes, 24u);
  EXPECT_EQ(w.data + w.nbytes, bytes.data() + bytes.size());
}

TEST(Gguf, EveryTruncationIsCorruptAndReadsNothingOutside) {
  const std::vector<uint8_t> bytes = small_gguf();
  for (size_t size = 0; size < bytes.size(); ++size) {
    const std::vector<uint8_t> exact(bytes.begin(),
                                     bytes.begin() + static_cast<std::ptrdiff_t>(size));
    EXPECT_THROW(GgufFile(exact, "m.gguf"), CorruptFile) << size;
  }
}

TEST(Gguf, EveryFlippedByteIsReadOrRefusedCleanly) {
  const std::vector<uint8_t> bytes = small_gguf();
  for (size_t at = 0; at < bytes.size(); ++at) {
    for (const int value : {0x00, 0x01, 0x7f, 0x80, 0xff}) {
      std::vector<uint8_t> changed = bytes;
      changed[at] = static_cast<uint8_t>(value);
      try {
        const GgufFile file(changed, "m.gguf");
        for (const auto& [name, info] : file.tensors()) {
          EXPECT_GE(info.data, changed.data());
          EXPECT_LE(info.data + info.nbytes, changed.data() + changed.size());
        }
      } catch (const Error&) {
      }
    }
  }
}

TEST(Gguf, MissingTensorNamesFileAndTensor) {
  const std::vector<uint8_t> bytes = small_gguf();
  const GgufFile file(bytes, "m.gguf");
  try {
    file.tensor("nope");
    FAIL() << "nothing was thrown";
  } catch (const CorruptFile& error) {
    EXPECT_NE(std::strstr(error.what(), "m.gguf: no tensor 'nope'"), nullptr) << error.what();
  }
}

std::vector<uint8_t> safetensors(std::string_view header, size_t data_bytes) {
  Bytes out;
  out.put(uint64_t{header.size()}).chars(header);
  std::vector<uint8_t> bytes = out.get();
  bytes.resize(bytes.size() + data_bytes);
  return bytes;
}

TEST(Safetensors, ListsButDoesNotOpenOtherDtypes) {
  const auto bytes = safetensors(R"({"i":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}})", 8);
  const SafetensorsFile file(bytes, "m.safetensors");
  EXPECT_EQ(file.tensors().at("i").unreadable, "I32");
  EXPECT_THROW(file.tensor("i"), Unsupported);
}

TEST(Safetensors, EveryTruncationIsCorruptAndReadsNothingOutside) {
  const auto bytes = safetensors(R"({"w":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]}})", 8);
  ASSERT_NO_THROW(SafetensorsFile(bytes, "m.safetensors"));
  for (size_t size = 0; size < bytes.size(); ++size) {
    const std::vector<uint8_t> exact(bytes.begin(),
                                     bytes.begin() + static_cast<std::ptrdiff_t>(size));
    EXPECT_THROW(SafetensorsFile(exact, "m.safetensors"), CorruptFile) << size;
  }
}

TEST(JsonCursor, ReadsTheLargestInteger) {
  JsonCursor json(" 18446744073709551615 ", "t");
  EXPECT_EQ(json.integer(), UINT64_MAX);
  EXPECT_NO_THROW(json.end());
  EXPECT_THROW(JsonCursor("18446744073709551616", "t").integer(), CorruptFile);
}

TEST(Text, AcceptsAndRefusesTheEdgesOfUtf8) {
  for (const char* good :
       {"", "ascii only text", "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\x9f\xbf",
        "\xee\x80\x80", "\xef\xbf\xbf", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"}) {
    EXPECT_TRUE(is_utf8(good)) << in_quotes(good);
  }
  for (const char* bad :
       {"\x80", "\xc0\x80", "\xc1\xbf", "\xc2", "\xe0\x9f\xbf", "\xe0\xa0", "\xed\xa0\x80",
        "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff", "12345678\xc2"}) {
    EXPECT_FALSE(is_utf8(bad)) << in_quotes(bad);
  }
}

TEST(Text, QuotingIsPrintableAndShort) {
  EXPECT_EQ(in_quotes("a\x1b\xff"), "'a\\x1b\\xff'");
  EXPECT_EQ(in_quotes(std::string(100, 'x')), "'" + std::string(80, 'x') + "...'");
}

}  // namespace
}  // namespace sagellm::checkpoint
