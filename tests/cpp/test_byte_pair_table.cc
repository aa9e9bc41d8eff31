// BytePairTable: merging by rank, whole words, hostile vocabularies.
#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/text/byte_pair_table.h"

namespace sagellm::text {
namespace {

using Ids = std::vector<int32_t>;
using Merges = std::vector<std::string_view>;

Ids encode(const BytePairTable& table, std::string_view word) {
  Ids ids;
  table.encode(word, ids);
  return ids;
}

TEST(BytePairTable, MergesTheBestPairFirstAndTheLeftmostOfEquals) {
  // With "b c" first, "abc" keeps its a, though "a b" stands further left.
  const BytePairTable table({"a", "b", "c", "bc", "ab", "aa"}, {"b c", "a b", "a a"}, false);
  EXPECT_EQ(encode(table, "abc"), (Ids{0, 3}));
  EXPECT_EQ(encode(table, "aba"), (Ids{4, 0}));
  EXPECT_EQ(encode(table, "aaa"), (Ids{5, 0}));
  EXPECT_EQ(encode(table, ""), Ids{});
}

TEST(BytePairTable, BuildsOnWhatWasMerged) {
  const BytePairTable table({"a", "b", "ab", "abab"}, {"a b", "ab ab"}, false);
  EXPECT_EQ(encode(table, "ababab"), (Ids{3, 2}));
  Ids long_word = encode(table, std::string(200000, 'a'));
  EXPECT_EQ(long_word, Ids(200000, 0));
}

TEST(BytePairTable, ReadsBytesThroughTheAlphabet) {
  EXPECT_EQ(to_byte_alphabet(std::string_view("a \n\0\xAD\xFF", 6)),
            "a\xC4\xA0\xC4\x8A\xC4\x80\xC5\x83\xC3\xBF");
  // A space is written as U+0120; the byte 0xC3 as itself.
  const BytePairTable table({"\xC4\xA0", "a",
                             "\xC4\xA0"
                             "a"},
                            {"\xC4\xA0 a"}, false);
  EXPECT_EQ(encode(table, " a"), Ids{2});
  EXPECT_EQ(encode(table, "a\xC3"), Ids{1}) << "a byte that is no token is left out";
}

TEST(BytePairTable, TakesWholeWordsWhereTheRuleSaysSo) {
  const std::vector<std::string> tokens{"a", "b", "c", "ab", "abc"};
  EXPECT_EQ(encode(BytePairTable(tokens, Merges{"a b"}, false), "abc"), (Ids{3, 2}));
  EXPECT_EQ(encode(BytePairTable(tokens, Merges{"a b"}, true), "abc"), Ids{4});
}

TEST(BytePairTable, TheLaterOfTwoEqualMergesCounts) {
  const std::vector<std::string> tokens{"a", "b", "c", "ab", "bc"};
  EXPECT_EQ(encode(BytePairTable(tokens, Merges{"a b", "b c"}, false), "abc"), (Ids{3, 2}));
  EXPECT_EQ(encode(BytePairTable(tokens, Merges{"a b", "b c", "a b"}, false), "abc"), (Ids{0, 4}));
}

TEST(BytePairTable, FindsTokensByText) {
  const BytePairTable table({"a", "", "bc"}, {}, false);
  EXPECT_EQ(table.find("bc"), 2);
  EXPECT_EQ(table.find(""), 1);
  EXPECT_EQ(table.find("b"), -1);
  EXPECT_EQ(BytePairTable({}, {}, false).find("a"), -1);
}

TEST(BytePairTable, RefusesWhatContradictsItself) {
  EXPECT_THROW(BytePairTable({"a", "a"}, {}, false), CorruptFile);
  for (const std::string_view merge : {"", " ", "a", "a ", " a", "ab", "a b", "b a", "a a"}) {
    EXPECT_THROW(BytePairTable({"a", "b"}, {merge}, false), CorruptFile) << merge;
  }
}

}  // namespace
}  // namespace sagellm::text
