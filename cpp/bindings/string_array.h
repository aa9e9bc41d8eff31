// Strings that lie in a checkpoint file, as a Python sequence.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "sagellm/checkpoint/gguf.h"

/// An array of strings in the metadata of a file. A vocabulary has a hundred thousand; str objects
/// of all of them take longer to make than the tables built from them.
struct StringArray {
  std::shared_ptr<const sagellm::checkpoint::GgufFile> file;  // owns the texts
  const std::vector<std::string_view>* texts;                 // valid UTF-8
};
