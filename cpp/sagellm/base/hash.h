// Keyed 64-bit hash of 32-bit words, for placing things in tables. Equality is always decided by an
// exact comparison; the key only keeps outsiders from choosing inputs that collide.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace sagellm {

struct HashKey {
  uint64_t a = 0;
  uint64_t b = 0;
};

/// Returns a key from the system's random source.
HashKey random_hash_key();

/// Folds the 128-bit product of `a` and `b` to 64 bits.
inline uint64_t multiply_fold(uint64_t a, uint64_t b) {
  __extension__ using uint128 = unsigned __int128;
  const uint128 product = static_cast<uint128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

/// Hashes `count` words, chained on `seed` (the hash of what comes before them).
inline uint64_t hash_words(const HashKey& key, uint64_t seed, const int32_t* words, size_t count) {
  uint64_t h = seed ^ key.a;
  size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    uint64_t pair[2];
    std::memcpy(pair, words + i, sizeof(pair));
    h = multiply_fold(pair[0] ^ key.b, pair[1] ^ h);
  }
  for (; i < count; ++i) h = multiply_fold(static_cast<uint32_t>(words[i]) ^ key.b, h);
  return multiply_fold(h ^ key.a, key.b ^ count);
}

}  // namespace sagellm
