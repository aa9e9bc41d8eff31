// Byte offsets inside the R16 row blocks of params.h, for the matmul kernels of every instruction
// set. Only compile-time constants: nothing here is emitted into an object file.
#pragma once

#include "sagellm/kernels/params.h"

namespace sagellm::kernels {

/// How the codes of one unit (16 rows x 32 k) are stored.
enum class CodeBits { k4, k5, k6, k8 };

/// Layout of a quantized format. A group is what repeats along k: one unit, or a K-quant superblock
/// of 8.
struct QuantLayout {
  CodeBits bits;
  int zero_point;   // the weight is scale * (code - zero_point) [+ min]
  bool has_min;     // a min is added per unit
  int units;        // units per group
  int unit_bytes;   // codes of one unit: nibbles or bytes, then high bits
  int group_bytes;  // from one group to the next
  int sub_scales;   // K-quants: offset of sc in the group (mn follows when has_min); else 0
  int d;            // offset of d[16] in the group
  int m;            // offset of m[16], or of dmin[16] in K-quants
};

constexpr QuantLayout quant_layout(PackedFormat format) {
  switch (format) {
    case PackedFormat::kQ4_0:
      return {CodeBits::k4, 8, false, 1, 256, 288, 0, 256, 0};
    case PackedFormat::kQ4_1:
      return {CodeBits::k4, 0, true, 1, 256, 320, 0, 256, 288};
    case PackedFormat::kQ5_0:
      return {CodeBits::k5, 16, false, 1, 320, 352, 0, 320, 0};
    case PackedFormat::kQ5_1:
      return {CodeBits::k5, 0, true, 1, 320, 384, 0, 320, 352};
    case PackedFormat::kQ8_0:
      return {CodeBits::k8, 128, false, 1, 512, 544, 0, 512, 0};
    case PackedFormat::kQ4_K:
      return {CodeBits::k4, 0, true, 8, 256, 2368, 2048, 2304, 2336};
    case PackedFormat::kQ5_K:
      return {CodeBits::k5, 0, true, 8, 320, 2880, 2560, 2816, 2848};
    case PackedFormat::kQ6_K:
      return {CodeBits::k6, 32, false, 8, 384, 3360, 3072, 3328, 0};
    default:
      return {};
  }
}

constexpr bool layout_matches_params(PackedFormat format) {
  const QuantLayout l = quant_layout(format);
  return static_cast<size_t>(l.group_bytes) == packed_row_block_bytes(format, l.units * kUnit);
}
static_assert(
    layout_matches_params(PackedFormat::kQ4_0) && layout_matches_params(PackedFormat::kQ4_1) &&
    layout_matches_params(PackedFormat::kQ5_0) && layout_matches_params(PackedFormat::kQ5_1) &&
    layout_matches_params(PackedFormat::kQ8_0) && layout_matches_params(PackedFormat::kQ4_K) &&
    layout_matches_params(PackedFormat::kQ5_K) && layout_matches_params(PackedFormat::kQ6_K));

/// Largest |X| of an activation block: A8 and A15 (params.h).
inline constexpr float kA8Limit = 127.f;
inline constexpr float kA15Limit = 16256.f;
/// Blocks with a scale below the smallest normal float count as zero: 1/d would overflow.
inline constexpr float kMinScale = 1.17549435e-38f;

}  // namespace sagellm::kernels
