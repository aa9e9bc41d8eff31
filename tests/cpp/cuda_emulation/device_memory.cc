// The memory of the emulated device, and who reaches beyond it.
#include <csetjmp>
#include <csignal>
#include <sstream>
#include <utility>

#include "emulator_state.h"

namespace cuda_emulation {

std::string describe(Place place) {
  const char* name = std::strrchr(place.file, '/');
  std::ostringstream out;
  out << (name != nullptr ? name + 1 : place.file) << ":" << place.line;
  return out.str();
}

void fail(const std::string& what) {
  std::ostringstream out;
  out << what;
  if (state().block.running != nullptr) {
    out << " (block " << blockIdx.x << "," << blockIdx.y << "," << blockIdx.z << " thread "
        << threadIdx.x << ")";
  }
  throw EmulationError(out.str());
}

// ------------------------------------------------------------------------------- guard-page faults
namespace {

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

}  // namespace

void with_faults_reported(const std::function<void()>& body) {
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

void check_aligned(const void* address, size_t alignment, const char* what, Place place) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail(std::string(what) + " needs an address aligned to " + std::to_string(alignment) +
         " bytes at " + describe(place));
  }
}

void check_shared(const void* address, size_t bytes, const char* what, Place place) {
  const GuardedMemory& shared = *state().block.shared;
  const auto* begin = static_cast<const unsigned char*>(address);
  if (begin < shared.data() || begin + bytes > shared.data() + shared.bytes()) {
    fail(std::string(what) + " an address outside shared memory at " + describe(place));
  }
}

// ------------------------------------------------------------------------------------ allocations
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

uint4 load_stream(const void* address, Place place) {
  check_aligned(address, 16, "load_stream", place);
  state().statistics.global_bytes_streamed += 16;
  return *static_cast<const uint4*>(address);
}

void store_stream(void* address, uint4 value, Place place) {
  check_aligned(address, 16, "store_stream", place);
  state().statistics.global_bytes_streamed += 16;
  *static_cast<uint4*>(address) = value;
}

}  // namespace cuda_emulation
