// The plan of CUDA attention: every query sees every position once, work is spread, sizes hold.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <tuple>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/cuda/attention_plan.h"

namespace sagellm::cuda {
namespace {

using kernels::cuda::AttentionItem;
using kernels::cuda::AttentionKernel;
using kernels::cuda::kAttentionTileTokens;
using kernels::cuda::kNarrowRows;

constexpr AttentionKernel kKernels[] = {AttentionKernel::kNarrow, AttentionKernel::kWide};

struct Sequence {
  int32_t context = 0;  // with the tokens of the step
  int32_t tokens = 0;
  int32_t shared = 0;  // leading blocks that it has in common with others of the same `family`
  int32_t family = 0;
};

struct Batch {
  std::vector<int32_t> query_starts{0};
  std::vector<int32_t> positions;
  std::vector<int32_t> block_tables;
  int64_t stride = 0;

  AttentionBatch view() const { return {query_starts, positions, block_tables, stride}; }
};

Batch make_batch(const std::vector<Sequence>& sequences, int32_t page_size) {
  Batch batch;
  for (const Sequence& s : sequences) {
    batch.stride = std::max<int64_t>(batch.stride, (s.context + page_size - 1) / page_size);
  }
  int32_t next = 1'000'000;
  for (const Sequence& s : sequences) {
    for (int64_t b = 0; b < batch.stride; ++b) {
      batch.block_tables.push_back(b < s.shared ? s.family * 10'000 + static_cast<int32_t>(b)
                                                : next++);
    }
    for (int32_t t = s.context - s.tokens; t < s.context; ++t) batch.positions.push_back(t);
    batch.query_starts.push_back(static_cast<int32_t>(batch.positions.size()));
  }
  return batch;
}

AttentionPlanOptions options_of(int32_t group, int32_t num_kv_heads = 2) {
  AttentionPlanOptions o;
  o.num_heads = group * num_kv_heads;
  o.num_kv_heads = num_kv_heads;
  o.head_dim = 128;
  o.page_size = 16;
  o.narrow_ctas = 64;
  o.wide_ctas = 32;
  return o;
}

int64_t steps_of(const AttentionItem& item) {
  return (item.kv_end + kAttentionTileTokens - 1) / kAttentionTileTokens -
         item.kv_begin / kAttentionTileTokens;
}

// Every (token, head of the group, position it may see) belongs to one item, every state of a token
// is written once for every head, and the states of a token are in the order of their positions.
void check_plan(const AttentionPlanner& planner, const AttentionPlanOptions& o,
                const Batch& batch) {
  const int32_t group = o.num_heads / o.num_kv_heads;
  const auto num_tokens = static_cast<int32_t>(batch.positions.size());
  std::vector<int32_t> sequence_of(static_cast<size_t>(num_tokens));
  for (size_t s = 0; s + 1 < batch.query_starts.size(); ++s) {
    for (int32_t t = batch.query_starts[s]; t < batch.query_starts[s + 1]; ++t) {
      sequence_of[static_cast<size_t>(t)] = static_cast<int32_t>(s);
    }
  }
  // (token, head) -> split -> range
  std::map<std::pair<int32_t, int32_t>, std::map<int32_t, std::pair<int32_t, int32_t>>> ranges;
  for (const AttentionKernel kernel : kKernels) {
    const auto bins = planner.bins(kernel);
    const auto items = planner.items(kernel);
    ASSERT_EQ(bins.size(), static_cast<size_t>(planner.num_bins(kernel)) + 1);
    ASSERT_EQ(bins.front(), 0);
    ASSERT_EQ(bins.back(), static_cast<int32_t>(items.size()));
    ASSERT_TRUE(std::is_sorted(bins.begin(), bins.end()));
    const int32_t rows =
        kernel == AttentionKernel::kNarrow ? kNarrowRows : kernels::cuda::wide_rows(o.head_dim);
    for (const AttentionItem& item : items) {
      ASSERT_GT(item.num_tokens, 0);
      ASSERT_LE(item.num_tokens * item.num_heads, rows);
      ASSERT_LT(item.kv_begin, item.kv_end);
      for (int32_t i = 0; i < item.num_tokens; ++i) {
        const int32_t token = planner.tokens()[static_cast<size_t>(item.first_token + i)];
        const int32_t* table = batch.block_tables.data();
        const int32_t* mine = table + sequence_of[static_cast<size_t>(token)] * batch.stride;
        const int32_t* used = table + item.table * batch.stride;
        for (int32_t b = item.kv_begin / o.page_size; b <= (item.kv_end - 1) / o.page_size; ++b) {
          ASSERT_EQ(used[b], mine[b]) << "token " << token << " reads another's block";
        }
        for (int32_t h = item.first_head; h < item.first_head + item.num_heads; ++h) {
          const auto [_, fresh] =
              ranges[{token, h}].try_emplace(item.split, item.kv_begin, item.kv_end);
          ASSERT_TRUE(fresh) << "state " << item.split << " of token " << token << " twice";
        }
      }
    }
  }
  ASSERT_EQ(ranges.size(), static_cast<size_t>(num_tokens) * static_cast<size_t>(group));
  for (const auto& [row, splits] : ranges) {
    const auto [token, head] = row;
    const int32_t position = batch.positions[static_cast<size_t>(token)];
    const int32_t oldest = o.window > 0 ? std::max(0, position - o.window + 1) : 0;
    const auto states = planner.state_begin()[static_cast<size_t>(token) + 1] -
                        planner.state_begin()[static_cast<size_t>(token)];
    ASSERT_EQ(splits.size() == 1 ? 0 : static_cast<int32_t>(splits.size()), states);
    int32_t split = 0;
    int32_t covered = splits.begin()->second.first;
    ASSERT_LE(covered, oldest);
    for (const auto& [index, range] : splits) {
      ASSERT_EQ(index, split++);
      ASSERT_EQ(range.first, covered);
      covered = range.second;
    }
    ASSERT_GT(covered, position);
  }
}

TEST(CudaAttentionPlan, CoversEveryPositionOnceForRandomSteps) {
  std::mt19937 random(7);
  const auto pick = [&](int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(random);
  };
  for (int round = 0; round < 400; ++round) {
    const int32_t groups[] = {1, 3, 4, 7, 8, 16, 24};
    AttentionPlanOptions o = options_of(groups[pick(0, 6)], pick(1, 8));
    o.page_size = 16 << pick(0, 2);
    o.window = pick(0, 3) == 0 ? pick(1, 300) : 0;
    o.deterministic = pick(0, 2) == 0;
    o.cascade_tokens = 64 << pick(0, 4);
    o.cascade_sequences = pick(0, 4);
    o.narrow_ctas = pick(1, 300);
    o.wide_ctas = pick(1, 300);
    std::vector<Sequence> sequences;
    const int32_t longest = pick(0, 3) == 0 ? 9000 : 600;
    int32_t most_tokens = 1;
    int32_t most_context = 1;
    for (int32_t s = pick(1, 40); s > 0; --s) {
      Sequence sequence;
      sequence.context = pick(1, longest);
      sequence.tokens = pick(0, 4) > 0 ? 1 : pick(1, std::min(sequence.context, 200));
      sequence.shared = pick(0, 1) * pick(0, sequence.context / o.page_size);
      sequence.family = pick(0, 2);
      most_tokens = std::max(most_tokens, sequence.tokens);
      most_context = std::max(most_context, sequence.context);
      sequences.push_back(sequence);
    }
    const Batch batch = make_batch(sequences, o.page_size);
    AttentionPlanner planner(o);
    planner.plan(batch.view());
    ASSERT_NO_FATAL_FAILURE(check_plan(planner, o, batch)) << "round " << round;

    const AttentionCapacity needed = planner.required();
    const AttentionCapacity room =
        planner.capacity(static_cast<int64_t>(sequences.size()),
                         static_cast<int64_t>(batch.positions.size()), most_tokens, most_context);
    ASSERT_LE(needed.narrow_items, room.narrow_items) << "round " << round;
    ASSERT_LE(needed.wide_items, room.wide_items) << "round " << round;
    ASSERT_LE(needed.states, room.states) << "round " << round;
    if (o.deterministic) {
      for (const AttentionItem& item : planner.items(AttentionKernel::kNarrow)) {
        ASSERT_EQ(item.kv_begin / AttentionPlanner::kSplit,
                  (item.kv_end - 1) / AttentionPlanner::kSplit);
      }
      ASSERT_TRUE(planner.items(AttentionKernel::kWide).empty());
    }
  }
}

TEST(CudaAttentionPlan, SpreadsOneLongSequenceAmongShortOnes) {
  AttentionPlanOptions o = options_of(4, 8);
  o.narrow_ctas = 264;
  std::vector<Sequence> sequences{{.context = 131072, .tokens = 1}};
  for (int s = 0; s < 63; ++s) sequences.push_back({.context = 1024, .tokens = 1});
  const Batch batch = make_batch(sequences, o.page_size);
  AttentionPlanner planner(o);
  planner.plan(batch.view());
  check_plan(planner, o, batch);
  const auto bins = planner.bins(AttentionKernel::kNarrow);
  const auto items = planner.items(AttentionKernel::kNarrow);
  int64_t total = 0;
  int64_t most = 0;
  for (size_t b = 0; b + 1 < bins.size(); ++b) {
    int64_t load = 0;
    for (int32_t i = bins[b]; i < bins[b + 1]; ++i) load += steps_of(items[static_cast<size_t>(i)]);
    total += load;
    most = std::max(most, load);
  }
  EXPECT_EQ(total, (131072 + 63 * 1024) / kAttentionTileTokens);
  const int64_t even = total / planner.num_bins(AttentionKernel::kNarrow);
  EXPECT_LE(most, even + even / 5);
}

TEST(CudaAttentionPlan, DoesNotCutWhenTheDeviceIsFullOfEqualWork) {
  AttentionPlanOptions o = options_of(4, 8);
  o.narrow_ctas = 264;  // 33 bins
  const Batch batch = make_batch(std::vector<Sequence>(66, {.context = 2048, .tokens = 1}), 16);
  AttentionPlanner planner(o);
  planner.plan(batch.view());
  EXPECT_EQ(planner.items(AttentionKernel::kNarrow).size(), 66u);
  EXPECT_EQ(planner.num_states(), 0);
}

TEST(CudaAttentionPlan, WindowedSequencesReadTheirWindowOnly) {
  AttentionPlanOptions o = options_of(4);
  o.window = 512;
  const Batch batch = make_batch({{.context = 100'000, .tokens = 1}}, o.page_size);
  AttentionPlanner planner(o);
  planner.plan(batch.view());
  check_plan(planner, o, batch);
  int64_t steps = 0;
  for (const AttentionItem& item : planner.items(AttentionKernel::kNarrow)) {
    EXPECT_GE(item.kv_begin, 100'000 - 512);
    steps += steps_of(item);
  }
  EXPECT_LE(steps, 512 / kAttentionTileTokens + 1);
}

TEST(CudaAttentionPlan, DeterministicCutsOfASequenceDoNotDependOnTheOthers) {
  AttentionPlanOptions o = options_of(4);
  o.deterministic = true;
  const auto cuts = [&](const std::vector<Sequence>& sequences) {
    AttentionPlanner planner(o);
    const Batch batch = make_batch(sequences, o.page_size);
    planner.plan(batch.view());
    std::vector<std::tuple<int32_t, int32_t, int32_t>> found;
    for (const AttentionItem& item : planner.items(AttentionKernel::kNarrow)) {
      if (item.table == 0) found.emplace_back(item.split, item.kv_begin, item.kv_end);
    }
    std::sort(found.begin(), found.end());
    return found;
  };
  const std::vector<Sequence> alone{{.context = 5000, .tokens = 1}};
  std::vector<Sequence> crowd(30, {.context = 3000, .tokens = 1});
  crowd.insert(crowd.begin(), alone.front());
  EXPECT_EQ(cuts(alone).size(), 5u);
  EXPECT_EQ(cuts(alone), cuts(crowd));
}

TEST(CudaAttentionPlan, ReadsASharedPrefixOnce) {
  AttentionPlanOptions o = options_of(4);
  std::vector<Sequence> sequences(16, {.context = 4096, .tokens = 1, .shared = 128});
  sequences.push_back({.context = 4096, .tokens = 1, .shared = 200, .family = 1});
  const Batch batch = make_batch(sequences, o.page_size);
  for (const bool deterministic : {false, true}) {
    o.deterministic = deterministic;
    AttentionPlanner planner(o);
    planner.plan(batch.view());
    check_plan(planner, o, batch);
    int64_t steps = 0;
    for (const AttentionKernel kernel : kKernels) {
      for (const AttentionItem& item : planner.items(kernel)) steps += steps_of(item);
    }
    const int64_t rest = 16 * 2048 / kAttentionTileTokens + 4096 / kAttentionTileTokens;
    const int64_t readings = deterministic ? 4 : 1;  // tiles of 16 rows: four sequences each
    EXPECT_EQ(steps, rest + readings * 2048 / kAttentionTileTokens);
  }
}

TEST(CudaAttentionPlan, TheUploadHoldsThePlanAtFixedPlaces) {
  const AttentionPlanOptions o = options_of(4);
  AttentionPlanner planner(o);
  const AttentionCapacity room = planner.capacity(8, 64, 64, 4096);
  const AttentionUpload at = planner.upload_layout(room);
  const Batch batch =
      make_batch({{.context = 3000, .tokens = 1}, {.context = 90, .tokens = 60}}, 16);
  planner.plan(batch.view());
  std::vector<int32_t> words(static_cast<size_t>(at.words), -1);
  planner.write_upload(room, words);
  const auto items = planner.items(AttentionKernel::kWide);
  ASSERT_FALSE(items.empty());
  EXPECT_EQ(words[static_cast<size_t>(at.wide_items)], items[0].table);
  EXPECT_EQ(words[static_cast<size_t>(at.wide_items) + 6], items[0].kv_end);
  EXPECT_EQ(words[static_cast<size_t>(at.narrow_bins)], 0);
  EXPECT_EQ(words[static_cast<size_t>(at.tokens) + 60], 60);
  EXPECT_EQ(words[static_cast<size_t>(at.state_begin) + 61], planner.num_states());
  EXPECT_EQ(at.narrow_items % 8, 0);
  EXPECT_EQ(at.wide_items % 8, 0);

  AttentionCapacity small = room;
  small.tokens = 4;
  EXPECT_THROW(planner.write_upload(small, words), InvalidArgument);
}

TEST(CudaAttentionPlan, DecodingWithoutSharingNeedsNoWideKernel) {
  AttentionPlanOptions o = options_of(4);
  o.cascade_sequences = 0;
  const AttentionPlanner planner(o);
  EXPECT_EQ(planner.capacity(64, 64, 1, 32768).wide_items, 0);
  EXPECT_GT(planner.capacity(64, 512, 8, 32768).wide_items, 0);
}

TEST(CudaAttentionPlan, RefusesWhatDoesNotFitTogether) {
  const AttentionPlanOptions o = options_of(4);
  AttentionPlanner planner(o);
  Batch batch = make_batch({{.context = 40, .tokens = 3}}, o.page_size);
  batch.positions[1] = 7;
  EXPECT_THROW(planner.plan(batch.view()), InvalidArgument);
  batch = make_batch({{.context = 40, .tokens = 1}}, o.page_size);
  batch.stride = 2;
  EXPECT_THROW(planner.plan(batch.view()), InvalidArgument);
  batch = make_batch({{.context = 40, .tokens = 1}}, o.page_size);
  batch.positions.push_back(40);
  EXPECT_THROW(planner.plan(batch.view()), InvalidArgument);
  AttentionPlanOptions bad = o;
  bad.page_size = 8;
  EXPECT_THROW(AttentionPlanner{bad}, InvalidArgument);
  bad = o;
  bad.num_heads = 9;
  EXPECT_THROW(AttentionPlanner{bad}, InvalidArgument);
}

TEST(CudaAttentionPlan, AnEmptyStepHasNoWork) {
  AttentionPlanner planner(options_of(4));
  const std::vector<int32_t> starts{0};
  planner.plan({starts, {}, {}, 1});
  EXPECT_TRUE(planner.items(AttentionKernel::kNarrow).empty());
  EXPECT_EQ(planner.num_states(), 0);
}

}  // namespace
}  // namespace sagellm::cuda
