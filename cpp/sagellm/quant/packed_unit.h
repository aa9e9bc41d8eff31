// Sizes inside R16 row blocks (kernels/params.h) that packing and unpacking share.
#pragma once

#include <cstdint>
#include <cstring>

#include "sagellm/kernels/params.h"
#include "sagellm/quant/formats.h"

namespace sagellm::quant {

inline constexpr int kRows = kernels::kRowBlock;
inline constexpr int kNibbleBytes = 256;  // one unit: 16 rows x 32 codes
inline constexpr int kHighBytes = 64;
inline constexpr int kTwoBytes = 128;
inline constexpr int kUnitDwords = 8;  // 32 codes of a row, 4 to a dword
inline constexpr int kUnits = kSuperblock / kBlock;

inline uint16_t load16(const void* p) {
  uint16_t v;
  std::memcpy(&v, p, 2);
  return v;
}

}  // namespace sagellm::quant
