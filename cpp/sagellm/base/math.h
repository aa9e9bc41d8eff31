// Integer arithmetic used for sizes. The checked forms throw CorruptFile instead of wrapping.
#pragma once

#include <cstdint>

#include "sagellm/base/error.h"

namespace sagellm {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr bool is_power_of_two(int64_t a) { return a > 0 && (a & (a - 1)) == 0; }

/// a + b for untrusted sizes.
inline uint64_t checked_add(uint64_t a, uint64_t b) {
  uint64_t r = 0;
  require<CorruptFile>(!__builtin_add_overflow(a, b, &r),
                       "sizes overflow; the file is damaged, download it again");
  return r;
}

/// a * b for untrusted sizes.
inline uint64_t checked_mul(uint64_t a, uint64_t b) {
  uint64_t r = 0;
  require<CorruptFile>(!__builtin_mul_overflow(a, b, &r),
                       "sizes overflow; the file is damaged, download it again");
  return r;
}

}  // namespace sagellm
