// Cuts the attention of one step into pieces for the CUDA kernels; the same plan serves every layer
// with the same window. Host code: nothing here needs a GPU.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sagellm/kernels/cuda/attention_params.h"

namespace sagellm::cuda {

/// What stays the same over the life of a model on a device.
struct AttentionPlanOptions {
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t page_size = 0;
  int32_t window = 0;       // > 0: positions that a token sees, its own included
  int32_t narrow_ctas = 0;  // blocks of each kernel that the device holds at once
  int32_t wide_ctas = 0;
  /// Narrow kernel only, splits of 1024 tokens on the absolute grid: a token's result is bitwise
  /// independent of the other tokens of the step and of how its prompt was cut.
  bool deterministic = false;
  /// Tokens that sequences must share to have them read once, and how many sequences must share
  /// them; 0 sequences: never. Layers with a window never share.
  int32_t cascade_tokens = 1024;
  int32_t cascade_sequences = 8;
};

/// The tokens of a step, in host memory.
struct AttentionBatch {
  std::span<const int32_t> query_starts;  // [sequences + 1]
  std::span<const int32_t> positions;     // [tokens], consecutive within a sequence
  std::span<const int32_t> block_tables;  // [sequences][block_tables_stride]
  int64_t block_tables_stride = 0;
};

/// Room of the arrays of a step. Pointers into the upload depend on it alone, so that a captured
/// graph stays valid for every plan within it.
struct AttentionCapacity {
  int64_t tokens = 0;
  int64_t narrow_items = 0;
  int64_t wide_items = 0;
  int64_t states = 0;
};

/// Offsets in the one int32 array that holds a plan on the device.
struct AttentionUpload {
  int64_t narrow_bins = 0;
  int64_t wide_bins = 0;
  int64_t state_begin = 0;
  int64_t tokens = 0;
  int64_t narrow_items = 0;
  int64_t wide_items = 0;
  int64_t words = 0;
};

class AttentionPlanner {
 public:
  static constexpr int kSplit = 1024;  // tokens, deterministic mode

  /// Throws InvalidArgument naming the bad value.
  explicit AttentionPlanner(const AttentionPlanOptions& options);

  /// Plans a step. Throws InvalidArgument when the arrays do not fit together.
  void plan(const AttentionBatch& batch);

  // The plan.
  std::span<const int32_t> bins(kernels::cuda::AttentionKernel kernel) const;
  std::span<const kernels::cuda::AttentionItem> items(kernels::cuda::AttentionKernel kernel) const;
  std::span<const int32_t> tokens() const { return tokens_; }
  std::span<const int32_t> state_begin() const { return state_begin_; }
  int64_t num_states() const { return state_begin_.back(); }

  int32_t num_bins(kernels::cuda::AttentionKernel kernel) const;

  /// Enough for every step of up to these sizes; a sequence has at most `max_query` of the step's
  /// tokens and `max_context` in all. No wide items: the wide kernel need not be launched.
  AttentionCapacity capacity(int64_t max_sequences, int64_t max_tokens, int64_t max_query,
                             int64_t max_context) const;
  /// What the present plan needs.
  AttentionCapacity required() const;

  AttentionUpload upload_layout(const AttentionCapacity& capacity) const;
  /// Writes the plan to `out` [upload_layout(capacity).words]. Throws InvalidArgument when the plan
  /// exceeds the capacity.
  void write_upload(const AttentionCapacity& capacity, std::span<int32_t> out) const;

  int64_t state_bytes(int64_t states) const;
  int64_t accumulator_bytes(int64_t states) const;
  int64_t arrival_bytes(int64_t tokens) const;

 private:
  struct Tile {
    kernels::cuda::AttentionItem item;  // the whole range; `split` is its first
    int32_t first_unit = 0;             // in steps of kAttentionTileTokens
    int32_t units = 0;
    bool shared_prefix = false;
  };
  struct List {
    int32_t num_bins = 0;
    std::vector<Tile> tiles;
    std::vector<kernels::cuda::AttentionItem> items;
    std::vector<int32_t> bins;
  };

  void add_tiles(List& list, int32_t rows, int32_t table, int32_t first_entry, int32_t num_tokens,
                 int32_t kv_begin, int32_t first_position, bool shared_prefix);
  void find_groups(const AttentionBatch& batch);
  int32_t choose_chunk(const List& list) const;
  int64_t makespan(const List& list, int32_t chunk) const;
  void cut(List& list, int32_t chunk);
  void assign(List& list) const;

  AttentionPlanOptions options_;
  int32_t group_;
  List narrow_;
  List wide_;
  std::vector<int32_t> tokens_;
  std::vector<int32_t> state_begin_;
  std::vector<int32_t> prefix_;  // [sequences]: tokens that a group reads for it
};

}  // namespace sagellm::cuda
