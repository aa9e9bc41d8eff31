// Text from untrusted files: validation, and a form that is safe to print.
#pragma once

#include <string>
#include <string_view>

namespace sagellm::checkpoint {

/// Whether `text` is well-formed UTF-8 (no overlong forms, no surrogates, at most U+10FFFF).
bool is_utf8(std::string_view text);

/// Returns `text` in quotes for a message: control and non-ASCII bytes as \xNN, cut after 80 bytes.
std::string in_quotes(std::string_view text);

}  // namespace sagellm::checkpoint
