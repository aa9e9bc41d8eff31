// Any vocabulary is either refused with an error of ours or encodes any word to its own ids.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/text/byte_pair_table.h"

namespace {

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // Lines of tokens and of merges, and a word: three parts between NUL bytes.
  const auto parts = split({reinterpret_cast<const char*>(data), size}, '\0');
  if (parts.size() < 3) return 0;
  const auto tokens = split(parts[0], '\n');
  try {
    const sagellm::text::BytePairTable table(std::vector<std::string>(tokens.begin(), tokens.end()),
                                             split(parts[1], '\n'), size % 2 == 0);
    std::vector<int32_t> ids;
    table.encode(parts[2], ids);
    for (const int32_t id : ids) {
      if (id < 0 || id >= table.size()) std::abort();
    }
  } catch (const sagellm::Error&) {
  }
  return 0;
}
