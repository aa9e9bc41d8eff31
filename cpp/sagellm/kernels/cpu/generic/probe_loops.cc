// Plain multiplications and additions, as the compiler translates them for the baseline of the
// architecture; see kernels/cpu/probe_loops.h.
#include "sagellm/kernels/cpu/probe_loops.h"

namespace sagellm::kernels {
namespace {

constexpr int kLanes = 32;  // several vectors of chains on any baseline

template <typename T>
void multiply_add(int64_t count, T factor) {
  T sums[kLanes] = {};
  asm volatile("" : : "r"(sums) : "memory");  // no two are known to be equal
  for (int64_t n = 0; n < count; ++n) {
    asm volatile("" : "+m"(factor));
    for (int i = 0; i < kLanes; ++i) sums[i] = static_cast<T>(sums[i] * factor + factor);
  }
  asm volatile("" : : "r"(sums) : "memory");
}

void run_f32(int64_t count) { multiply_add<float>(count, 0.5f); }
void run_i8(int64_t count) { multiply_add<uint16_t>(count, 3); }

uint64_t read(const void* data, int64_t bytes, int64_t passes) {
  const auto* words = static_cast<const uint64_t*>(data);
  uint64_t sums[8] = {};
  for (int64_t pass = 0; pass < passes; ++pass) {
    asm volatile("" : "+r"(words));
    for (int64_t i = 0; i < bytes / 8; i += 8) {
      for (int j = 0; j < 8; ++j) sums[j] ^= words[i + j];
    }
  }
  uint64_t all = 0;
  for (const uint64_t sum : sums) all ^= sum;
  return all;
}

}  // namespace

void fill_probe_loops_generic(ProbeLoops& loops) {
  loops.f32 = {"float multiply and add", 2 * kLanes, run_f32};
  loops.bf16 = loops.f32;
  loops.i8 = {"16-bit multiply and add", 2 * kLanes, run_i8};
  loops.read = read;
}

}  // namespace sagellm::kernels
