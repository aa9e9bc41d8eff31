// A strict pull reader for the JSON of a safetensors header: objects, arrays, strings and unsigned
// integers. The caller drives the grammar, so nothing is nested without being expected.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace sagellm::checkpoint {

/// Reads `text` front to back; every member throws CorruptFile naming `source` and the offset when
/// the text is not what is asked for.
class JsonCursor {
 public:
  JsonCursor(std::string_view text, std::string_view source) : text_(text), source_(source) {}

  /// Skips white space and consumes `c`.
  void expect(char c);
  /// Skips white space and consumes `c` when it is next.
  bool accept(char c);
  /// A string with its escapes decoded to UTF-8.
  std::string string();
  /// An integer of at most 64 bits without sign, fraction, exponent or leading zeros.
  uint64_t integer();
  /// Requires that only white space is left.
  void end();

 private:
  [[noreturn]] void reject(const char* why) const;
  void skip_space();
  char next();
  uint32_t hex4();
  void escape(std::string& out);

  std::string_view text_;
  std::string_view source_;
  size_t at_ = 0;
};

}  // namespace sagellm::checkpoint
