// Safetensors files.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>

#include "sagellm/checkpoint/file.h"
#include "sagellm/checkpoint/mapped_file.h"

namespace sagellm::checkpoint {

/// A safetensors file. F32, F16 and BF16 tensors can be read; others are listed, and `tensor(name)`
/// throws Unsupported for them.
class SafetensorsFile final : public File {
 public:
  /// Maps and checks `path`; throws CorruptFile on anything inconsistent.
  explicit SafetensorsFile(const std::string& path);
  /// Reads from memory that outlives this object.
  SafetensorsFile(std::span<const uint8_t> bytes, std::string name);

  /// The `__metadata__` entry of the header; empty when there is none.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  void forget(const uint8_t* begin, size_t size) const noexcept override {
    mapping_.forget(begin, size);
  }

 private:
  class Parser;

  MappedFile mapping_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace sagellm::checkpoint
