// What one core can do at most with an instruction set: loops of nothing but multiply-accumulates
// over registers, and of nothing but loads. The yardstick of the kernel benchmarks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sagellm::kernels {

/// Independent multiply-accumulate chains, enough of them to hide the latency of each.
struct ProbeLoop {
  const char* instruction;     // what it consists of
  int64_t ops_per_iteration;   // multiplications and additions
  void (*run)(int64_t count);  // `count` iterations
};

/// The loops of one instruction set, for each kind of activations (see ActKind).
struct ProbeLoops {
  ProbeLoop f32;
  ProbeLoop bf16;
  ProbeLoop i8;
  /// Loads `bytes` (a multiple of 512) `passes` times; the result depends on all of them.
  uint64_t (*read)(const void* data, int64_t bytes, int64_t passes);
};

// As with KernelTable, each sets what its folder improves.
void fill_probe_loops_generic(ProbeLoops& loops);
void fill_probe_loops_avx2(ProbeLoops& loops);
void fill_probe_loops_avx512(ProbeLoops& loops);
void fill_probe_loops_avx512_bf16(ProbeLoops& loops);

}  // namespace sagellm::kernels
