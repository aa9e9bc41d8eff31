#include "sagellm/base/dtype.h"

#include <array>
#include <bit>
#include <cctype>

#include "sagellm/base/error.h"

namespace sagellm {

namespace {
constexpr std::array<FormatInfo, kNumFormats> kInfo = {{
    {"F32", 1, 4},
    {"F16", 1, 2},
    {"BF16", 1, 2},
    {"F8_E4M3", 1, 1},
    {"Q4_0", 32, 18},
    {"Q4_1", 32, 20},
    {"Q5_0", 32, 22},
    {"Q5_1", 32, 24},
    {"Q8_0", 32, 34},
    {"Q2_K", 256, 84},
    {"Q3_K", 256, 110},
    {"Q4_K", 256, 144},
    {"Q5_K", 256, 176},
    {"Q6_K", 256, 210},
    {"IQ4_NL", 32, 18},
}};

bool equals_ignoring_case(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::toupper(static_cast<unsigned char>(a[i])) !=
        std::toupper(static_cast<unsigned char>(b[i])))
      return false;
  }
  return true;
}
}  // namespace

const FormatInfo& format_info(Format format) { return kInfo[static_cast<size_t>(format)]; }

int64_t row_bytes(Format format, int64_t elements) {
  const FormatInfo& info = format_info(format);
  require<InvalidArgument>(elements >= 0 && elements % info.block_elements == 0, "a row of ",
                           elements, " elements is not a whole number of ", info.name,
                           " blocks of ", info.block_elements);
  return elements / info.block_elements * info.block_bytes;
}

Format format_from_name(std::string_view name) {
  for (size_t i = 0; i < kInfo.size(); ++i) {
    if (equals_ignoring_case(name, kInfo[i].name)) return static_cast<Format>(i);
  }
  fail<Unsupported>("unknown tensor format '", name, "'; supported: ", supported_formats());
}

std::string supported_formats() {
  std::string out;
  for (const FormatInfo& info : kInfo) {
    if (!out.empty()) out += ", ";
    out += info.name;
  }
  return out;
}

float bf16_to_f32(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t f32_to_bf16(float value) {
  const uint32_t u = std::bit_cast<uint32_t>(value);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

float e4m3_to_f32(uint8_t bits) {
  const auto sign = static_cast<uint32_t>(bits & 0x80u);
  const auto magnitude = static_cast<uint32_t>(bits & 0x7fu);
  if (magnitude == 0x7fu) return std::bit_cast<float>(sign << 24 | 0x7fc00000u);
  // The fields lie as in a half, whose exponent bias is larger by 8.
  return f16_to_f32(static_cast<uint16_t>(sign << 8 | magnitude << 7)) * 256.f;
}

float f16_to_f32(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24 is exact in f32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

uint16_t f32_to_f16(float value) {
  const uint32_t u = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude <
      0x38800000u) {  // subnormal half: adding 0.5 aligns the mantissa at 2^-24 and rounds it
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(
      sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

}  // namespace sagellm
