// Which token prefixes have cached blocks: a trie of token blocks in one open-addressing hash
// table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "sagellm/base/hash.h"

namespace sagellm::kv {

/// A node stands for one exact prefix: a salt and `depth * block_size` tokens. It stores the tokens
/// of its last block, its parent node, and for every group the cached block that holds that last
/// block's KV (0: none).
///
/// Finding a child compares parent node, salt and tokens; the hash only says where to look. A node
/// counts its references (children, cached blocks, sequences that stand on it) and lives while
/// there are any. So a parent outlives its children, a node id is not reused while anything refers
/// to it, and equal node means equal prefix without generation counters.
///
/// Evicting a block only empties its slot in the node. If a head is evicted before its tail, which
/// sliding groups do all the time, the tail stays what it was: the KV of that exact prefix. Whether
/// a hit may use it is decided by which slots along the path are filled (KvCache::match_prefix), so
/// no order of eviction can produce a wrong match and no descendants need to be unlinked.
///
/// Nodes are preallocated. Where no node is left, insertion reports it and the block stays
/// uncached.
class PrefixIndex {
 public:
  static constexpr int32_t kRoot = 0;  // parent of first blocks; not a node

  /// `hash_mask` is for tests: it is and-ed to every hash to force collisions.
  PrefixIndex(int64_t max_nodes, int32_t block_size, int32_t num_groups, const HashKey& key,
              uint64_t hash_mask = ~uint64_t{0});

  /// Returns the child of `parent` for the `block_size` tokens, or 0. `salt` is the one of the
  /// whole chain.
  int32_t find(int32_t parent, uint64_t salt, const int32_t* tokens) const {
    return find(parent, salt, tokens, child_hash(parent, salt, tokens));
  }

  /// Like find, but creates the child when absent; 0 when no node is left. A new node has no
  /// reference yet: retain it or attach a block before the next call that may drop nodes.
  int32_t find_or_insert(int32_t parent, uint64_t salt, const int32_t* tokens);

  /// Adds a reference; nothing for kRoot.
  void retain(int32_t node) {
    if (node != kRoot) ++at(node).refs;
  }

  /// Drops a reference, and with the last one the node and every ancestor that nothing else needs.
  void drop(int32_t node);

  int32_t parent(int32_t node) const { return at(node).parent; }

  /// The cached block of `group`, or 0.
  int32_t block(int32_t node, int32_t group) const { return payload(node)[group]; }

  /// Fills the empty slot of `group`.
  void attach(int32_t node, int32_t group, int32_t block);

  /// Empties the slot that holds `block`, whose owner is `node`.
  void detach(int32_t node, int32_t block);

  int32_t num_nodes() const { return num_nodes_; }
  int32_t num_attached() const { return num_attached_; }
  int32_t max_nodes() const { return static_cast<int32_t>(nodes_.size()) - 1; }
  bool is_live(int32_t node) const { return node > 0 && node <= max_nodes() && at(node).live; }

  /// Throws IntegrityError unless every node can be found again under its recomputed hash, its
  /// parent is a live node or the root and has the same salt, and its references are its children,
  /// its blocks and `held[node]` (the sequences that stand on it).
  void check_integrity(const std::vector<int32_t>& held) const;

 private:
  struct Node {
    uint64_t hash = 0;
    uint64_t salt = 0;
    int32_t parent = 0;  // next free node when not live
    int32_t refs = 0;
    bool live = false;
  };
  struct Slot {
    uint32_t tag = 0;  // low half of the hash; its low bits are the home position
    int32_t node = 0;  // 0: empty
  };

  Node& at(int32_t node) { return nodes_[static_cast<size_t>(node)]; }
  const Node& at(int32_t node) const { return nodes_[static_cast<size_t>(node)]; }
  // [num_groups] blocks, then [block_size] tokens
  int32_t* payload(int32_t node) {
    return payload_.data() + static_cast<size_t>(node) * payload_stride_;
  }
  const int32_t* payload(int32_t node) const {
    return payload_.data() + static_cast<size_t>(node) * payload_stride_;
  }

  uint64_t child_hash(int32_t parent, uint64_t salt, const int32_t* tokens) const;
  int32_t find(int32_t parent, uint64_t salt, const int32_t* tokens, uint64_t hash) const;
  void erase_slot(int32_t node);

  std::vector<Node> nodes_;
  std::vector<int32_t> payload_;
  std::vector<Slot> slots_;
  size_t payload_stride_ = 0;
  size_t slot_mask_ = 0;
  int32_t block_size_ = 0;
  int32_t num_groups_ = 0;
  int32_t free_node_ = 0;
  int32_t num_nodes_ = 0;
  int32_t num_attached_ = 0;
  HashKey key_;
  uint64_t hash_mask_ = 0;
};

}  // namespace sagellm::kv
