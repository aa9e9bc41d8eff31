#include "sagellm/checkpoint/json_cursor.h"

#include "sagellm/base/error.h"
#include "sagellm/checkpoint/text.h"

namespace sagellm::checkpoint {

namespace {

void append_utf8(std::string& out, uint32_t code) {
  const auto put = [&](uint32_t byte) { out += static_cast<char>(byte); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xc0 | (code >> 6));
    put(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    put(0xe0 | (code >> 12));
    put(0x80 | ((code >> 6) & 0x3f));
    put(0x80 | (code & 0x3f));
  } else {
    put(0xf0 | (code >> 18));
    put(0x80 | ((code >> 12) & 0x3f));
    put(0x80 | ((code >> 6) & 0x3f));
    put(0x80 | (code & 0x3f));
  }
}

}  // namespace

void JsonCursor::reject(const char* why) const {
  fail<CorruptFile>(source_, ": malformed header at byte ", at_, ": ", why,
                    "; download the file again");
}

void JsonCursor::skip_space() {
  while (at_ < text_.size() &&
         (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r')) {
    ++at_;
  }
}

char JsonCursor::next() {
  if (at_ == text_.size()) reject("it ends too early");
  return text_[at_++];
}

bool JsonCursor::accept(char c) {
  skip_space();
  if (at_ == text_.size() || text_[at_] != c) return false;
  ++at_;
  return true;
}

void JsonCursor::expect(char c) {
  if (!accept(c)) {
    const char why[] = {'e', 'x', 'p', 'e', 'c', 't', 'e', 'd', ' ', '\'', c, '\'', '\0'};
    reject(why);
  }
}

uint32_t JsonCursor::hex4() {
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i) {
    const char c = next();
    value <<= 4;
    if (c >= '0' && c <= '9') {
      value |= static_cast<uint32_t>(c - '0');
    } else if (c >= 'a' && c <= 'f') {
      value |= static_cast<uint32_t>(c - 'a' + 10);
    } else if (c >= 'A' && c <= 'F') {
      value |= static_cast<uint32_t>(c - 'A' + 10);
    } else {
      reject("a \\u escape needs four hexadecimal digits");
    }
  }
  return value;
}

void JsonCursor::escape(std::string& out) {
  switch (next()) {
    case '"':
      out += '"';
      return;
    case '\\':
      out += '\\';
      return;
    case '/':
      out += '/';
      return;
    case 'b':
      out += '\b';
      return;
    case 'f':
      out += '\f';
      return;
    case 'n':
      out += '\n';
      return;
    case 'r':
      out += '\r';
      return;
    case 't':
      out += '\t';
      return;
    case 'u':
      break;
    default:
      reject("unknown escape");
  }
  uint32_t code = hex4();
  if (code >= 0xd800 && code <= 0xdbff) {
    if (next() != '\\' || next() != 'u') reject("a high surrogate without its low one");
    const uint32_t low = hex4();
    if (low < 0xdc00 || low > 0xdfff) reject("a high surrogate without its low one");
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  } else if (code >= 0xdc00 && code <= 0xdfff) {
    reject("a low surrogate without its high one");
  }
  append_utf8(out, code);
}

std::string JsonCursor::string() {
  expect('"');
  std::string out;
  for (;;) {
    const char c = next();
    if (c == '"') break;
    if (c == '\\') {
      escape(out);
    } else {
      if (static_cast<unsigned char>(c) < 0x20) reject("a control character in a string");
      out += c;
    }
  }
  if (!is_utf8(out)) reject("a string is not valid UTF-8");
  return out;
}

uint64_t JsonCursor::integer() {
  skip_space();
  const size_t begin = at_;
  uint64_t value = 0;
  while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
    const auto digit = static_cast<uint64_t>(text_[at_] - '0');
    if (__builtin_mul_overflow(value, uint64_t{10}, &value) ||
        __builtin_add_overflow(value, digit, &value)) {
      reject("an integer beyond 64 bits");
    }
    ++at_;
  }
  if (at_ == begin) reject("expected an integer that is not negative");
  if (text_[begin] == '0' && at_ - begin > 1) reject("an integer with a leading zero");
  return value;
}

void JsonCursor::end() {
  skip_space();
  if (at_ != text_.size()) reject("something follows the closing brace");
}

}  // namespace sagellm::checkpoint
