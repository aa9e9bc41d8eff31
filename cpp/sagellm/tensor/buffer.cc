#include "sagellm/tensor/buffer.h"

#include <sys/mman.h>

#include "sagellm/base/error.h"
#include "sagellm/base/math.h"

namespace sagellm {

namespace {
constexpr size_t kHugePage = size_t{2} << 20;
}  // namespace

Buffer::Buffer(size_t size) : size_(size) {
  if (size == 0) return;
  const bool huge = size >= kHugePage;
  // One page more than needed leaves room to start on a huge-page boundary.
  require<DeviceError>(size <= SIZE_MAX / 2, "cannot reserve ", size, " bytes of memory");
  const size_t reserved = huge ? (size + 2 * kHugePage - 1) / kHugePage * kHugePage : size;
  void* start = mmap(nullptr, reserved, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) {
    fail<DeviceError>("cannot reserve ", size,
                      " bytes of memory; lower the KV budget or use a smaller model");
  }
  mapping_ = std::shared_ptr<void>(start, [reserved](void* p) { munmap(p, reserved); });
  data_ = static_cast<uint8_t*>(start);
  if (huge) {
    const auto address = reinterpret_cast<uintptr_t>(start);
    data_ += (kHugePage - address % kHugePage) % kHugePage;
    // Advice only: without huge pages everything still works, more slowly.
    (void)madvise(data_, size / kHugePage * kHugePage, MADV_HUGEPAGE);
  }
}

Buffer Buffer::slice(size_t offset, size_t size) {
  require<InvalidArgument>(offset % 64 == 0 && offset <= size_ && size <= size_ - offset, "slice [",
                           offset, ", +", size, ") does not fit a buffer of ", size_, " bytes");
  Buffer part;
  part.mapping_ = mapping_;
  part.data_ = data_ + offset;
  part.size_ = size;
  return part;
}

}  // namespace sagellm
