// Inside the emulator: the device, the block that runs and its fibers.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda_emulator.h"

namespace cuda_emulation {

constexpr size_t kMaxShared = 227 << 10;  // a block of compute capability 9.0
constexpr int kRegisters = 65536;         // of a multiprocessor
constexpr unsigned char kPoison = 0xff;
constexpr unsigned char kCanary = 0xa5;

inline size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

inline size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

/// Bytes between two guard pages that end at the second one, apart from canaries that fill up to
/// `alignment`.
class GuardedMemory {
 public:
  GuardedMemory(size_t bytes, size_t alignment) : bytes_(bytes), room_(round_up(bytes, alignment)) {
    pages_ = round_up(room_, page_bytes());
    void* base = mmap(nullptr, pages_ + 2 * page_bytes(), PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(base);
    if (pages_ > 0 && mprotect(base_ + page_bytes(), pages_, PROT_READ | PROT_WRITE) != 0) {
      throw std::bad_alloc();
    }
    data_ = base_ + page_bytes() + pages_ - room_;
    std::memset(base_ + page_bytes(), kCanary, pages_);
    std::memset(data_, kPoison, bytes_);
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(base_, pages_ + 2 * page_bytes()); }

  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void poison() { std::memset(data_, kPoison, bytes_); }

  /// Whether the bytes around the memory are still the canaries.
  bool intact() const {
    for (const unsigned char* p = base_ + page_bytes(); p < base_ + page_bytes() + pages_; ++p) {
      if ((p < data_ || p >= data_ + bytes_) && *p != kCanary) return false;
    }
    return true;
  }
  bool around(const void* address) const {
    return address >= base_ && address < base_ + pages_ + 2 * page_bytes();
  }

 private:
  size_t bytes_ = 0, room_ = 0, pages_ = 0;
  unsigned char* base_ = nullptr;
  unsigned char* data_ = nullptr;
};

struct Barrier {
  int arrived = 0;
  int expected = 0;  // of a named barrier, while somebody waits there
  uint64_t generation = 0;
  Place place{};
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

/// The parity of the phase that an mbarrier is in.
inline int mbarrier_parity(uint64_t word) { return static_cast<int>(word >> 63); }

/// A box on its way into shared memory.
struct BoxCopy {
  unsigned char* to;
  TensorBox box;
  uint64_t* barrier;
  Place place;
};

struct Fiber {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  int index = 0;
  bool finished = false;
  const Barrier* waits_at = nullptr;
  uint64_t waits_for = 0;              // another generation than this one
  const uint64_t* waits_on = nullptr;  // an mbarrier, until the phase of waits_parity has ended
  int waits_parity = 0;
  Place waits_in{};
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> groups;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif

  bool runnable() const {
    if (finished) return false;
    if (waits_on != nullptr) return mbarrier_parity(*waits_on) != waits_parity;
    return waits_at == nullptr || waits_at->generation != waits_for;
  }
};

/// Accumulators that products are adding to: in the tensor core, not in the lanes.
struct InFlight {
  float* lanes[32];
  std::vector<float> values[32];
  int products = 0;
};
/// A wgmma as one warp sees it: 16 rows of A and D.
struct WarpProduct {
  int n;
  bool is_bf16, add, transposed_b, a_in_registers;
  uint64_t descriptor_a, descriptor_b;
  const float* accumulators;  // lane 0's
  const uint32_t* a[32];
  uint32_t a_words[32][4];
  Place place;
};

struct Warp : Barrier {
  void* arguments[32] = {};
  bool fenced = false;
  std::vector<WarpProduct> open_products;
  std::deque<std::vector<WarpProduct>> product_groups;
  std::map<const float*, InFlight> in_flight;
  size_t products_issued = 0;
  int registers = 0;  // of each thread
};
/// What the four warps of a warpgroup must do alike.
struct IssuedProduct {
  int n;
  uint64_t descriptor_a, descriptor_b;
  bool operator==(const IssuedProduct&) const = default;
};

/// The block that runs.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier whole;
  Barrier named[16];
  std::vector<std::vector<IssuedProduct>> warpgroups;
  std::deque<BoxCopy> box_copies;
  std::set<const uint64_t*> mbarriers;  // that were initialised
  GuardedMemory* shared = nullptr;
  const std::function<void()>* kernel = nullptr;
  Fiber* running = nullptr;
  void* scheduler = nullptr;  // its stack pointer
  std::exception_ptr failure;
#if defined(__SANITIZE_ADDRESS__)
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
#endif
};

struct State {
  std::mutex mutex;  // one launch at a time
  Block block;
  std::vector<std::unique_ptr<GuardedMemory>> stacks;
  std::map<const void*, std::unique_ptr<GuardedMemory>> allocations;
  uint64_t seed = 0;       // 0: ascending order
  std::mt19937_64 random;  // of this launch
  Statistics statistics;
};

State& state();

std::string describe(Place place);
/// Throws EmulationError with `what`, and block and thread where a kernel runs.
[[noreturn]] void fail(const std::string& what);
void check_aligned(const void* address, size_t alignment, const char* what, Place place);
/// Fails when [address, address + bytes) is not in the block's shared memory.
void check_shared(const void* address, size_t bytes, const char* what, Place place);
/// Runs `body`; a fault inside it becomes an EmulationError, and the fibers' stacks are given up.
void with_faults_reported(const std::function<void()>& body);

/// Gives the processor back to the scheduler.
void yield();
/// Lands one box. The scheduler does so between turns.
void finish_box(const BoxCopy& copy);

/// Counts the running thread in at `barrier` and waits there for the last of `expected`, which
/// runs `last` first.
template <typename Last>
void arrive(Barrier& barrier, int expected, Place place, const Last& last) {
  if (barrier.arrived == 0) {
    barrier.place = place;
  } else if (barrier.place.line != place.line || std::strcmp(barrier.place.file, place.file) != 0) {
    fail("threads meet at different places: " + describe(barrier.place) + " and " +
         describe(place));
  }
  if (++barrier.arrived == expected) {
    last();
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fiber& self = *state().block.running;
  self.waits_at = &barrier;
  self.waits_for = barrier.generation;
  self.waits_in = place;
  yield();
}

}  // namespace cuda_emulation
