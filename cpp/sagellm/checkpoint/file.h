// What every checkpoint file looks like from outside: a set of named tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "sagellm/base/dtype.h"

namespace sagellm::checkpoint {

/// Limit on the tensors of one file, and on the keys of its metadata.
inline constexpr uint64_t kMaxEntries = 65536;

/// A tensor inside a file. `data` has no alignment and lives as long as the File.
struct TensorInfo {
  std::string name;
  Format format = Format::kF32;
  std::vector<int64_t> shape;  // outermost first: [rows, cols]
  const uint8_t* data = nullptr;
  size_t nbytes = 0;
  std::string
      unreadable;  // not empty: stored in this type, which is not supported (`format` is moot)
};

/// An open checkpoint file. Everything in it has been checked: tensors lie inside the file, do not
/// overlap, and have exactly the bytes that format and shape ask for. Immutable, so thread-safe.
class File {
 public:
  virtual ~File() = default;
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  /// Name of the file, without folders, for messages.
  const std::string& name() const { return name_; }
  /// All tensors, those of unsupported types included.
  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  /// Returns the tensor `name`; throws CorruptFile when it is missing and Unsupported when its type
  /// cannot be read.
  const TensorInfo& tensor(const std::string& name) const;

  /// Tells the file that [begin, begin + size) of its data is not needed soon; it stays readable.
  virtual void forget(const uint8_t* /*begin*/, size_t /*size*/) const noexcept {}

 protected:
  explicit File(std::string name) : name_(std::move(name)) {}

  /// Adds a tensor; throws CorruptFile on a duplicate name or more than kMaxEntries tensors.
  void add_tensor(TensorInfo info);
  /// Throws CorruptFile when two tensors share bytes.
  void check_no_overlap() const;

 private:
  std::string name_;
  std::map<std::string, TensorInfo> tensors_;
};

}  // namespace sagellm::checkpoint
