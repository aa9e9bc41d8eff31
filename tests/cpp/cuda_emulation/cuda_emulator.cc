#include "cuda_emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the emulator switches fibers with x86-64 instructions"
#endif

// Saves the callee-saved registers and the stack pointer of the running fiber, loads those of
// another.
extern "C" void cuda_emulation_switch(void** save, void* load);
asm(R"(
.text
.globl cuda_emulation_switch
.hidden cuda_emulation_switch
.type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulation_switch, .-cuda_emulation_switch
)");

namespace cuda_emulation {

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kSharedAlignment = 1024;
constexpr size_t kMaxShared = 227 << 10;  // a block of compute capability 9.0
constexpr int kMaxThreads = 1024;
constexpr unsigned char kPoison = 0xff;
constexpr unsigned char kCanary = 0xa5;

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

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
  uint64_t generation = 0;
  Place place{};
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Fiber {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  int index = 0;
  bool finished = false;
  const Barrier* waits_at = nullptr;
  uint64_t waits_for = 0;  // another generation than this one
  Place waits_in{};
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> groups;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif

  bool runnable() const {
    return !finished && (waits_at == nullptr || waits_at->generation != waits_for);
  }
};

struct Warp : Barrier {
  void* arguments[32] = {};
};

/// The block that runs.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier whole;
  Barrier named[16];
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
  uint64_t seed = 0;
  Statistics statistics;
};

State& state() {
  static State all;
  return all;
}

std::string describe(Place place) {
  const char* name = std::strrchr(place.file, '/');
  std::ostringstream out;
  out << (name != nullptr ? name + 1 : place.file) << ":" << place.line;
  return out.str();
}

[[noreturn]] void fail(const std::string& what) {
  std::ostringstream out;
  out << what;
  if (state().block.running != nullptr) {
    out << " (block " << blockIdx.x << "," << blockIdx.y << "," << blockIdx.z << " thread "
        << threadIdx.x << ")";
  }
  throw EmulationError(out.str());
}

/// Gives the processor back to the scheduler.
void yield() {
  Block& block = state().block;
  Fiber& self = *block.running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(self.finished ? nullptr : &self.fake_stack, block.scheduler_stack,
                                 block.scheduler_stack_bytes);
#endif
  cuda_emulation_switch(&self.stack_pointer, block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, &block.scheduler_stack,
                                  &block.scheduler_stack_bytes);
#endif
}

extern "C" void cuda_emulation_fiber() {
  Block& block = state().block;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
  try {
    (*block.kernel)();
  } catch (...) {
    if (block.failure == nullptr) block.failure = std::current_exception();
  }
  block.running->finished = true;
  yield();
}

void start(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  // What the switch pops: six registers, the entry, and a slot that keeps the stack aligned.
  auto** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&cuda_emulation_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void resume(Fiber& fiber) {
  Block& block = state().block;
  block.running = &fiber;
  fiber.waits_at = nullptr;
  threadIdx = {static_cast<unsigned>(fiber.index), 0, 0};
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
  cuda_emulation_switch(&block.scheduler, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
  block.running = nullptr;
}

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

/// Who waits where when nobody can go on.
std::string describe_deadlock(const Block& block) {
  std::map<std::string, std::vector<int>> waiting;
  int finished = 0;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.finished) {
      ++finished;
    } else {
      waiting[describe(fiber.waits_in)].push_back(fiber.index);
    }
  }
  std::ostringstream out;
  out << "threads wait for ever in block " << blockIdx.x << "," << blockIdx.y << "," << blockIdx.z
      << ":";
  for (const auto& [place, threads] : waiting) {
    out << " " << threads.size() << " at " << place << " (the first is " << threads.front() << ");";
  }
  out << " " << finished << " have ended";
  return out.str();
}

void run_block(std::mt19937_64& random, bool shuffled) {
  Block& block = state().block;
  std::vector<Fiber*> order;
  order.reserve(block.fibers.size());
  for (Fiber& fiber : block.fibers) order.push_back(&fiber);
  for (bool progress = true; progress;) {
    progress = false;
    if (shuffled) std::shuffle(order.begin(), order.end(), random);
    for (Fiber* fiber : order) {
      if (!fiber->runnable()) continue;
      resume(*fiber);
      if (block.failure != nullptr) std::rethrow_exception(std::exchange(block.failure, nullptr));
      progress = true;
    }
  }
  for (const Fiber& fiber : block.fibers) {
    if (!fiber.finished) throw EmulationError(describe_deadlock(block));
  }
}

// ------------------------------------------------------------------------------- guard-page faults
#if !defined(__SANITIZE_ADDRESS__)
sigjmp_buf fault_return;
volatile std::sig_atomic_t catching_faults = 0;
void* volatile fault_address = nullptr;
struct sigaction previous_action {};

