// Cuts the attention of one step into work items; the same plan serves every layer with the same
// window.
#pragma once

#include <cstdint>
#include <vector>

#include "sagellm/model/forward_batch.h"

namespace sagellm::model {

/// Up to kAttentionRows / group consecutive query tokens of one sequence.
struct AttentionTile {
  int32_t sequence = 0;
  int32_t first_token = 0;  // index in the batch
  int32_t num_tokens = 0;
  int32_t first_position = 0;
  int32_t split_begin = 0;  // 512-token splits that any of its rows can see
  int32_t split_end = 0;
  int32_t num_states = 0;  // 1; in a single-token tile possibly one per split
  int64_t state = 0;       // first of its num_states * num_tokens * group rows in the state arrays
};

/// One call of the attention kernel for one kv head.
struct AttentionItem {
  int32_t tile = 0;
  int32_t state = 0;  // which of the tile's states
  int32_t split_begin = 0;
  int32_t split_end = 0;
};

/// Splits run as separate items only for single-token tiles, when the step has too few tiles to
/// occupy the threads (few long sequences). Results do not depend on that choice: states merge in
/// the same order either way.
struct AttentionPlan {
  int32_t window = 0;
  std::vector<AttentionTile> tiles;
  std::vector<AttentionItem> items;
  std::vector<int32_t> tile_of_token;  // [T]
  int64_t num_states = 0;              // state rows per kv head

  /// Positions [begin, end) that any row of an item sees.
  struct Range {
    int32_t begin;
    int32_t end;
  };
  Range positions(const AttentionItem& item) const;

  void build(const ForwardBatch& batch, int32_t layer_window, int32_t group, int32_t num_kv_heads,
             int num_threads);
};

}  // namespace sagellm::model
