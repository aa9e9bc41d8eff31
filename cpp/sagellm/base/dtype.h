// Storage formats of tensors in checkpoints: plain types, FP8 and GGUF block formats.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace sagellm {

/// How the elements of a checkpoint tensor are stored.
enum class Format : uint8_t {
  kF32,
  kF16,
  kBF16,
  kF8_E4M3,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ2_K,
  kQ3_K,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kIQ4_NL,
};
inline constexpr int kNumFormats = 15;

/// Size facts of a format: `block_bytes` bytes hold `block_elements` consecutive elements of a row.
struct FormatInfo {
  std::string_view name;  // as GGUF or safetensors spell it: "Q4_K"
  int block_elements;
  int block_bytes;
};

/// Returns the facts of `format`.
const FormatInfo& format_info(Format format);

/// Returns the bytes of one row of `elements` elements; throws InvalidArgument when `elements` is
/// not a multiple of the block.
int64_t row_bytes(Format format, int64_t elements);

/// Returns the format named `name` (case-insensitive); throws Unsupported with the list of names.
Format format_from_name(std::string_view name);

/// Returns "F32, F16, ..." for error messages.
std::string supported_formats();

// Scalar conversions; round to nearest even, NaN stays NaN.
float f16_to_f32(uint16_t bits);
uint16_t f32_to_f16(float value);
float bf16_to_f32(uint16_t bits);
uint16_t f32_to_bf16(float value);

/// FP8 with 4 exponent and 3 fraction bits: no infinities, NaN is 0x7f and 0xff, the largest value
/// is 448.
float e4m3_to_f32(uint8_t bits);

}  // namespace sagellm
