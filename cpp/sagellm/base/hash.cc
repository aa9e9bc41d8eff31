#include "sagellm/base/hash.h"

#include <random>

namespace sagellm {

HashKey random_hash_key() {
  std::random_device source;
  const auto word = [&source] { return (static_cast<uint64_t>(source()) << 32) | source(); };
  HashKey key;
  key.a = word();
  key.b = word() | 1;  // never zero: a zero factor would erase the chain
  return key;
}

}  // namespace sagellm
