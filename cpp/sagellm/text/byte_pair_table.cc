#include "sagellm/text/byte_pair_table.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <functional>
#include <limits>
#include <queue>
#include <utility>

#include "sagellm/base/error.h"
#include "sagellm/checkpoint/text.h"

namespace sagellm::text {

namespace {

using checkpoint::in_quotes;

bool is_printable(int byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

/// Characters by byte: printable Latin-1 stands for itself, the rest for U+0100 and on, in order.
std::array<std::string, 256> make_alphabet() {
  std::array<std::string, 256> alphabet;
  int next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const int code = is_printable(byte) ? byte : next++;
    std::string& text = alphabet[static_cast<size_t>(byte)];
    if (code < 0x80) {
      text.push_back(static_cast<char>(code));
    } else {
      text.push_back(static_cast<char>(0xC0 | code >> 6));
      text.push_back(static_cast<char>(0x80 | (code & 0x3F)));
    }
  }
  return alphabet;
}

const std::array<std::string, 256>& alphabet() {
  static const std::array<std::string, 256> characters = make_alphabet();
  return characters;
}

struct Symbol {
  int32_t id;  // -1: merged into its left neighbour
  int32_t previous, next;
};

struct Candidate {
  int32_t rank, position;
  bool operator>(const Candidate& other) const {
    return rank != other.rank ? rank > other.rank : position > other.position;
  }
};

}  // namespace

std::string to_byte_alphabet(std::string_view bytes) {
  std::string text;
  for (const char byte : bytes) text += alphabet()[static_cast<uint8_t>(byte)];
  return text;
}

HashIndex::HashIndex(size_t count) : slots_(std::bit_ceil(2 * count + 1), -1) {}

BytePairTable::BytePairTable(std::vector<std::string> tokens,
                             const std::vector<std::string_view>& merges, bool whole_words)
    : tokens_(std::move(tokens)),
      ids_(tokens_.size()),
      ranks_(merges.size()),
      whole_words_(whole_words) {
  constexpr size_t kMost = std::numeric_limits<int32_t>::max();
  require<CorruptFile>(tokens_.size() <= kMost && merges.size() <= kMost, "the vocabulary has ",
                       tokens_.size(), " tokens and ", merges.size(), " merges; at most ", kMost,
                       " of each");
  for (size_t i = 0; i < tokens_.size(); ++i) add_token(static_cast<int32_t>(i));
  for (const std::string& character : alphabet()) byte_ids_.push_back(find(character));
  merges_.reserve(merges.size());
  std::string scratch;
  for (const std::string_view merge : merges) add_merge(merge, scratch);
}

void BytePairTable::add_token(int32_t id) {
  const std::string& text = token(id);
  int32_t& slot = ids_.slot(hash_text(text), [&](int32_t other) { return token(other) == text; });
  if (slot >= 0) fail<CorruptFile>("the vocabulary holds the same token twice: ", in_quotes(text));
  slot = id;
}

void BytePairTable::add_merge(std::string_view merge, std::string& scratch) {
  const size_t space = merge.find(' ', 1);  // a token has at least one character
  if (space == std::string_view::npos || space + 1 == merge.size()) {
    fail<CorruptFile>("merge ", in_quotes(merge), " is not two tokens");
  }
  scratch.assign(merge.substr(0, space)).append(merge.substr(space + 1));
  const int32_t left = find(merge.substr(0, space));
  const int32_t right = find(merge.substr(space + 1));
  const int32_t whole = find(scratch);
  if (left < 0 || right < 0 || whole < 0) {
    fail<CorruptFile>("the merges do not fit the vocabulary: a part of ", in_quotes(merge),
                      ", or the whole, is no token");
  }
  ranks_.slot(hash_pair(left, right), [&](int32_t rank) {
    const Merge& other = merges_[static_cast<size_t>(rank)];
    return other.left == left && other.right == right;
  }) = static_cast<int32_t>(merges_.size());
  merges_.push_back({left, right, whole});
}

uint64_t BytePairTable::hash_pair(int32_t left, int32_t right) const {
  const int32_t words[2] = {left, right};
  return hash_words(key_, 0, words, 2);
}

uint64_t BytePairTable::hash_text(std::string_view text) const {
  uint64_t hash = key_.a ^ text.size();
  for (size_t at = 0; at < text.size(); at += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, text.data() + at, std::min(sizeof(word), text.size() - at));
    hash = multiply_fold(word ^ key_.b, hash);
  }
  return multiply_fold(hash ^ key_.a, key_.b);
}

int32_t BytePairTable::find(std::string_view text) const {
  return ids_.find(hash_text(text), [&](int32_t id) { return token(id) == text; });
}

int32_t BytePairTable::rank_of(int32_t left, int32_t right) const {
  return ranks_.find(hash_pair(left, right), [&](int32_t rank) {
    const Merge& merge = merges_[static_cast<size_t>(rank)];
    return merge.left == left && merge.right == right;
  });
}

void BytePairTable::encode(std::string_view word, std::vector<int32_t>& ids) const {
  require<InvalidArgument>(word.size() <= std::numeric_limits<int32_t>::max(), "a word of ",
                           word.size(), " bytes is too long");
  if (whole_words_) {
    const int32_t id = find(to_byte_alphabet(word));
    if (id >= 0) {
      ids.push_back(id);
      return;
    }
  }
  std::vector<Symbol> symbols;
  symbols.reserve(word.size());
  for (const char byte : word) {
    const int32_t id = byte_ids_[static_cast<uint8_t>(byte)];
    const auto at = static_cast<int32_t>(symbols.size());
    if (id >= 0) symbols.push_back({id, at - 1, at + 1});
  }
  if (symbols.empty()) return;
  symbols.back().next = -1;

  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates;
  const auto consider = [&](int32_t left) {
    if (left < 0) return;
    const Symbol& symbol = symbols[static_cast<size_t>(left)];
    if (symbol.next < 0) return;
    const int32_t rank = rank_of(symbol.id, symbols[static_cast<size_t>(symbol.next)].id);
    if (rank >= 0) candidates.push({rank, left});
  };
  for (size_t i = 0; i < symbols.size(); ++i) consider(static_cast<int32_t>(i));
  while (!candidates.empty()) {
    const Candidate best = candidates.top();
    candidates.pop();
    Symbol& left = symbols[static_cast<size_t>(best.position)];
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = symbols[static_cast<size_t>(left.next)];
    const Merge& merge = merges_[static_cast<size_t>(best.rank)];
    if (left.id != merge.left || right.id != merge.right) continue;  // one has changed since
    left.id = merge.whole;
    right.id = -1;
    left.next = right.next;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = best.position;
    consider(left.previous);
    consider(best.position);
  }
  for (int32_t i = 0; i >= 0; i = symbols[static_cast<size_t>(i)].next) {
    ids.push_back(symbols[static_cast<size_t>(i)].id);
  }
}

}  // namespace sagellm::text