void on_fault(int signal, siginfo_t* info, void*) {
  if (catching_faults == 0) {  // not ours: let it happen
    sigaction(signal, &previous_action, nullptr);
    return;
  }
  fault_address = info->si_addr;
  siglongjmp(fault_return, 1);
}

std::string describe_fault() {
  const State& all = state();
  std::ostringstream out;
  const auto* address = static_cast<const unsigned char*>(fault_address);
  const auto locate = [&](const GuardedMemory& memory, const char* kind) {
    if (address < memory.data()) {
      out << memory.data() - address << " bytes before " << kind << " of ";
    } else {
      out << address - (memory.data() + memory.bytes()) << " bytes behind " << kind << " of ";
    }
    out << memory.bytes() << " bytes";
  };
  const GuardedMemory* shared = all.block.shared;
  if (shared != nullptr && shared->around(address)) {
    locate(*shared, "shared memory");
    return out.str();
  }
  for (const auto& [begin, memory] : all.allocations) {
    if (memory->around(address)) {
      locate(*memory, "an allocation");
      return out.str();
    }
  }
  out << "address " << fault_address << ", no memory of the device";
  return out.str();
}
#endif

/// Turns a fault inside `body` into an EmulationError. The stacks of the fibers are given up.
template <typename Body>
void with_faults_reported(const Body& body) {
#if defined(__SANITIZE_ADDRESS__)
  body();  // the sanitizer reports them
#else
  struct sigaction action {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  sigaction(SIGSEGV, &action, &previous_action);
  struct Restore {
    ~Restore() {
      catching_faults = 0;
      sigaction(SIGSEGV, &previous_action, nullptr);
    }
  } restore;
  if (sigsetjmp(fault_return, 1) == 0) {
    catching_faults = 1;
    body();
  } else {
    catching_faults = 0;
    fail("access outside memory: " + describe_fault());
  }
#endif
}

template <typename T>
void check_aligned(const T* address, size_t alignment, const char* what, Place place) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail(std::string(what) + " needs an address aligned to " + std::to_string(alignment) +
         " bytes at " + describe(place));
  }
}

void finish_group(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.from != nullptr) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
}

}  // namespace

// -------------------------------------------------------------------------------------- the device
Statistics& statistics() { return state().statistics; }

void set_order(uint64_t seed) { state().seed = seed; }

void* allocate(size_t bytes) {
  auto memory = std::make_unique<GuardedMemory>(bytes, 16);
  void* pointer = memory->data();
  const std::lock_guard lock(state().mutex);
  state().allocations[pointer] = std::move(memory);
  return pointer;
}

void release(void* pointer) {
  if (pointer == nullptr) return;
  const std::lock_guard lock(state().mutex);
  const auto found = state().allocations.find(pointer);
  if (found == state().allocations.end()) fail("release of memory that was not allocated");
  const std::unique_ptr<GuardedMemory> memory = std::move(found->second);
  state().allocations.erase(found);
  if (!memory->intact()) {
    fail("bytes beside an allocation of " + std::to_string(memory->bytes()) + " were written");
  }
}

size_t allocated_bytes() {
  const std::lock_guard lock(state().mutex);
  size_t bytes = 0;
  for (const auto& [begin, memory] : state().allocations) bytes += memory->bytes();
  return bytes;
}

size_t allocation_count() {
  const std::lock_guard lock(state().mutex);
  return state().allocations.size();
}

int resident_blocks(uint32_t threads, size_t shared_bytes) {
  const auto by_threads = static_cast<int>(2048 / threads);
  const auto by_memory = static_cast<int>(kMaxShared / (shared_bytes + 1024));
  return std::min({by_threads, by_memory, 32});
}

void run_grid(GridSize grid, uint32_t threads, size_t shared_bytes,
              const std::function<void()>& kernel) {
  if (threads == 0 || threads % 32 != 0 || threads > kMaxThreads) {
    fail("a block has " + std::to_string(threads) +
         " threads; whole warps up to 1024 are possible");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    fail("a grid of " + std::to_string(grid.x) + "x" + std::to_string(grid.y) + "x" +
         std::to_string(grid.z) + " blocks");
  }
  if (shared_bytes > kMaxShared) {
    fail(std::to_string(shared_bytes) + " bytes of shared memory; a block has " +
         std::to_string(kMaxShared));
  }
  State& all = state();
  const std::lock_guard lock(all.mutex);
  Block& block = all.block;
  GuardedMemory shared(shared_bytes, kSharedAlignment);
  while (all.stacks.size() < threads) {
    all.stacks.push_back(std::make_unique<GuardedMemory>(kStackBytes, 16));
  }
  block.shared = &shared;
  block.kernel = &kernel;
  block.running = nullptr;
  block.failure = nullptr;
  blockDim = {threads, 1, 1};
  gridDim = {grid.x, grid.y, grid.z};
  ++all.statistics.launches;
  std::mt19937_64 random(all.seed);

  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  for (uint64_t b = 0; b < blocks; ++b) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    block.whole = {};
    for (Barrier& barrier : block.named) barrier = {};
    block.warps.assign(threads / 32, {});
    block.fibers.assign(threads, {});
    for (uint32_t t = 0; t < threads; ++t) {
      block.fibers[t].index = static_cast<int>(t);
      block.fibers[t].stack = all.stacks[t]->data();
      start(block.fibers[t]);
    }
    shared.poison();
    with_faults_reported([&] { run_block(random, all.seed != 0); });
    block.running = nullptr;
    if (!shared.intact()) {
      fail("bytes behind shared memory of " + std::to_string(shared_bytes) + " were written");
    }
  }
  block.shared = nullptr;
}

