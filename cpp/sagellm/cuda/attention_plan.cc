#include "sagellm/cuda/attention_plan.h"

#include <algorithm>
#include <cstring>
#include <queue>
#include <unordered_map>
#include <utility>

#include "sagellm/base/error.h"
#include "sagellm/base/math.h"

namespace sagellm::cuda {
namespace {

using kernels::cuda::AttentionItem;
using kernels::cuda::AttentionKernel;
using kernels::cuda::kAttentionTileTokens;
using kernels::cuda::kNarrowRows;

constexpr int32_t kItemWords = sizeof(AttentionItem) / sizeof(int32_t);
static_assert(sizeof(AttentionItem) == 32);

// The cost of a piece in steps of 64 tokens: its own steps, and what it costs to begin and end one.
constexpr int64_t kItemSteps = 2;
// Merging states happens after the last piece and grows with their number.
constexpr int64_t kStatesPerStep = 8;
constexpr int kMoreWaves = 3;  // how far beyond the fewest waves a plan may cut

int32_t round_down(int32_t a, int32_t b) { return a / b * b; }

}  // namespace

AttentionPlanner::AttentionPlanner(const AttentionPlanOptions& options) : options_(options) {
  const auto& o = options;
  require<InvalidArgument>(
      o.num_kv_heads > 0 && o.num_heads > 0 && o.num_heads % o.num_kv_heads == 0, "num_heads is ",
      o.num_heads, " and num_kv_heads ", o.num_kv_heads,
      "; the first must be a positive multiple of the second");
  require<InvalidArgument>(
      o.head_dim > 0 && o.head_dim <= kernels::cuda::kMaxAttentionHeadDim && o.head_dim % 8 == 0,
      "head_dim is ", o.head_dim, "; it must be a multiple of 8 up to ",
      kernels::cuda::kMaxAttentionHeadDim);
  require<InvalidArgument>(o.page_size == 16 || o.page_size == 32 || o.page_size == 64,
                           "page_size is ", o.page_size, "; it must be 16, 32 or 64");
  require<InvalidArgument>(o.window >= 0, "window is ", o.window, "; it must not be negative");
  require<InvalidArgument>(o.narrow_ctas > 0 && o.wide_ctas > 0,
                           "narrow_ctas and wide_ctas must be positive");
  require<InvalidArgument>(o.cascade_tokens >= 0 && o.cascade_sequences >= 0,
                           "cascade_tokens and cascade_sequences must not be negative");
  group_ = o.num_heads / o.num_kv_heads;
  narrow_.num_bins = std::max(1, o.narrow_ctas / o.num_kv_heads);
  wide_.num_bins = std::max(1, o.wide_ctas / o.num_kv_heads);
  narrow_.bins.assign(static_cast<size_t>(narrow_.num_bins) + 1, 0);
  wide_.bins.assign(static_cast<size_t>(wide_.num_bins) + 1, 0);
  state_begin_.assign(1, 0);
}

std::span<const int32_t> AttentionPlanner::bins(AttentionKernel kernel) const {
  return kernel == AttentionKernel::kNarrow ? narrow_.bins : wide_.bins;
}
std::span<const AttentionItem> AttentionPlanner::items(AttentionKernel kernel) const {
  return kernel == AttentionKernel::kNarrow ? narrow_.items : wide_.items;
}
int32_t AttentionPlanner::num_bins(AttentionKernel kernel) const {
  return kernel == AttentionKernel::kNarrow ? narrow_.num_bins : wide_.num_bins;
}

// Cuts `num_tokens` query tokens, whose entries in tokens_ start at `first_entry`, into tiles of at
// most `rows` rows. A shared prefix ends at `first_position`; otherwise the tokens sit at
// consecutive positions from there.
void AttentionPlanner::add_tiles(List& list, int32_t rows, int32_t table, int32_t first_entry,
                                 int32_t num_tokens, int32_t kv_begin, int32_t first_position,
                                 bool shared_prefix) {
  const int32_t tile_tokens = std::max(1, rows / group_);
  const int32_t tile_heads = std::min(group_, rows);
  for (int32_t t = 0; t < num_tokens; t += tile_tokens) {
    for (int32_t head = 0; head < group_; head += tile_heads) {
      Tile tile;
      tile.shared_prefix = shared_prefix;
      tile.item.table = table;
      tile.item.first_token = first_entry + t;
      tile.item.num_tokens = std::min(tile_tokens, num_tokens - t);
      tile.item.first_head = head;
      tile.item.num_heads = std::min(tile_heads, group_ - head);
      const int32_t position = first_position + t;
      const int32_t oldest = options_.window > 0 ? position - options_.window + 1 : 0;
      tile.item.kv_begin = std::max(kv_begin, oldest);
      tile.item.kv_end = shared_prefix ? first_position : position + tile.item.num_tokens;
      tile.first_unit = tile.item.kv_begin / kAttentionTileTokens;
      tile.units =
          static_cast<int32_t>(ceil_div(tile.item.kv_end, kAttentionTileTokens)) - tile.first_unit;
      list.tiles.push_back(tile);
    }
  }
}

// Finds sequences that begin with the same blocks and queues the reading of what they share.
// Sequences of few tokens only: the rows of a long one already share what they read.
void AttentionPlanner::find_groups(const AttentionBatch& batch) {
  const auto num_sequences = static_cast<int32_t>(batch.query_starts.size()) - 1;
  prefix_.assign(static_cast<size_t>(num_sequences), 0);
  if (options_.cascade_sequences == 0 || options_.window > 0) return;

  const int32_t grain = options_.deterministic ? kSplit : kAttentionTileTokens;
  const auto least =
      static_cast<int32_t>(round_up(std::max(options_.cascade_tokens, int32_t{1}), int64_t{grain}));
  const auto table = [&](int32_t s) {
    return batch.block_tables.data() + s * batch.block_tables_stride;
  };
  // Who shares `least` tokens shares the block that ends them.
  const int32_t key_block = least / options_.page_size - 1;
  std::unordered_map<int32_t, std::vector<int32_t>> candidates;
  std::vector<int32_t> order;  // first appearance, so that plans do not depend on hashing
  for (int32_t s = 0; s < num_sequences; ++s) {
    const int32_t begin = batch.query_starts[static_cast<size_t>(s)];
    const int32_t count = batch.query_starts[static_cast<size_t>(s) + 1] - begin;
    if (count == 0 || count * group_ > kNarrowRows) continue;
    if (batch.positions[static_cast<size_t>(begin)] < least) continue;
    std::vector<int32_t>& members = candidates[table(s)[key_block]];
    if (members.empty()) order.push_back(table(s)[key_block]);
    members.push_back(s);
  }
  for (const int32_t key : order) {
    std::vector<int32_t> members;
    int32_t shared = 0;
    for (const int32_t s : candidates[key]) {
      const int32_t first = members.empty() ? s : members.front();
      const int32_t position =
          batch.positions[static_cast<size_t>(batch.query_starts[static_cast<size_t>(s)])];
      const int32_t limit = (members.empty() ? position : std::min(shared, position));
      const int32_t blocks = limit / options_.page_size;
      const auto same = static_cast<int32_t>(
          std::mismatch(table(s), table(s) + blocks, table(first)).first - table(s));
      const int32_t length = round_down(same * options_.page_size, grain);
      if (length < least) continue;  // another prefix that ends in the same block
      shared = length;
      members.push_back(s);
    }
    if (static_cast<int32_t>(members.size()) < std::max(options_.cascade_sequences, 2)) continue;
    const auto first_entry = static_cast<int32_t>(tokens_.size());
    for (const int32_t s : members) {
      prefix_[static_cast<size_t>(s)] = shared;
      for (int32_t t = batch.query_starts[static_cast<size_t>(s)];
           t < batch.query_starts[static_cast<size_t>(s) + 1]; ++t) {
        tokens_.push_back(t);
      }
    }
    const int32_t count = static_cast<int32_t>(tokens_.size()) - first_entry;
    const bool wide = !options_.deterministic && count * group_ > 2 * kNarrowRows;
    add_tiles(wide ? wide_ : narrow_,
              wide ? kernels::cuda::wide_rows(options_.head_dim) : kNarrowRows, members.front(),
              first_entry, count, 0, shared, true);
  }
}

void AttentionPlanner::plan(const AttentionBatch& batch) {
  require<InvalidArgument>(!batch.query_starts.empty() && batch.query_starts.front() == 0,
                           "query_starts must begin with 0");
  const auto num_sequences = static_cast<int32_t>(batch.query_starts.size()) - 1;
  const int32_t num_tokens = batch.query_starts.back();
  require<InvalidArgument>(batch.positions.size() == static_cast<size_t>(num_tokens),
                           "positions has ", batch.positions.size(),
                           " values, query_starts ends at ", num_tokens);
  require<InvalidArgument>(
      batch.block_tables.size() >=
          static_cast<size_t>(num_sequences) * static_cast<size_t>(batch.block_tables_stride),
      "block_tables is smaller than its sequences times its stride");
  for (int32_t s = 0; s < num_sequences; ++s) {
    const int32_t begin = batch.query_starts[static_cast<size_t>(s)];
    const int32_t end = batch.query_starts[static_cast<size_t>(s) + 1];
    require<InvalidArgument>(end >= begin, "query_starts must ascend; sequence ", s, " does not");
    if (end == begin) continue;
    const int32_t first = batch.positions[static_cast<size_t>(begin)];
    const int32_t last = batch.positions[static_cast<size_t>(end) - 1];
    for (int32_t t = begin; t < end; ++t) {
      require<InvalidArgument>(
          first >= 0 && batch.positions[static_cast<size_t>(t)] == first + (t - begin),
          "positions of sequence ", s, " are not consecutive from a position >= 0");
    }
    require<InvalidArgument>(last / options_.page_size < batch.block_tables_stride, "sequence ", s,
                             " reaches position ", last, ", beyond its block table of ",
                             batch.block_tables_stride, " blocks");
  }

  for (List* list : {&narrow_, &wide_}) {
    list->tiles.clear();
    list->items.clear();
  }
  tokens_.resize(static_cast<size_t>(num_tokens));
  for (int32_t t = 0; t < num_tokens; ++t) tokens_[static_cast<size_t>(t)] = t;
  find_groups(batch);
  for (int32_t s = 0; s < num_sequences; ++s) {
    const int32_t begin = batch.query_starts[static_cast<size_t>(s)];
    const int32_t count = batch.query_starts[static_cast<size_t>(s) + 1] - begin;
    if (count == 0) continue;
    const bool wide = !options_.deterministic && count > 1 && count * group_ > kNarrowRows;
    add_tiles(wide ? wide_ : narrow_,
              wide ? kernels::cuda::wide_rows(options_.head_dim) : kNarrowRows, s, begin, count,
              prefix_[static_cast<size_t>(s)], batch.positions[static_cast<size_t>(begin)], false);
  }

  // Prefixes first, in both lists: their states come before those of what follows them.
  state_begin_.assign(static_cast<size_t>(num_tokens) + 1, 0);
  for (List* list : {&narrow_, &wide_}) {
    std::stable_partition(list->tiles.begin(), list->tiles.end(),
                          [](const Tile& tile) { return tile.shared_prefix; });
  }
  cut(wide_, choose_chunk(wide_));
  cut(narrow_, choose_chunk(narrow_));
  int32_t total = 0;
  for (int32_t& states : state_begin_) {  // counts, shifted by one, to offsets
    total += states > 1 ? states : 0;
    states = total;
  }
  assign(narrow_);
  assign(wide_);
}

// Steps per piece: the longest pieces that fit in so and so many waves, for the number of waves
// that ends first.
int32_t AttentionPlanner::choose_chunk(const List& list) const {
  if (options_.deterministic) return kSplit / kAttentionTileTokens;
  int32_t longest = 1;
  for (const Tile& tile : list.tiles) longest = std::max(longest, tile.units);
  const auto num_tiles = static_cast<int64_t>(list.tiles.size());
  const auto pieces = [&](int32_t chunk) {
    int64_t sum = 0;
    for (const Tile& tile : list.tiles) sum += ceil_div(tile.units, chunk);
    return sum;
  };
  int32_t best = longest;
  int64_t best_span = makespan(list, longest);
  const int64_t waves = std::max(int64_t{1}, ceil_div(num_tiles, list.num_bins));
  int32_t high = longest;
  for (int64_t wave = waves; wave <= waves + kMoreWaves && high > 1; ++wave) {
    int32_t low = 1;  // the smallest chunk that fits; `high` fits, as it did for fewer waves
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (pieces(middle) <= wave * list.num_bins) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int64_t span = makespan(list, high);
    if (span < best_span) {
      best = high;
      best_span = span;
    }
  }
  return best;
}

// Steps until the last bin is done, by the rule of assign(), and the merge after it.
int64_t AttentionPlanner::makespan(const List& list, int32_t chunk) const {
  std::vector<int64_t> costs;
  int64_t most = 1;
  for (const Tile& tile : list.tiles) {
    const int64_t count = ceil_div(tile.units, chunk);
    const int64_t each = ceil_div(tile.units, count);
    most = std::max(most, count);
    for (int64_t done = 0; done < tile.units; done += each) {
      costs.push_back(std::min(each, tile.units - done) + kItemSteps);
    }
  }
  std::sort(costs.begin(), costs.end(), std::greater<>());
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>> loads;
  int64_t last = 0;
  for (size_t i = 0; i < costs.size(); ++i) {
    int64_t load = costs[i];
    if (i >= static_cast<size_t>(list.num_bins)) {
      load += loads.top();
      loads.pop();
    }
    loads.push(load);
    last = std::max(last, load);
  }
  return last + (most > 1 ? 1 + ceil_div(most, kStatesPerStep) : 0);
}

// Cuts every tile into pieces of up to `chunk` steps, of equal length but in deterministic mode,
// where the cuts lie on the absolute grid. Counts the states of every token.
void AttentionPlanner::cut(List& list, int32_t chunk) {
  for (const Tile& tile : list.tiles) {
    const int32_t end_unit = tile.first_unit + tile.units;
    int32_t each = chunk;
    int32_t first_cut = (tile.first_unit / chunk + 1) * chunk;
    if (!options_.deterministic) {
      each = static_cast<int32_t>(ceil_div(tile.units, ceil_div(tile.units, chunk)));
      first_cut = tile.first_unit + each;
    }
    int32_t* counts = state_begin_.data() + 1;
    AttentionItem item = tile.item;
    const int32_t first_state = counts[tokens_[static_cast<size_t>(item.first_token)]];
    item.split = first_state;
    for (int32_t begin = tile.first_unit, next = first_cut; begin < end_unit;
         begin = next, next += each) {
      item.kv_begin = std::max(tile.item.kv_begin, begin * kAttentionTileTokens);
      item.kv_end = std::min(tile.item.kv_end, next * kAttentionTileTokens);
      list.items.push_back(item);
      ++item.split;
    }
    // The parts of a group too large for one tile follow each other and fill the same states.
    if (item.first_head + item.num_heads < group_) continue;
    for (int32_t i = 0; i < item.num_tokens; ++i) {
      counts[tokens_[static_cast<size_t>(item.first_token + i)]] += item.split - first_state;
    }
  }
}

// Longest first, each to the bin that has least to do; bins of equal load in their order.
void AttentionPlanner::assign(List& list) const {
  const auto cost = [](const AttentionItem& item) {
    return ceil_div(item.kv_end, kAttentionTileTokens) - item.kv_begin / kAttentionTileTokens +
           kItemSteps;
  };
  std::stable_sort(
      list.items.begin(), list.items.end(),
      [&](const AttentionItem& a, const AttentionItem& b) { return cost(a) > cost(b); });
  using Load = std::pair<int64_t, int32_t>;
  std::priority_queue<Load, std::vector<Load>, std::greater<>> loads;
  for (int32_t b = 0; b < list.num_bins; ++b) loads.emplace(0, b);
  std::vector<std::pair<int32_t, size_t>> placed(list.items.size());
  for (size_t i = 0; i < list.items.size(); ++i) {
    const auto [load, bin] = loads.top();
    loads.pop();
    placed[i] = {bin, i};
    loads.emplace(load + cost(list.items[i]), bin);
  }
  std::sort(placed.begin(), placed.end());
  std::vector<AttentionItem> ordered;
  ordered.reserve(list.items.size());
  list.bins.assign(static_cast<size_t>(list.num_bins) + 1, 0);
  for (const auto& [bin, index] : placed) {
    ordered.push_back(list.items[index]);
    ++list.bins[static_cast<size_t>(bin) + 1];
  }
  for (size_t b = 0; b + 1 < list.bins.size(); ++b) list.bins[b + 1] += list.bins[b];
  list.items = std::move(ordered);
}

AttentionCapacity AttentionPlanner::required() const {
  return {.tokens = static_cast<int64_t>(state_begin_.size()) - 1,
          .narrow_items = static_cast<int64_t>(narrow_.items.size()),
          .wide_items = static_cast<int64_t>(wide_.items.size()),
          .states = num_states()};
}

AttentionCapacity AttentionPlanner::capacity(int64_t max_sequences, int64_t max_tokens,
                                             int64_t max_query, int64_t max_context) const {
  const auto tile_tokens = [&](int64_t rows) { return std::max(int64_t{1}, rows / group_); };
  const auto head_tiles = [&](int64_t rows) { return ceil_div(group_, rows); };
  const int64_t wide = kernels::cuda::wide_rows(options_.head_dim);
  AttentionCapacity capacity{.tokens = max_tokens};
  const auto all_tiles = [&](int64_t rows) {
    return std::min(max_tokens, max_tokens / tile_tokens(rows) + max_sequences) * head_tiles(rows);
  };
  if (options_.deterministic) {
    const int64_t splits = ceil_div(max_context, kSplit);
    // A group has no more tiles than members, and prefix and rest share the splits.
    capacity.narrow_items = all_tiles(kNarrowRows) * splits;
    capacity.states = max_tokens * splits;
    return capacity;
  }
  // No plan has more pieces than tiles and the waves that choose_chunk() may add; a tile cut in k
  // gives k <= 2 (k - 1) states to each token. Tokens of a group have two states or more.
  const int64_t narrow_cuts = int64_t{kMoreWaves + 1} * narrow_.num_bins;
  const int64_t wide_cuts = int64_t{kMoreWaves + 1} * wide_.num_bins;
  const int64_t group_tiles = max_sequences * head_tiles(kNarrowRows);
  capacity.narrow_items = max_sequences * head_tiles(kNarrowRows) + group_tiles + narrow_cuts;
  const bool long_queries = max_query > 1 && max_query * group_ > kNarrowRows;
  const bool groups = options_.cascade_sequences > 0 && options_.window == 0;
  if (long_queries || groups) {
    capacity.wide_items = (long_queries ? all_tiles(wide) : 0) + group_tiles + wide_cuts;
  }
  capacity.states = 2 * max_tokens + 2 * narrow_cuts * tile_tokens(kNarrowRows) +
                    (capacity.wide_items > 0 ? 2 * wide_cuts * tile_tokens(wide) : 0);
  return capacity;
}

AttentionUpload AttentionPlanner::upload_layout(const AttentionCapacity& capacity) const {
  AttentionUpload at;
  int64_t words = 0;
  const auto take = [&](int64_t count) {
    const int64_t begin = words;
    words = round_up(words + count, kItemWords);
    return begin;
  };
  at.narrow_items = take(capacity.narrow_items * kItemWords);
  at.wide_items = take(capacity.wide_items * kItemWords);
  at.narrow_bins = take(narrow_.num_bins + 1);
  at.wide_bins = take(wide_.num_bins + 1);
  at.state_begin = take(capacity.tokens + 1);
  at.tokens = take(2 * capacity.tokens);  // a token is in one group at most
  at.words = words;
  return at;
}

void AttentionPlanner::write_upload(const AttentionCapacity& capacity,
                                    std::span<int32_t> out) const {
  const AttentionCapacity needed = required();
  require<InvalidArgument>(
      needed.tokens <= capacity.tokens && needed.narrow_items <= capacity.narrow_items &&
          needed.wide_items <= capacity.wide_items && needed.states <= capacity.states,
      "the plan needs room for ", needed.tokens, " tokens, ", needed.narrow_items, " + ",
      needed.wide_items, " items and ", needed.states, " states; there is room for ",
      capacity.tokens, ", ", capacity.narrow_items, " + ", capacity.wide_items, " and ",
      capacity.states);
  const AttentionUpload at = upload_layout(capacity);
  require<InvalidArgument>(static_cast<int64_t>(out.size()) >= at.words, "the upload has ",
                           out.size(), " words; the plan needs ", at.words);
  const auto copy = [&](int64_t offset, const auto& values) {
    if (!values.empty()) {
      std::memcpy(out.data() + offset, values.data(), values.size() * sizeof(values[0]));
    }
  };
  copy(at.narrow_items, narrow_.items);
  copy(at.wide_items, wide_.items);
  copy(at.narrow_bins, narrow_.bins);
  copy(at.wide_bins, wide_.bins);
  copy(at.state_begin, state_begin_);
  copy(at.tokens, tokens_);
}

int64_t AttentionPlanner::state_bytes(int64_t states) const {
  return states * options_.num_heads * 2 * int64_t{sizeof(float)};
}
int64_t AttentionPlanner::accumulator_bytes(int64_t states) const {
  return states * options_.num_heads * options_.head_dim * int64_t{sizeof(float)};
}
int64_t AttentionPlanner::arrival_bytes(int64_t tokens) const {
  return tokens * options_.num_kv_heads * int64_t{sizeof(int32_t)};
}

}  // namespace sagellm::cuda
