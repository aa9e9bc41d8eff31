// What the cores give at most: the other yardstick, beside the bandwidth probe.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "sagellm/kernels/params.h"

namespace sagellm::runtime {

struct ArithmeticPeak {
  std::string instruction;    // such as "vpdpbusd zmm"
  double ops_per_second = 0;  // multiplications and additions, all threads together
};

/// Runs the multiply-accumulates that kernels of `isa` use on activations of `kind`, and nothing
/// else, on every thread for about `seconds`; the median. Throws Unsupported for an instruction set
/// that does not run here, InvalidArgument for bad numbers.
ArithmeticPeak arithmetic_peak(std::string_view isa, kernels::ActKind kind, int num_threads,
                               double seconds);

/// Bytes per second of reading `bytes` of huge-page memory in rounds of 4 MiB per thread, as short
/// as a kernel; the median. `read_bandwidth` is the same for one long round. Throws as
/// `arithmetic_peak`.
double memory_bandwidth(std::string_view isa, int num_threads, size_t bytes, double seconds);

/// Bytes per second of loads by every thread from 128 KiB of its own, which stay in its L2 cache;
/// the median. Throws as `arithmetic_peak`.
double cache_bandwidth(std::string_view isa, int num_threads, double seconds);

}  // namespace sagellm::runtime
