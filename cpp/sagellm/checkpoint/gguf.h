// GGUF files, versions 2 and 3, little endian.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "sagellm/checkpoint/file.h"
#include "sagellm/checkpoint/mapped_file.h"

namespace sagellm::checkpoint {

/// Type tags of metadata values, as stored.
enum class GgufType : uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64,
};
inline constexpr uint32_t kNumGgufTypes = 13;

/// An array of numbers or bools as stored: `count` unaligned little-endian elements.
struct GgufNumbers {
  GgufType type = GgufType::kUint8;
  const uint8_t* data = nullptr;
  size_t count = 0;
};

/// A metadata value. Views point into the file and live as long as the GgufFile.
struct GgufValue {
  std::variant<bool, int64_t, uint64_t, double, std::string_view, GgufNumbers,
               std::vector<std::string_view>, std::vector<GgufValue>>
      value;
};

/// A GGUF file. All strings are valid UTF-8; arrays nest at most four deep.
class GgufFile final : public File {
 public:
  /// Maps and checks `path`; throws CorruptFile on anything inconsistent and Unsupported on a
  /// version or a tensor type that is not read.
  explicit GgufFile(const std::string& path);
  /// Reads from memory that outlives this object.
  GgufFile(std::span<const uint8_t> bytes, std::string name);

  const std::map<std::string, GgufValue>& metadata() const { return metadata_; }

  void forget(const uint8_t* begin, size_t size) const noexcept override {
    mapping_.forget(begin, size);
  }

 private:
  class Parser;

  MappedFile mapping_;
  std::map<std::string, GgufValue> metadata_;
};

}  // namespace sagellm::checkpoint
