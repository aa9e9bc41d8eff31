// Fibers, their scheduler, and what makes them meet.
#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <utility>

#include "emulator_state.h"

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
constexpr int kMaxThreads = 1024;

}  // namespace

State& state() {
  static State all;
  return all;
}

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

namespace {

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
  fiber.waits_on = nullptr;
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

/// Lands boxes between turns: all in order; or few, in any order, so that some come very late. At
/// least one where nobody can go on.
bool finish_boxes(bool shuffled, bool stuck) {
  std::deque<BoxCopy>& copies = state().block.box_copies;
  size_t count = copies.size();
  if (shuffled) {
    std::mt19937_64& random = state().random;
    std::shuffle(copies.begin(), copies.end(), random);
    count = std::min<size_t>(count, stuck || random() % 32 == 0 ? 1 : 0);
  }
  for (size_t i = 0; i < count; ++i) {
    const BoxCopy copy = copies.front();
    copies.pop_front();
    finish_box(copy);
  }
  return count > 0;
}

void check_registers(const Block& block) {
  int sum = 0;
  for (size_t w = 0; w < block.warps.size(); ++w) {
    sum += 32 * block.warps[w].registers;
    if (block.warps[w].registers != block.warps[w / 4 * 4].registers) {
      throw EmulationError("warps of one warpgroup ask for different numbers of registers");
    }
  }
  if (sum > kRegisters) {
    throw EmulationError("the warps of a block ask for " + std::to_string(sum) + " registers");
  }
}

void run_block(bool shuffled) {
  Block& block = state().block;
  std::vector<Fiber*> order;
  order.reserve(block.fibers.size());
  for (Fiber& fiber : block.fibers) order.push_back(&fiber);
  for (bool progress = true; progress;) {
    progress = false;
    if (shuffled) std::shuffle(order.begin(), order.end(), state().random);
    for (Fiber* fiber : order) {
      if (!fiber->runnable()) continue;
      resume(*fiber);
      if (block.failure != nullptr) std::rethrow_exception(std::exchange(block.failure, nullptr));
      progress = true;
    }
    const bool ended = std::all_of(block.fibers.begin(), block.fibers.end(),
                                   [](const Fiber& fiber) { return fiber.finished; });
    if (ended && !block.box_copies.empty()) {
      throw EmulationError("a block ended while boxes were on their way to its shared memory");
    }
    progress = finish_boxes(shuffled, !progress) || progress;
  }
  for (const Fiber& fiber : block.fibers) {
    if (!fiber.finished) throw EmulationError(describe_deadlock(block));
  }
  check_registers(block);
}

}  // namespace

// -------------------------------------------------------------------------------------- the device
Statistics& statistics() { return state().statistics; }

void set_order(uint64_t seed) { state().seed = seed; }

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
  all.random.seed(all.seed);

  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  for (uint64_t b = 0; b < blocks; ++b) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    block.whole = {};
    for (Barrier& barrier : block.named) barrier = {};
    block.warps.clear();
    block.warps.resize(threads / 32);
    block.warpgroups.assign((threads + 127) / 128, {});
    block.box_copies.clear();
    block.mbarriers.clear();
    const auto registers = static_cast<int>(kRegisters / threads) / 8 * 8;
    for (Warp& warp : block.warps) warp.registers = std::min(registers, 255);
    block.fibers.assign(threads, {});
    for (uint32_t t = 0; t < threads; ++t) {
      block.fibers[t].index = static_cast<int>(t);
      block.fibers[t].stack = all.stacks[t]->data();
      start(block.fibers[t]);
    }
    shared.poison();
    with_faults_reported([&] { run_block(all.seed != 0); });
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

namespace {

Barrier& named_barrier(int id, int threads, Place place) {
  const auto what = [&] {
    return "barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads at " +
           describe(place);
  };
  if (id < 1 || id > 15 || threads % 32 != 0 || threads <= 0) fail(what());
  Barrier& barrier = state().block.named[id];
  if (barrier.arrived > 0 && barrier.expected != threads) {
    fail(what() + "; others wait there for " + std::to_string(barrier.expected));
  }
  barrier.expected = threads;
  barrier.place = place;  // producers and consumers meet from different places
  return barrier;
}

}  // namespace

void sync_named(int id, int threads, Place place) {
  arrive(named_barrier(id, threads, place), threads, place, [] {});
}

void arrive_named(int id, int threads, Place place) {
  Barrier& barrier = named_barrier(id, threads, place);
  if (++barrier.arrived < threads) return;
  barrier.arrived = 0;
  ++barrier.generation;
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

}  // namespace cuda_emulation