// ----------------------------------------------------------------------------------- in the kernel
unsigned char* shared_memory_begin() { return state().block.shared->data(); }

void sync_all(Place place) {
  Block& block = state().block;
  arrive(block.whole, static_cast<int>(block.fibers.size()), place, [] {});
}

void sync_named(int id, int threads, Place place) {
  if (id < 1 || id > 15 || threads % 32 != 0 || threads <= 0) {
    fail("barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads at " +
         describe(place));
  }
  Barrier& barrier = state().block.named[id];
  barrier.place = place;  // producers and consumers meet from different places
  arrive(barrier, threads, place, [] {});
}

void warp_operation(Combine combine, void* argument, Place place) {
  Block& block = state().block;
  const int thread = block.running->index;
  Warp& warp = block.warps[static_cast<size_t>(thread / 32)];
  if (warp.arrived == 0) std::fill(std::begin(warp.arguments), std::end(warp.arguments), nullptr);
  warp.arguments[thread % 32] = argument;
  arrive(warp, 32, place, [&] {
    if (combine != nullptr) combine(warp.arguments);
  });
}

uint32_t ballot(bool predicate, Place place) {
  struct Vote {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  warp_operation(
      [](void* const* lanes) {
        uint32_t mask = 0;
        for (int lane = 0; lane < 32; ++lane) {
          mask |= static_cast<uint32_t>(static_cast<Vote*>(lanes[lane])->predicate) << lane;
        }
        for (int lane = 0; lane < 32; ++lane) static_cast<Vote*>(lanes[lane])->result = mask;
      },
      &mine, place);
  return mine.result;
}

uint4 load_stream(const void* address, Place place) {
  check_aligned(static_cast<const unsigned char*>(address), 16, "load_stream", place);
  state().statistics.global_bytes_streamed += 16;
  return *static_cast<const uint4*>(address);
}

void store_stream(void* address, uint4 value, Place place) {
  check_aligned(static_cast<unsigned char*>(address), 16, "store_stream", place);
  state().statistics.global_bytes_streamed += 16;
  *static_cast<uint4*>(address) = value;
}

void cp_async_16(void* shared, const void* source, bool valid, Place place) {
  check_aligned(static_cast<unsigned char*>(shared), 16, "cp_async_16 (to)", place);
  check_aligned(static_cast<const unsigned char*>(source), 16, "cp_async_16 (from)", place);
  Block& block = state().block;
  const auto* to = static_cast<unsigned char*>(shared);
  if (to < block.shared->data() || to + 16 > block.shared->data() + block.shared->bytes()) {
    fail("cp_async_16 to an address outside shared memory at " + describe(place));
  }
  ++state().statistics.async_copies;
  state().statistics.global_bytes_streamed += valid ? 16 : 0;
  std::memset(shared, kPoison, 16);
  block.running->open_copies.push_back({shared, valid ? source : nullptr});
}

void cp_async_commit() {
  Fiber& self = *state().block.running;
  self.groups.push_back(std::exchange(self.open_copies, {}));
}

void cp_async_wait_groups(int pending) {
  Fiber& self = *state().block.running;
  while (self.groups.size() > static_cast<size_t>(pending)) {
    finish_group(self.groups.front());
    self.groups.erase(self.groups.begin());
  }
}

// -------------------------------------------------------------------------------------------
// numbers
float f16_bits_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

uint16_t float_to_f16_bits(float value) {
  const auto half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

uint16_t float_to_bf16_bits(float value) {
  const uint32_t bits = float_to_bits(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ----------------------------------------------------------------------------------- tensor cores
namespace {

struct Matrices {
  uint32_t* words;
  const unsigned char* row;
};

template <bool Transposed>
void load_matrices(void* const* lanes) {
  Statistics& counts = state().statistics;
  ++counts.matrix_loads;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const unsigned char* rows[8];
    int in_bank[8] = {};  // of 16 bytes; the rows of one matrix are read together
    for (int r = 0; r < 8; ++r) {
      rows[r] = static_cast<Matrices*>(lanes[matrix * 8 + r])->row;
      bool again = false;  // the same address is no conflict
      for (int other = 0; other < r; ++other) again = again || rows[other] == rows[r];
      if (!again) ++in_bank[reinterpret_cast<uintptr_t>(rows[r]) / 16 % 8];
    }
    counts.matrix_load_phases += *std::max_element(std::begin(in_bank), std::end(in_bank));
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane / 4;
      const int c = lane % 4 * 2;
      uint16_t low;
      uint16_t high;
      if constexpr (Transposed) {
        std::memcpy(&low, rows[c] + 2 * r, 2);
        std::memcpy(&high, rows[c + 1] + 2 * r, 2);
      } else {
        std::memcpy(&low, rows[r] + 2 * c, 2);
        std::memcpy(&high, rows[r] + 2 * (c + 1), 2);
      }
      static_cast<Matrices*>(lanes[lane])->words[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

template <typename Accumulator>
struct Product {
  Accumulator* c;
  const uint32_t* a;
  const uint32_t* b;
};

float decode_bf16(uint32_t bits) { return bits_to_float(bits << 16); }
float decode_f16(uint32_t bits) { return f16_bits_to_float(static_cast<uint16_t>(bits)); }
int32_t decode_s8(uint32_t bits) { return static_cast<int8_t>(bits); }
float decode_fp8(uint32_t bits) {
  const auto exponent = static_cast<int>(bits >> 3 & 15);
  const auto fraction = static_cast<float>(bits & 7);
  if ((bits & 0x7f) == 0x7f) return std::nanf("");
  const float value =
      exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8.0f + fraction, exponent - 10);
  return (bits & 0x80) != 0 ? -value : value;
}

/// c += a * b for m = 16, n = 8, k = K elements of `Bits` bits.
template <int K, int Bits, auto Decode, typename Accumulator, typename Sum>
void multiply(void* const* lanes) {
  ++state().statistics.matrix_products;
  constexpr int kPerWord = 32 / Bits;
  using Element = decltype(Decode(0u));
  Element a[16][K];
  Element b[K][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<Product<Accumulator>*>(lanes[lane]);
    const int row = lane / 4;
    const int column = lane % 4 * kPerWord;
    for (int i = 0; i < kPerWord; ++i) {
      const auto decode = [i](uint32_t word) {
        return Decode(word >> (i * Bits) & ((1u << Bits) - 1));
      };
      const int k = column + i;
      a[row][k] = decode(mine->a[0]);
      a[row + 8][k] = decode(mine->a[1]);
      a[row][k + K / 2] = decode(mine->a[2]);
      a[row + 8][k + K / 2] = decode(mine->a[3]);
      b[k][row] = decode(mine->b[0]);
      b[k + K / 2][row] = decode(mine->b[1]);
    }
  }
  Sum sums[16][8] = {};
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < K; ++k) {
      const Sum left = static_cast<Sum>(a[m][k]);
      for (int n = 0; n < 8; ++n) sums[m][n] += left * static_cast<Sum>(b[k][n]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    Accumulator* c = static_cast<Product<Accumulator>*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) {
      const Sum sum = sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      c[i] = static_cast<Accumulator>(static_cast<Sum>(c[i]) + sum);
    }
  }
}

}  // namespace

void ldmatrix(uint32_t (&words)[4], const void* row, bool transposed, Place place) {
  check_aligned(static_cast<const unsigned char*>(row), 16, "ldmatrix", place);
  const GuardedMemory& shared = *state().block.shared;
  const auto* begin = static_cast<const unsigned char*>(row);
  if (begin < shared.data() || begin + 16 > shared.data() + shared.bytes()) {
    fail("ldmatrix from an address outside shared memory at " + describe(place));
  }
  Matrices mine{words, begin};
  warp_operation(transposed ? load_matrices<true> : load_matrices<false>, &mine, place);
}

void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bf16,
                  Place place) {
  Product<float> mine{c, a, b};
  warp_operation(is_bf16 ? multiply<16, 16, decode_bf16, float, double>
                         : multiply<16, 16, decode_f16, float, double>,
                 &mine, place);
}

void mma_m16n8k32_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place) {
  Product<int32_t> mine{c, a, b};
  warp_operation(multiply<32, 8, decode_s8, int32_t, int32_t>, &mine, place);
}

void mma_m16n8k32_fp8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place) {
  Product<float> mine{c, a, b};
  warp_operation(multiply<32, 8, decode_fp8, float, double>, &mine, place);
}

}  // namespace cuda_emulation

int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) {
    c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  }
  return c;
}

unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (choice & 7))) & 0xff;
    if ((choice & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
