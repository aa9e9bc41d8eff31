#include "sagellm/checkpoint/text.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace sagellm::checkpoint {

bool is_utf8(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const auto continues = [&](size_t i) { return i < text.size() && (byte(i) & 0xc0) == 0x80; };
  size_t i = 0;
  while (i < text.size()) {
    if (i + 8 <= text.size()) {  // eight ASCII bytes at once
      uint64_t word = 0;
      std::memcpy(&word, text.data() + i, 8);
      if ((word & 0x8080808080808080u) == 0) {
        i += 8;
        continue;
      }
    }
    const uint8_t lead = byte(i);
    if (lead < 0x80) {
      i += 1;
    } else if (lead >= 0xc2 && lead <= 0xdf) {
      if (!continues(i + 1)) return false;
      i += 2;
    } else if (lead >= 0xe0 && lead <= 0xef) {
      if (!continues(i + 1) || !continues(i + 2)) return false;
      if (lead == 0xe0 && byte(i + 1) < 0xa0) return false;  // overlong
      if (lead == 0xed && byte(i + 1) > 0x9f) return false;  // surrogate
      i += 3;
    } else if (lead >= 0xf0 && lead <= 0xf4) {
      if (!continues(i + 1) || !continues(i + 2) || !continues(i + 3)) return false;
      if (lead == 0xf0 && byte(i + 1) < 0x90) return false;  // overlong
      if (lead == 0xf4 && byte(i + 1) > 0x8f) return false;  // above U+10FFFF
      i += 4;
    } else {
      return false;
    }
  }
  return true;
}

std::string in_quotes(std::string_view text) {
  constexpr size_t kLongest = 80;
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = "'";
  for (const char c : text.substr(0, kLongest)) {
    const auto byte = static_cast<uint8_t>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return out + (text.size() > kLongest ? "...'" : "'");
}

}  // namespace sagellm::checkpoint
