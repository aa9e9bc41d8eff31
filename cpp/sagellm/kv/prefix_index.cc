#include "sagellm/kv/prefix_index.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "sagellm/base/error.h"
#include "sagellm/kv/integrity.h"

namespace sagellm::kv {

PrefixIndex::PrefixIndex(int64_t max_nodes, int32_t block_size, int32_t num_groups,
                         const HashKey& key, uint64_t hash_mask)
    : payload_stride_(static_cast<size_t>(block_size) + static_cast<size_t>(num_groups)),
      block_size_(block_size),
      num_groups_(num_groups),
      key_(key),
      hash_mask_(hash_mask) {
  require<InvalidArgument>(max_nodes >= 0 && max_nodes < (int64_t{1} << 30), "max_nodes is ",
                           max_nodes, ", must be in 0..2^30-1; change the KV budget");
  nodes_.resize(static_cast<size_t>(max_nodes) + 1);
  payload_.resize(nodes_.size() * payload_stride_);
  slots_.resize(
      std::bit_ceil(nodes_.size() * 2));  // at most half full: short probes, always an empty slot
  slot_mask_ = slots_.size() - 1;
  for (int32_t node = static_cast<int32_t>(max_nodes); node >= 1; --node) {
    at(node).parent = free_node_;
    free_node_ = node;
  }
}

uint64_t PrefixIndex::child_hash(int32_t parent, uint64_t salt, const int32_t* tokens) const {
  const uint64_t seed = parent == kRoot ? multiply_fold(salt ^ key_.a, key_.b) : at(parent).hash;
  return hash_words(key_, seed, tokens, static_cast<size_t>(block_size_)) & hash_mask_;
}

int32_t PrefixIndex::find(int32_t parent, uint64_t salt, const int32_t* tokens,
                          uint64_t hash) const {
  const auto tag = static_cast<uint32_t>(hash);
  for (size_t position = tag & slot_mask_; slots_[position].node != 0;
       position = (position + 1) & slot_mask_) {
    if (slots_[position].tag != tag) continue;
    const int32_t node = slots_[position].node;
    const Node& candidate = at(node);
    if (candidate.parent == parent && candidate.salt == salt &&
        std::memcmp(payload(node) + num_groups_, tokens,
                    static_cast<size_t>(block_size_) * sizeof(int32_t)) == 0) {
      return node;
    }
  }
  return 0;
}

int32_t PrefixIndex::find_or_insert(int32_t parent, uint64_t salt, const int32_t* tokens) {
  const uint64_t hash = child_hash(parent, salt, tokens);
  if (const int32_t found = find(parent, salt, tokens, hash); found != 0) return found;
  const int32_t node = free_node_;
  if (node == 0) return 0;
  Node& n = at(node);
  free_node_ = n.parent;
  n = Node{.hash = hash, .salt = salt, .parent = parent, .refs = 0, .live = true};
  int32_t* data = payload(node);
  std::fill_n(data, num_groups_, 0);
  std::copy_n(tokens, block_size_, data + num_groups_);
  retain(parent);
  const auto tag = static_cast<uint32_t>(hash);
  size_t position = tag & slot_mask_;
  while (slots_[position].node != 0) position = (position + 1) & slot_mask_;
  slots_[position] = Slot{tag, node};
  ++num_nodes_;
  return node;
}

void PrefixIndex::drop(int32_t node) {
  while (node != kRoot && --at(node).refs == 0) {
    Node& n = at(node);
    const int32_t parent = n.parent;
    erase_slot(node);
    n.live = false;
    n.parent = free_node_;
    free_node_ = node;
    --num_nodes_;
    node = parent;
  }
}

// Backward-shift deletion: every later entry of the run that may move closer to its home does, so
// lookups need no tombstones.
void PrefixIndex::erase_slot(int32_t node) {
  size_t hole = static_cast<uint32_t>(at(node).hash) & slot_mask_;
  while (slots_[hole].node != node) hole = (hole + 1) & slot_mask_;
  for (size_t next = (hole + 1) & slot_mask_; slots_[next].node != 0;
       next = (next + 1) & slot_mask_) {
    const size_t home = slots_[next].tag & slot_mask_;
    if (((next - home) & slot_mask_) >= ((next - hole) & slot_mask_)) {
      slots_[hole] = slots_[next];
      hole = next;
    }
  }
  slots_[hole] = Slot{};
}

void PrefixIndex::attach(int32_t node, int32_t group, int32_t block) {
  payload(node)[group] = block;
  ++num_attached_;
  retain(node);
}

void PrefixIndex::detach(int32_t node, int32_t block) {
  int32_t* blocks = payload(node);
  int32_t* slot = std::find(blocks, blocks + num_groups_, block);
  check_invariant(slot != blocks + num_groups_, "block ", block, " is not in its node ", node);
  *slot = 0;
  --num_attached_;
  drop(node);
}

void PrefixIndex::check_integrity(const std::vector<int32_t>& held) const {
  std::vector<int32_t> refs(held);
  refs.resize(nodes_.size());
  int32_t num_live = 0;
  int32_t num_blocks = 0;
  for (int32_t node = 1; node <= max_nodes(); ++node) {
    const Node& n = at(node);
    if (!n.live) continue;
    ++num_live;
    check_invariant(n.parent == kRoot || is_live(n.parent), "node ", node, " has no live parent");
    check_invariant(n.parent == kRoot || at(n.parent).salt == n.salt, "node ", node,
                    " differs from its parent in salt");
    const int32_t* tokens = payload(node) + num_groups_;
    check_invariant(child_hash(n.parent, n.salt, tokens) == n.hash, "the hash chain of node ", node,
                    " does not recompute");
    check_invariant(find(n.parent, n.salt, tokens) == node, "node ", node, " cannot be found");
    if (n.parent != kRoot) ++refs[static_cast<size_t>(n.parent)];
    for (int32_t group = 0; group < num_groups_; ++group) {
      if (block(node, group) == 0) continue;
      ++num_blocks;
      ++refs[static_cast<size_t>(node)];
    }
  }
  check_invariant(num_live == num_nodes_, num_live, " nodes are live, num_nodes is ", num_nodes_);
  check_invariant(num_blocks == num_attached_, num_blocks, " blocks are attached, num_attached is ",
                  num_attached_);
  const auto num_used =
      std::count_if(slots_.begin(), slots_.end(), [](const Slot& s) { return s.node != 0; });
  check_invariant(num_used == num_nodes_, num_used, " slots are used by ", num_nodes_, " nodes");
  int32_t num_idle = 0;
  for (int32_t node = free_node_; node != 0; node = at(node).parent) {
    check_invariant(!at(node).live && ++num_idle <= max_nodes(),
                    "the list of free nodes is damaged");
  }
  check_invariant(num_idle + num_nodes_ == max_nodes(), "nodes were lost");
  for (int32_t node = 1; node <= max_nodes(); ++node) {
    const int32_t expected = refs[static_cast<size_t>(node)];
    check_invariant(!at(node).live || (at(node).refs == expected && expected > 0), "node ", node,
                    " counts ", at(node).refs, " references, has ", expected);
    check_invariant(at(node).live || expected == 0, "node ", node, " is referenced but not live");
  }
}

}  // namespace sagellm::kv
