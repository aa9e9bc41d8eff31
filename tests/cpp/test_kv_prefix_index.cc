// PrefixIndex against a map of exact prefixes, with all degrees of hash collision.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/kv/integrity.h"
#include "sagellm/kv/prefix_index.h"

namespace sagellm::kv {
namespace {

constexpr HashKey kKey{0x1234567, 0x89abcdef1};

TEST(PrefixIndex, TellsParentSaltAndTokensApart) {
  for (const uint64_t mask : {uint64_t{0}, ~uint64_t{0}}) {
    PrefixIndex index(8, 2, 1, kKey, mask);
    const int32_t tokens[] = {1, 2};
    const int32_t others[] = {2, 1};
    const int32_t first = index.find_or_insert(PrefixIndex::kRoot, 5, tokens);
    index.attach(first, 0, 100);
    const int32_t second = index.find_or_insert(first, 5, tokens);
    index.attach(second, 0, 101);
    EXPECT_NE(first, second);
    EXPECT_EQ(index.find(PrefixIndex::kRoot, 5, tokens), first);
    EXPECT_EQ(index.find(first, 5, tokens), second);
    EXPECT_EQ(index.find(PrefixIndex::kRoot, 6, tokens), 0);
    EXPECT_EQ(index.find(PrefixIndex::kRoot, 5, others), 0);
    EXPECT_EQ(index.find(second, 5, tokens), 0);
    EXPECT_EQ(index.find_or_insert(first, 5, tokens), second);
    index.check_integrity({});
  }
}

TEST(PrefixIndex, KeepsAParentWhileAChildNeedsIt) {
  PrefixIndex index(8, 1, 2, kKey);
  const int32_t token = 1;
  const int32_t head = index.find_or_insert(PrefixIndex::kRoot, 0, &token);
  index.attach(head, 0, 10);
  const int32_t tail = index.find_or_insert(head, 0, &token);
  index.attach(tail, 1, 11);
  index.detach(head, 10);  // the odd order
  index.check_integrity({});
  EXPECT_EQ(index.block(head, 0), 0);
  EXPECT_EQ(index.find(index.find(PrefixIndex::kRoot, 0, &token), 0, &token), tail);
  index.detach(tail, 11);
  index.check_integrity({});
  EXPECT_EQ(index.num_nodes(), 0);
}

TEST(PrefixIndex, SaysWhenNoNodeIsLeftAndReusesNodes) {
  PrefixIndex index(2, 1, 1, kKey);
  const int32_t tokens[] = {1, 2, 3};
  for (int i = 0; i < 2; ++i) index.attach(index.find_or_insert(0, 0, tokens + i), 0, 10 + i);
  EXPECT_EQ(index.find_or_insert(0, 0, tokens + 2), 0);
  EXPECT_NE(index.find_or_insert(0, 0, tokens + 1), 0);
  index.check_integrity({});
  index.detach(index.find(0, 0, tokens), 10);
  EXPECT_NE(index.find_or_insert(0, 0, tokens + 2), 0);
}

TEST(PrefixIndex, ReportsAForeignBlockAndALostReference) {
  PrefixIndex index(2, 1, 1, kKey);
  const int32_t token = 1;
  const int32_t node = index.find_or_insert(0, 0, &token);
  index.attach(node, 0, 10);
  EXPECT_THROW(index.detach(node, 11), IntegrityError);
  index.retain(node);
  EXPECT_THROW(index.check_integrity({}), IntegrityError);
  std::vector<int32_t> held(3);
  held[static_cast<size_t>(node)] = 1;
  index.check_integrity(held);
}

// Backward-shift deletion is where open addressing goes wrong: insert and erase at random under
// masks that make long runs, and look everything up every time.
TEST(PrefixIndex, AgreesWithAMapOverRandomUse) {
  for (const uint64_t mask : {uint64_t{0}, uint64_t{3}, uint64_t{0x1f}, ~uint64_t{0}}) {
    PrefixIndex index(40, 3, 1, kKey, mask);
    using Prefix = std::pair<int32_t, std::vector<int32_t>>;  // parent node, tokens
    std::map<Prefix, int32_t> shadow;
    std::map<int32_t, int32_t> held;  // node -> references of ours
    std::mt19937 random(static_cast<uint32_t>(mask) + 1);
    for (int step = 0; step < 4000; ++step) {
      if (random() % 2 == 0) {
        auto parent = PrefixIndex::kRoot;
        if (!held.empty() && random() % 2 == 0) {
          parent = std::next(held.begin(), static_cast<int>(random() % held.size()))->first;
        }
        std::vector<int32_t> tokens(3);
        for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 3);
        const int32_t before = index.num_nodes();
        const int32_t node = index.find_or_insert(parent, 1, tokens.data());
        const auto known = shadow.find({parent, tokens});
        if (node == 0) {
          ASSERT_EQ(before, index.max_nodes());
          continue;
        }
        if (known != shadow.end()) {
          ASSERT_EQ(node, known->second);
        }
        shadow[{parent, tokens}] = node;
        index.retain(node);
        ++held[node];
      } else if (!held.empty()) {
        const auto it = std::next(held.begin(), static_cast<int>(random() % held.size()));
        const int32_t node = it->first;
        if (--it->second == 0) held.erase(it);
        index.drop(node);
      }
      // A prefix is there exactly if it or a descendant of it is held.
      std::erase_if(shadow, [&](const auto& entry) { return !index.is_live(entry.second); });
      ASSERT_EQ(static_cast<int32_t>(shadow.size()), index.num_nodes());
      for (const auto& [prefix, node] : shadow) {
        ASSERT_EQ(index.find(prefix.first, 1, prefix.second.data()), node);
      }
      for (const auto& [node, count] : held) ASSERT_TRUE(index.is_live(node));
      std::vector<int32_t> references(41);
      for (const auto& [node, count] : held) references[static_cast<size_t>(node)] = count;
      index.check_integrity(references);
    }
  }
}

}  // namespace
}  // namespace sagellm::kv
