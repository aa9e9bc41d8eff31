// KvCache: what Python cannot see. Behaviour is tested from Python against the reference
// implementation.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <numeric>
#include <vector>

#include "sagellm/kv/kv_cache.h"

namespace {
std::atomic<int64_t> num_allocations{0};
std::atomic<int64_t> allocations_until_failure{-1};  // -1: never
}  // namespace

// Not inlined, so that the compiler does not judge half of the pair.
[[gnu::noinline]] void* operator new(std::size_t size) {
  ++num_allocations;
  if (allocations_until_failure >= 0 && allocations_until_failure-- == 0) throw std::bad_alloc();
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace sagellm::kv {
namespace {

std::vector<int32_t> prompt(int64_t length, int32_t first) {
  std::vector<int32_t> tokens(static_cast<size_t>(length));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

void run_request(KvCache& cache, int64_t id, const std::vector<int32_t>& tokens) {
  cache.add(id, 0);
  const int64_t cached = cache.match_prefix(id, tokens);
  for (auto end = cached + 5; end < static_cast<int64_t>(tokens.size()); end += 5) {
    ASSERT_TRUE(cache.reserve(id, end));
    cache.commit(id, tokens, end);
  }
  cache.release(id);
}

TEST(KvCache, NeedsNoMemoryInSteadyState) {
  KvCache cache({.num_blocks = 64, .block_size = 4, .windows = {0, 12}});
  std::vector<std::vector<int32_t>> prompts;
  for (int32_t i = 0; i < 4; ++i) prompts.push_back(prompt(60, 1000 * i));
  // Mostly two prompts that stay cached together; the others push them out now and then.
  const auto choose = [&](int64_t id) -> const std::vector<int32_t>& {
    return prompts[static_cast<size_t>(id % 8 < 6 ? id % 2 : id % 4)];
  };
  for (int64_t id = 0; id < 8; ++id) run_request(cache, id, choose(id));
  const int64_t before = num_allocations;
  for (int64_t id = 8; id < 200; ++id) run_request(cache, id, choose(id));
  EXPECT_EQ(num_allocations, before);
  EXPECT_GT(cache.stats().evicted_blocks, 100);
  EXPECT_GT(cache.stats().prefix_hit_tokens, 0);
  cache.check_integrity();
}

// Lets the k-th allocation of a call fail, for every k: the call throws, nothing changes, and
// trying again works.
template <typename Call>
void expect_unchanged_by_failed_allocations(KvCache& cache, Call call) {
  for (int64_t k = 0;; ++k) {
    const KvStats before = cache.stats();
    allocations_until_failure = k;
    try {
      call();
      allocations_until_failure = -1;
      return;
    } catch (const std::bad_alloc&) {
      allocations_until_failure = -1;
    }
    const KvStats after = cache.stats();
    ASSERT_EQ(before.free_blocks, after.free_blocks);
    ASSERT_EQ(before.cached_blocks, after.cached_blocks);
    ASSERT_EQ(before.prefix_queried_tokens, after.prefix_queried_tokens);
    ASSERT_EQ(before.copied_blocks, after.copied_blocks);
    cache.check_integrity();
    ASSERT_LT(k, 100);
  }
}

TEST(KvCache, AFailedAllocationChangesNothing) {
  KvCache cache({.num_blocks = 64, .block_size = 4, .windows = {0, 12}});
  const auto tokens = prompt(30, 0);
  expect_unchanged_by_failed_allocations(cache, [&] { cache.add(1, 0); });
  expect_unchanged_by_failed_allocations(cache, [&] { ASSERT_TRUE(cache.reserve(1, 30)); });
  expect_unchanged_by_failed_allocations(cache, [&] { cache.commit(1, tokens, 30); });
  expect_unchanged_by_failed_allocations(cache, [&] { cache.fork(1, 2); });
  expect_unchanged_by_failed_allocations(cache, [&] { ASSERT_TRUE(cache.reserve(2, 40)); });
  expect_unchanged_by_failed_allocations(cache, [&] { EXPECT_EQ(cache.take_copies().size(), 2u); });
  expect_unchanged_by_failed_allocations(cache, [&] { cache.add(3, 0); });
  expect_unchanged_by_failed_allocations(cache,
                                         [&] { EXPECT_EQ(cache.match_prefix(3, tokens), 28); });
  expect_unchanged_by_failed_allocations(cache, [&] { cache.pin(1); });
  for (const int64_t id : {1, 2, 3}) {
    expect_unchanged_by_failed_allocations(cache, [&] { cache.release(id); });
  }
  expect_unchanged_by_failed_allocations(cache, [&] { cache.unpin(1); });
  EXPECT_EQ(cache.stats().free_blocks, 64);
}

}  // namespace
}  // namespace sagellm::kv
