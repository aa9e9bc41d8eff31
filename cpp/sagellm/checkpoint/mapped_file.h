// Read-only memory mapping of a whole file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace sagellm::checkpoint {

/// Move-only private mapping of a regular file. Pages are read on first touch, so opening is cheap
/// whatever the size. The file must not shrink while it is mapped.
class MappedFile {
 public:
  MappedFile() = default;
  /// Maps `path`; throws InvalidArgument (missing, unreadable, not a regular file), CorruptFile
  /// (empty) or DeviceError (the system refuses the mapping). Messages carry the file name only.
  explicit MappedFile(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  std::span<const uint8_t> bytes() const { return {data_, size_}; }

  /// Gives the resident pages inside [begin, begin + size) back to the system; a later read brings
  /// them in again. Ignores what lies outside of the mapping.
  void forget(const uint8_t* begin, size_t size) const noexcept;

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

/// Returns the last component of `path`.
std::string file_name(const std::string& path);

}  // namespace sagellm::checkpoint
