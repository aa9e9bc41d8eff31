// Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) over a byte-level vocabulary, as
// GPT-2 and its successors store it. How text is cut into words is not decided here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "sagellm/base/hash.h"

namespace sagellm::text {

/// Places of things in an array, by hash (open addressing, at most half full).
class HashIndex {
 public:
  explicit HashIndex(size_t count);

  /// The slot of the thing for which `equal(place)` holds: its place, or -1 where it would go.
  template <typename Equal>
  int32_t& slot(uint64_t hash, const Equal& equal) {
    return slots_[position(hash, equal)];
  }
  template <typename Equal>
  int32_t find(uint64_t hash, const Equal& equal) const {
    return slots_[position(hash, equal)];
  }

 private:
  template <typename Equal>
  size_t position(uint64_t hash, const Equal& equal) const {
    const size_t mask = slots_.size() - 1;
    size_t at = hash & mask;
    while (slots_[at] >= 0 && !equal(slots_[at])) at = (at + 1) & mask;
    return at;
  }

  std::vector<int32_t> slots_;
};

/// A vocabulary and its merges. Immutable: any number of threads may encode at once.
class BytePairTable {
 public:
  /// Checks an untrusted vocabulary.
  ///
  /// `tokens`: texts by id; a byte is written as the printable character that GPT-2 gave it.
  /// `merges`: "left right", best first; the later one counts when a pair is named twice.
  /// `whole_words`: a word that is a token is not built from merges.
  /// Throws CorruptFile when a token appears twice, or a merge is malformed or no token.
  BytePairTable(std::vector<std::string> tokens, const std::vector<std::string_view>& merges,
                bool whole_words);

  int32_t size() const { return static_cast<int32_t>(tokens_.size()); }
  const std::string& token(int32_t id) const { return tokens_[static_cast<size_t>(id)]; }
  /// The id of a token by its stored text, or -1.
  int32_t find(std::string_view token) const;

  /// Appends the ids of one word. Bytes that are no token are left out.
  void encode(std::string_view word, std::vector<int32_t>& ids) const;

 private:
  struct Merge {
    int32_t left, right;
    int32_t whole;  // what the pair becomes
  };

  uint64_t hash_pair(int32_t left, int32_t right) const;
  uint64_t hash_text(std::string_view text) const;
  /// The rank of a merge (smaller ones merge first), or -1.
  int32_t rank_of(int32_t left, int32_t right) const;
  void add_token(int32_t id);
  void add_merge(std::string_view merge, std::string& scratch);

  HashKey key_ = random_hash_key();
  std::vector<std::string> tokens_;
  std::vector<Merge> merges_;      // by rank
  HashIndex ids_;                  // of tokens_
  HashIndex ranks_;                // of merges_
  std::vector<int32_t> byte_ids_;  // [256], -1 for a byte without a token
  bool whole_words_;
};

/// The text of `bytes` in the alphabet of byte-level vocabularies, UTF-8.
std::string to_byte_alphabet(std::string_view bytes);

}  // namespace sagellm::text
