#include "sagellm/model/attention_plan.h"

#include <algorithm>

#include "sagellm/base/math.h"
#include "sagellm/kernels/params.h"

namespace sagellm::model {

AttentionPlan::Range AttentionPlan::positions(const AttentionItem& item) const {
  const AttentionTile& tile = tiles[static_cast<size_t>(item.tile)];
  const int32_t oldest = window > 0 ? std::max(0, tile.first_position - window + 1) : 0;
  return {
      std::max(oldest, item.split_begin * kernels::kAttentionSplit),
      std::min(tile.first_position + tile.num_tokens, item.split_end * kernels::kAttentionSplit)};
}

void AttentionPlan::build(const ForwardBatch& batch, int32_t layer_window, int32_t group,
                          int32_t num_kv_heads, int num_threads) {
  window = layer_window;
  tiles.clear();
  items.clear();
  tile_of_token.resize(static_cast<size_t>(batch.num_tokens()));
  num_states = 0;
  const int32_t tile_tokens = std::max(1, kernels::kAttentionRows / group);

  for (int32_t s = 0; s < batch.num_sequences(); ++s) {
    const int32_t end = batch.query_starts[static_cast<size_t>(s) + 1];
    for (int32_t t = batch.query_starts[static_cast<size_t>(s)]; t < end; t += tile_tokens) {
      AttentionTile tile;
      tile.sequence = s;
      tile.first_token = t;
      tile.num_tokens = std::min(tile_tokens, end - t);
      tile.first_position = batch.positions[static_cast<size_t>(t)];
      const int32_t oldest = window > 0 ? std::max(0, tile.first_position - window + 1) : 0;
      tile.split_begin = oldest / kernels::kAttentionSplit;
      tile.split_end = (tile.first_position + tile.num_tokens - 1) / kernels::kAttentionSplit + 1;
      std::fill_n(tile_of_token.begin() + t, tile.num_tokens, static_cast<int32_t>(tiles.size()));
      tiles.push_back(tile);
    }
  }

  const bool split = static_cast<int64_t>(tiles.size()) * num_kv_heads < int64_t{4} * num_threads;
  for (size_t i = 0; i < tiles.size(); ++i) {
    AttentionTile& tile = tiles[i];
    const bool by_split = split && tile.num_tokens == 1;
    tile.num_states = by_split ? tile.split_end - tile.split_begin : 1;
    tile.state = num_states;
    num_states += int64_t{tile.num_states} * tile.num_tokens * group;
    for (int32_t n = 0; n < tile.num_states; ++n) {
      AttentionItem item;
      item.tile = static_cast<int32_t>(i);
      item.state = n;
      item.split_begin = by_split ? tile.split_begin + n : tile.split_begin;
      item.split_end = by_split ? item.split_begin + 1 : tile.split_end;
      items.push_back(item);
    }
  }
}

}  // namespace sagellm::model
