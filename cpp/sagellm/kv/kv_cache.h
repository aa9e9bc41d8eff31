// Block tables of live sequences over one block pool, with a prefix index.
// The Python face and its contract: python/sagellm/kv/interface.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "sagellm/base/hash.h"
#include "sagellm/kv/block_pool.h"
#include "sagellm/kv/prefix_index.h"

namespace sagellm::kv {

struct KvCacheOptions {
  int64_t num_blocks = 0;  // usable blocks, without block 0
  int64_t block_size = 0;  // tokens per block
  std::vector<int64_t>
      windows;  // one per group: 0 = full attention, else the sliding window in tokens
  bool enable_prefix_caching = true;
  uint64_t hash_mask = ~uint64_t{0};  // for tests: 0 makes every prefix collide
};

struct KvStats {
  int64_t num_blocks = 0;
  int64_t free_blocks = 0;
  int64_t cached_blocks = 0;
  int64_t prefix_queried_tokens = 0;
  int64_t prefix_hit_tokens = 0;
  int64_t evicted_blocks = 0;
  int64_t copied_blocks = 0;
};

struct BlockCopy {
  int32_t source = 0;
  int32_t destination = 0;
};

/// See interface.py for what each call promises. Every call checks its arguments before it changes
/// anything, and takes the memory it needs first: a call that throws has changed nothing.
///
/// Ownership: the reference count of a block is the number of table entries that name it, plus one
/// for every pending copy that reads it. A pinned sequence stays in the map after its release and
/// keeps the entries of its published blocks, so a pin is a table entry too. Two tables share a
/// block only where both have committed it; who writes into a shared block gets a private copy in
/// make_writable().
///
/// Not thread-safe: the engine thread owns it.
class KvCache {
 public:
  explicit KvCache(const KvCacheOptions& options);

  int32_t block_size() const { return block_size_; }
  int32_t num_groups() const { return static_cast<int32_t>(windows_.size()); }

  void add(int64_t sequence_id, uint64_t salt);
  int64_t match_prefix(int64_t sequence_id, std::span<const int32_t> token_ids);
  bool reserve(int64_t sequence_id, int64_t num_tokens);
  void commit(int64_t sequence_id, std::span<const int32_t> token_ids, int64_t num_computed);
  void fork(int64_t parent_id, int64_t child_id);
  void release(int64_t sequence_id);

  /// Entries of the longest table among `sequence_ids`, at least 1.
  int64_t max_blocks(std::span<const int64_t> sequence_ids) const;
  /// Fills `out` [num_groups][sequence_ids.size()][width], padded with 0; width >=
  /// max_blocks(sequence_ids).
  void block_tables(std::span<const int64_t> sequence_ids, int64_t width, int32_t* out) const;

  int64_t num_tokens(int64_t sequence_id) const { return live(sequence_id).num_tokens; }
  int64_t num_blocks_of(int64_t sequence_id) const;

  /// Copies to run in this order before the next step.
  std::vector<BlockCopy> take_copies();

  void pin(int64_t sequence_id);
  void unpin(int64_t sequence_id);
  void reset_prefix_index();
  KvStats stats() const;

  /// Throws IntegrityError naming the broken invariant.
  void check_integrity() const;

 private:
  struct Sequence {
    uint64_t salt = 0;
    int64_t num_tokens = 0;     // committed
    int64_t num_published = 0;  // leading full blocks that have a node in the index
    int32_t tip =
        PrefixIndex::kRoot;  // node of block num_published - 1; this sequence holds a reference
    bool pinned = false;
    bool released = false;       // alive only as a pin
    std::vector<int32_t> table;  // [position in blocks][group]
  };
  using SequenceMap = std::unordered_map<int64_t, Sequence>;

  Sequence& live(int64_t sequence_id);
  const Sequence& live(int64_t sequence_id) const;
  void require_unused(int64_t sequence_id) const;
  Sequence& emplace(int64_t sequence_id);
  void erase(SequenceMap::iterator it);

  size_t num_entries(const Sequence& s) const { return s.table.size() / windows_.size(); }
  int64_t num_dead_entries(size_t group, int64_t num_tokens) const;
  int64_t num_needed_entries(size_t group, int64_t num_hit) const;
  bool is_shared(int32_t block) const;

  int32_t take_block();
  void make_writable(Sequence& s, size_t entry);
  void publish(Sequence& s, std::span<const int32_t> token_ids);
  void give_back_dead_entries(Sequence& s, int64_t old_num_tokens);
  void release_entries(Sequence& s, bool keep_published);
  void drop_dead_copies();

  void check_sequence(int64_t sequence_id, const Sequence& s) const;
  void check_owners() const;

  int32_t block_size_;
  std::vector<int64_t> windows_;
  bool enable_prefix_caching_;
  BlockPool pool_;
  PrefixIndex index_;
  SequenceMap sequences_;
  std::vector<SequenceMap::node_type> spare_;  // ended sequences, kept for their memory
  std::vector<BlockCopy> copies_;              // pending; each holds a reference to its source
  std::vector<int64_t> max_needed_;  // per group: blocks before a hit that its window reaches
  std::vector<int32_t> path_;        // scratch of match_prefix
  std::vector<int64_t> runs_;        // scratch of match_prefix, one per group
  int64_t queried_tokens_ = 0;
  int64_t hit_tokens_ = 0;
  int64_t evicted_blocks_ = 0;
  int64_t copied_blocks_ = 0;
};

}  // namespace sagellm::kv
