// What the machine's memory gives right now: the yardstick of every decode figure.
#pragma once

#include <cstddef>

namespace sagellm::runtime {

/// Reads `bytes` of huge-page memory with `num_threads` threads, `repeat` times after a warm-up;
/// returns the median in bytes per second. Throws InvalidArgument on non-positive arguments.
double read_bandwidth(int num_threads, size_t bytes, int repeat);

/// Peak resident memory of this process in bytes (VmHWM), and the present one (VmRSS). 0 where the
/// system has no /proc.
size_t peak_resident_bytes();
size_t resident_bytes();

}  // namespace sagellm::runtime
