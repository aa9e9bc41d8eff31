#include "sagellm/kv/kv_cache.h"

#include <algorithm>
#include <utility>

#include "sagellm/base/error.h"
#include "sagellm/base/math.h"
#include "sagellm/kv/integrity.h"

namespace sagellm::kv {

namespace {

constexpr int64_t kMaxBlockSize = 4096;
constexpr size_t kMaxGroups = 256;
// Prefixes longer than their cached blocks exist in sliding groups only: a long sequence keeps a
// node for every block it ever filled but caches a window's worth. Beyond this bound new blocks
// stay uncached.
constexpr int64_t kNodesPerBlock = 4;

int32_t checked_block_size(const KvCacheOptions& options) {
  require<InvalidArgument>(options.block_size >= 1 && options.block_size <= kMaxBlockSize,
                           "block_size is ", options.block_size, ", must be in 1..", kMaxBlockSize);
  return static_cast<int32_t>(options.block_size);
}

std::vector<int64_t> checked_windows(const KvCacheOptions& options) {
  require<InvalidArgument>(!options.windows.empty() && options.windows.size() <= kMaxGroups,
                           "there are ", options.windows.size(), " KV groups, must be 1..",
                           kMaxGroups);
  for (const int64_t window : options.windows) {
    require<InvalidArgument>(window >= 0 && window <= INT32_MAX, "a KV group has window ", window,
                             ", must be 0 (full attention) or a number of tokens");
  }
  return options.windows;
}

}  // namespace

KvCache::KvCache(const KvCacheOptions& options)
    : block_size_(checked_block_size(options)),
      windows_(checked_windows(options)),
      enable_prefix_caching_(options.enable_prefix_caching),
      pool_(options.num_blocks),
      index_(enable_prefix_caching_
                 ? std::min(options.num_blocks * kNodesPerBlock, (int64_t{1} << 30) - 1)
                 : 0,
             block_size_, static_cast<int32_t>(windows_.size()), random_hash_key(),
             options.hash_mask),
      max_needed_(windows_.size()),
      runs_(windows_.size()) {
  for (size_t group = 0; group < windows_.size(); ++group) {
    const int64_t window = windows_[group];
    max_needed_[group] = window == 0 ? INT64_MAX : ceil_div(window - 1, block_size_);
  }
}

// ------------------------------------------------------------------------------------------------
// Sequences
// ------------------------------------------------------------------------------------------------

const KvCache::Sequence& KvCache::live(int64_t sequence_id) const {
  const auto it = sequences_.find(sequence_id);
  require<InvalidArgument>(it != sequences_.end() && !it->second.released,
                           "no live sequence has id ", sequence_id, "; add or fork it first");
  return it->second;
}

KvCache::Sequence& KvCache::live(int64_t sequence_id) {
  return const_cast<Sequence&>(std::as_const(*this).live(sequence_id));
}

void KvCache::require_unused(int64_t sequence_id) const {
  require<InvalidArgument>(sequence_id >= 0, "sequence id is ", sequence_id, ", must be >= 0");
  const auto it = sequences_.find(sequence_id);
  if (it == sequences_.end()) return;
  require<InvalidArgument>(!it->second.released, "sequence id ", sequence_id,
                           " is still pinned; unpin it first");
  fail<InvalidArgument>("sequence id ", sequence_id, " is already in use; release it first");
}

KvCache::Sequence& KvCache::emplace(int64_t sequence_id) {
  if (spare_.empty()) {
    if (const size_t total = sequences_.size() + 1; spare_.capacity() < total) {
      spare_.reserve(total * 2);  // so that erase() never needs memory
    }
    return sequences_[sequence_id];
  }
  auto node = std::move(spare_.back());
  spare_.pop_back();
  node.key() = sequence_id;
  return sequences_.insert(std::move(node)).position->second;
}

void KvCache::erase(SequenceMap::iterator it) {
  auto node = sequences_.extract(it);
  Sequence& s = node.mapped();
  index_.drop(s.tip);
  std::vector<int32_t> table = std::move(s.table);
  table.clear();
  s = Sequence{};
  s.table = std::move(table);
  spare_.push_back(std::move(node));
}

void KvCache::add(int64_t sequence_id, uint64_t salt) {
  require_unused(sequence_id);
  emplace(sequence_id).salt = salt;
}

void KvCache::fork(int64_t parent_id, int64_t child_id) {
  const Sequence& parent = live(parent_id);  // the map moves no elements
  require_unused(child_id);
  Sequence& child = emplace(child_id);
  const auto num_shared =
      static_cast<size_t>(ceil_div(parent.num_tokens, block_size_)) * windows_.size();
  try {
    child.table.assign(parent.table.begin(),
                       parent.table.begin() + static_cast<std::ptrdiff_t>(num_shared));
  } catch (...) {
    erase(sequences_.find(child_id));
    throw;
  }
  for (const int32_t block : child.table) {
    if (block != 0) pool_.acquire(block);
  }
  child.salt = parent.salt;
  child.num_tokens = parent.num_tokens;
  child.num_published = parent.num_published;
  child.tip = parent.tip;
  index_.retain(child.tip);
}

void KvCache::release(int64_t sequence_id) {
  Sequence& s = live(sequence_id);
  release_entries(s, /*keep_published=*/s.pinned);
  if (!s.pinned) {
    erase(sequences_.find(sequence_id));
    return;
  }
  index_.drop(s.tip);
  s.tip = PrefixIndex::kRoot;
  s.num_tokens = 0;
  s.num_published = 0;
  s.released = true;
}

void KvCache::pin(int64_t sequence_id) { live(sequence_id).pinned = true; }

void KvCache::unpin(int64_t sequence_id) {
  const auto it = sequences_.find(sequence_id);
  require<InvalidArgument>(it != sequences_.end() && it->second.pinned, "sequence id ", sequence_id,
                           " is not pinned");
  it->second.pinned = false;
  if (!it->second.released) return;
  release_entries(it->second, /*keep_published=*/false);
  erase(it);
}

// Tails before heads: the LRU list then gives up the end of a prefix before its beginning.
void KvCache::release_entries(Sequence& s, bool keep_published) {
  const size_t groups = windows_.size();
  for (size_t entry = num_entries(s); entry-- > 0;) {
    for (size_t group = 0; group < groups; ++group) {
      int32_t& block = s.table[entry * groups + group];
      if (block == 0 || (keep_published && pool_.owner(block) != 0)) continue;
      pool_.release(block);
      block = 0;
    }
  }
  drop_dead_copies();
}

int64_t KvCache::max_blocks(std::span<const int64_t> sequence_ids) const {
  size_t longest = 1;
  for (const int64_t id : sequence_ids) longest = std::max(longest, num_entries(live(id)));
  return static_cast<int64_t>(longest);
}

void KvCache::block_tables(std::span<const int64_t> sequence_ids, int64_t width,
                           int32_t* out) const {
  const size_t groups = windows_.size();
  const auto row = static_cast<size_t>(width);
  std::fill_n(out, groups * sequence_ids.size() * row, 0);
  for (size_t i = 0; i < sequence_ids.size(); ++i) {
    const Sequence& s = live(sequence_ids[i]);
    const size_t entries = num_entries(s);
    for (size_t group = 0; group < groups; ++group) {
      int32_t* to = out + (group * sequence_ids.size() + i) * row;
      for (size_t entry = 0; entry < entries; ++entry) to[entry] = s.table[entry * groups + group];
    }
  }
}

int64_t KvCache::num_blocks_of(int64_t sequence_id) const {
  const Sequence& s = live(sequence_id);
  return std::count_if(s.table.begin(), s.table.end(), [](int32_t block) { return block != 0; });
}

// ------------------------------------------------------------------------------------------------
// Room and copy-on-write
// ------------------------------------------------------------------------------------------------

// Leading entries of a table that no position >= num_tokens can see.
int64_t KvCache::num_dead_entries(size_t group, int64_t num_tokens) const {
  const int64_t window = windows_[group];
  return window == 0 ? 0 : std::max<int64_t>(0, num_tokens - window + 1) / block_size_;
}

bool KvCache::is_shared(int32_t block) const {
  const int32_t refs = pool_.ref_count(block);
  if (refs <= 1) return false;
  // A pending copy only reads, and runs before the next step writes.
  const auto reads = std::count_if(copies_.begin(), copies_.end(),
                                   [block](const BlockCopy& c) { return c.source == block; });
  return refs - reads > 1;
}

bool KvCache::reserve(int64_t sequence_id, int64_t num_tokens) {
  Sequence& s = live(sequence_id);
  require<InvalidArgument>(num_tokens >= 0 && num_tokens <= INT32_MAX, "num_tokens is ", num_tokens,
                           ", must be in 0..2^31-1");
  if (num_tokens <= s.num_tokens) return true;
  const size_t groups = windows_.size();
  const size_t old_entries = num_entries(s);
  const size_t new_entries =
      std::max(old_entries, static_cast<size_t>(ceil_div(num_tokens, block_size_)));
  // Only the entry of the next position can be both written and shared: earlier ones are not
  // written, later ones were never committed.
  const auto tail = static_cast<size_t>(s.num_tokens / block_size_);
  size_t num_copies = 0;
  if (s.num_tokens % block_size_ != 0) {
    for (size_t group = 0; group < groups; ++group)
      num_copies += is_shared(s.table[tail * groups + group]);
  }
  const size_t needed = (new_entries - old_entries) * groups + num_copies;
  if (needed > static_cast<size_t>(pool_.num_free())) return false;

  if (s.table.capacity() < new_entries * groups) {
    s.table.reserve(std::max(new_entries * groups, s.table.capacity() * 2));
  }
  if (num_copies > 0) {
    copies_.reserve(copies_.size() + num_copies);
    make_writable(s, tail);
  }
  while (s.table.size() < new_entries * groups) s.table.push_back(take_block());
  return true;
}

// The only place where a shared block becomes a private one. The table's reference to the old block
// goes to the pending copy, so the block cannot be reused before the copy was taken.
void KvCache::make_writable(Sequence& s, size_t entry) {
  for (size_t group = 0; group < windows_.size(); ++group) {
    int32_t& block = s.table[entry * windows_.size() + group];
    if (!is_shared(block)) continue;
    const int32_t copy = take_block();
    copies_.push_back({block, copy});
    block = copy;
    ++copied_blocks_;
  }
}

int32_t KvCache::take_block() {
  const int32_t block = pool_.allocate();
  if (const int32_t node = pool_.owner(block); node != 0) {
    index_.detach(node, block);
    pool_.set_owner(block, 0);
    ++evicted_blocks_;
  }
  return block;
}

std::vector<BlockCopy> KvCache::take_copies() {
  std::vector<BlockCopy> taken = copies_;  // keeps the capacity of copies_
  copies_.clear();
  for (const BlockCopy& copy : taken) pool_.release(copy.source);
  return taken;
}

// Forgets pending copies whose destination nobody holds any more. A copy may read the destination
// of an earlier one, so later copies go first.
void KvCache::drop_dead_copies() {
  for (size_t i = copies_.size(); i-- > 0;) {
    if (pool_.ref_count(copies_[i].destination) > 0) continue;
    pool_.release(copies_[i].source);
    copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

// ------------------------------------------------------------------------------------------------
// Prefix cache
// ------------------------------------------------------------------------------------------------

// Of the entries before a hit of `num_hit` blocks, the group must have the last so many.
int64_t KvCache::num_needed_entries(size_t group, int64_t num_hit) const {
  return std::min(num_hit, max_needed_[group]);
}

int64_t KvCache::match_prefix(int64_t sequence_id, std::span<const int32_t> token_ids) {
  Sequence& s = live(sequence_id);
  require<InvalidArgument>(s.num_tokens == 0 && s.table.empty(), "sequence ", sequence_id,
                           " is not empty; match its prefix before reserving");
  if (!enable_prefix_caching_ || token_ids.empty()) return 0;
  const auto num_tokens = static_cast<int64_t>(token_ids.size());
  const int64_t max_hit = (num_tokens - 1) / block_size_;  // the last token is computed in any case
  const size_t groups = windows_.size();
  path_.reserve(static_cast<size_t>(max_hit));

  path_.clear();
  std::fill(runs_.begin(), runs_.end(), 0);
  int64_t num_hit = 0;
  int32_t node = PrefixIndex::kRoot;
  bool complete = true;  // no group with full attention has a hole so far
  for (int64_t depth = 1; depth <= max_hit && complete; ++depth) {
    node = index_.find(node, s.salt, token_ids.data() + (depth - 1) * block_size_);
    if (node == 0) break;
    path_.push_back(node);
    bool usable = true;
    for (size_t group = 0; group < groups; ++group) {
      const bool present = index_.block(node, static_cast<int32_t>(group)) != 0;
      runs_[group] = present ? runs_[group] + 1 : 0;
      usable &= runs_[group] >= num_needed_entries(group, depth);
      complete &= present || windows_[group] != 0;
    }
    if (usable) num_hit = depth;
  }
  s.table.reserve(static_cast<size_t>(num_hit) * groups);

  queried_tokens_ += num_tokens;
  hit_tokens_ += num_hit * block_size_;
  for (int64_t entry = 0; entry < num_hit; ++entry) {
    for (size_t group = 0; group < groups; ++group) {
      int32_t block = 0;
      if (entry >= num_hit - num_needed_entries(group, num_hit)) {
        block = index_.block(path_[static_cast<size_t>(entry)], static_cast<int32_t>(group));
        pool_.acquire(block);
      }
      s.table.push_back(block);
    }
  }
  if (num_hit > 0) {
    s.tip = path_[static_cast<size_t>(num_hit - 1)];
    index_.retain(s.tip);
  }
  s.num_tokens = num_hit * block_size_;
  s.num_published = num_hit;
  return s.num_tokens;
}

void KvCache::commit(int64_t sequence_id, std::span<const int32_t> token_ids,
                     int64_t num_computed) {
  Sequence& s = live(sequence_id);
  require<InvalidArgument>(num_computed >= s.num_tokens, "num_computed is ", num_computed,
                           " but sequence ", sequence_id, " has ", s.num_tokens,
                           " committed tokens already");
  require<InvalidArgument>(static_cast<int64_t>(token_ids.size()) >= num_computed, "token_ids has ",
                           token_ids.size(), " tokens, num_computed is ", num_computed);
  const auto num_reserved = static_cast<int64_t>(num_entries(s)) * block_size_;
  require<InvalidArgument>(num_computed <= num_reserved, "num_computed is ", num_computed,
                           " but sequence ", sequence_id, " has room for ", num_reserved,
                           " tokens; reserve them first");
  if (num_computed > s.num_tokens && s.num_tokens % block_size_ != 0) {
    const size_t tail = static_cast<size_t>(s.num_tokens / block_size_) * windows_.size();
    for (size_t group = 0; group < windows_.size(); ++group) {
      require<InvalidArgument>(!is_shared(s.table[tail + group]), "sequence ", sequence_id,
                               " shares its last block since a fork; reserve before computing");
    }
  }
  const int64_t old_num_tokens = std::exchange(s.num_tokens, num_computed);
  if (enable_prefix_caching_) publish(s, token_ids);
  give_back_dead_entries(s, old_num_tokens);
}

// Gives every newly full block a node and puts the block there unless the node has one already
// (another sequence computed the same prefix first: tables are append-only, so this block stays
// private). Blocks are published in order and stop at the first that gets no node; the next commit
// tries again from there.
void KvCache::publish(Sequence& s, std::span<const int32_t> token_ids) {
  const size_t groups = windows_.size();
  for (; (s.num_published + 1) * block_size_ <= s.num_tokens; ++s.num_published) {
    const int32_t node =
        index_.find_or_insert(s.tip, s.salt, token_ids.data() + s.num_published * block_size_);
    if (node == 0) return;
    index_.retain(node);
    index_.drop(s.tip);
    s.tip = node;
    for (size_t group = 0; group < groups; ++group) {
      const int32_t block = s.table[static_cast<size_t>(s.num_published) * groups + group];
      if (block == 0 || index_.block(node, static_cast<int32_t>(group)) != 0) continue;
      index_.attach(node, static_cast<int32_t>(group), block);
      pool_.set_owner(block, node);
    }
  }
}

// Oldest first: of a sliding group, the blocks nearest to the end are the ones a later hit can use.
void KvCache::give_back_dead_entries(Sequence& s, int64_t old_num_tokens) {
  const size_t groups = windows_.size();
  for (size_t group = 0; group < groups; ++group) {
    const int64_t end = num_dead_entries(group, s.num_tokens);
    for (int64_t entry = num_dead_entries(group, old_num_tokens); entry < end; ++entry) {
      pool_.release(std::exchange(s.table[static_cast<size_t>(entry) * groups + group], 0));
    }
  }
  drop_dead_copies();
}

void KvCache::reset_prefix_index() {
  for (int32_t block = pool_.next_free(0); block != 0; block = pool_.next_free(block)) {
    const int32_t node = pool_.owner(block);
    if (node == 0) continue;
    index_.detach(node, block);
    pool_.set_owner(block, 0);
    ++evicted_blocks_;
  }
}

// ------------------------------------------------------------------------------------------------
// Introspection
// ------------------------------------------------------------------------------------------------

KvStats KvCache::stats() const {
  return KvStats{.num_blocks = pool_.num_blocks(),
                 .free_blocks = pool_.num_free(),
                 .cached_blocks = index_.num_attached(),
                 .prefix_queried_tokens = queried_tokens_,
                 .prefix_hit_tokens = hit_tokens_,
                 .evicted_blocks = evicted_blocks_,
                 .copied_blocks = copied_blocks_};
}

void KvCache::check_integrity() const {
  pool_.check_integrity();
  std::vector<int32_t> refs(static_cast<size_t>(pool_.num_blocks()) + 1);
  std::vector<int32_t> held(static_cast<size_t>(index_.max_nodes()) + 1);
  for (const auto& [id, s] : sequences_) {
    check_sequence(id, s);
    ++held[static_cast<size_t>(s.tip)];
    for (const int32_t block : s.table) ++refs[static_cast<size_t>(block)];
  }
  for (const BlockCopy& copy : copies_) {
    check_invariant(pool_.ref_count(copy.destination) > 0, "block ", copy.destination,
                    " is free but the destination of a pending copy");
    ++refs[static_cast<size_t>(copy.source)];
  }
  for (int32_t block = 1; block <= pool_.num_blocks(); ++block) {
    check_invariant(pool_.ref_count(block) == refs[static_cast<size_t>(block)], "block ", block,
                    " counts ", pool_.ref_count(block), " references, has ",
                    refs[static_cast<size_t>(block)]);
  }
  held[PrefixIndex::kRoot] = 0;
  index_.check_integrity(held);
  check_owners();
}

void KvCache::check_sequence(int64_t sequence_id, const Sequence& s) const {
  const size_t groups = windows_.size();
  check_invariant(s.table.size() % groups == 0, "sequence ", sequence_id,
                  " has tables of unequal length");
  if (s.released) {
    check_invariant(s.pinned && s.tip == PrefixIndex::kRoot, "sequence ", sequence_id,
                    " was released but is still there");
    for (const int32_t block : s.table) {
      check_invariant(block == 0 || pool_.owner(block) != 0, "pinned block ", block,
                      " is not in the prefix index");
    }
    return;
  }
  const auto entries = static_cast<int64_t>(num_entries(s));
  const int64_t num_full = s.num_tokens / block_size_;
  check_invariant(s.num_tokens <= entries * block_size_, "sequence ", sequence_id,
                  " has committed unreserved tokens");
  check_invariant(s.num_published <= num_full, "sequence ", sequence_id,
                  " has published a block that is not full");
  for (int64_t entry = entries - 1; entry >= 0; --entry) {
    for (size_t group = 0; group < groups; ++group) {
      const int32_t block = s.table[static_cast<size_t>(entry) * groups + group];
      check_invariant(block >= 0 && block <= pool_.num_blocks(), "sequence ", sequence_id,
                      " names block ", block);
      check_invariant((block == 0) == (entry < num_dead_entries(group, s.num_tokens)), "sequence ",
                      sequence_id, ", group ", group, ", entry ", entry,
                      ": a block is held exactly if a later position sees it");
      check_invariant(block == 0 || entry < s.num_published || pool_.owner(block) == 0, "block ",
                      block, " is in the prefix index before it is full");
      check_invariant(entry * block_size_ < s.num_tokens || !is_shared(block), "block ", block,
                      " is shared but not committed");
    }
  }
  int64_t depth = s.num_published;
  for (int32_t node = s.tip; node != PrefixIndex::kRoot; node = index_.parent(node), --depth) {
    check_invariant(depth > 0 && index_.is_live(node), "sequence ", sequence_id,
                    " stands on a wrong node");
    for (size_t group = 0; group < groups; ++group) {
      const int32_t block = s.table[static_cast<size_t>(depth - 1) * groups + group];
      const int32_t owner = block == 0 ? 0 : pool_.owner(block);
      check_invariant(owner == 0 || owner == node, "block ", block,
                      " is indexed under another prefix");
    }
  }
  check_invariant(depth == 0, "sequence ", sequence_id, " stands on a wrong node");
}

void KvCache::check_owners() const {
  int32_t num_owned = 0;
  for (int32_t block = 1; block <= pool_.num_blocks(); ++block) {
    const int32_t node = pool_.owner(block);
    if (node == 0) continue;
    ++num_owned;
    check_invariant(index_.is_live(node), "block ", block, " belongs to a node that is gone");
    int32_t uses = 0;
    for (int32_t group = 0; group < num_groups(); ++group)
      uses += index_.block(node, group) == block;
    check_invariant(uses == 1, "block ", block, " is in ", uses, " slots of its node");
  }
  check_invariant(num_owned == index_.num_attached(), num_owned,
                  " blocks are cached, the index has ", index_.num_attached());
}

}  // namespace sagellm::kv
