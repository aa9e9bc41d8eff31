#include "sagellm/checkpoint/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "sagellm/base/error.h"

namespace sagellm::checkpoint {

namespace {

std::string reason(int error) { return std::generic_category().message(error); }

/// Closes a descriptor at the end of a scope.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

std::string file_name(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

MappedFile::MappedFile(const std::string& path) {
  const std::string name = file_name(path);
  // O_NONBLOCK: opening a FIFO by mistake must not hang.
  const Descriptor fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (fd.get() < 0) {
    const int error = errno;
    fail<InvalidArgument>("cannot open '", name, "': ", reason(error),
                          error == ENOENT ? "; check the path, or download the model again"
                                          : "; check the permissions of the file and its folders");
  }
  struct stat status = {};
  if (fstat(fd.get(), &status) != 0) {
    fail<DeviceError>("cannot examine '", name, "': ", reason(errno), "; check the file system");
  }
  require<InvalidArgument>(S_ISREG(status.st_mode), "'", name,
                           "' is not a regular file; give the path of one checkpoint file");
  require<CorruptFile>(status.st_size > 0, "'", name, "' is empty; download it again");
  const size_t size = static_cast<size_t>(status.st_size);
  void* mapping = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (mapping == MAP_FAILED) {
    fail<DeviceError>(
        "cannot map '", name, "' (", size, " bytes): ", reason(errno),
        "; raise the limit on virtual memory (ulimit -v) or copy the file to a local disk");
  }
  data_ = static_cast<const uint8_t*>(mapping);
  size_ = size;
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

void MappedFile::forget(const uint8_t* begin, size_t size) const noexcept {
  constexpr uintptr_t kPage = 4096;
  const auto base = reinterpret_cast<uintptr_t>(data_);
  const uintptr_t first = std::max(reinterpret_cast<uintptr_t>(begin), base);
  const uintptr_t last = std::min(reinterpret_cast<uintptr_t>(begin) + size, base + size_);
  const uintptr_t from = (first + kPage - 1) / kPage * kPage;
  const uintptr_t to = last / kPage * kPage;
  if (data_ != nullptr && from < to) {
    (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);  // advice only
  }
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), size_);
}

}  // namespace sagellm::checkpoint
