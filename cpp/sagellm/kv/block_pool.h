// Block ids 1..N with reference counts and a free list that is also the LRU list of cached blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sagellm::kv {

/// Hands out block ids in O(1) and never allocates memory after construction. Block 0 is reserved:
/// it is padding in block tables and the sentinel of the free list here.
///
/// A block is free when its reference count is 0. A free block may still have an owner (its node in
/// the prefix index): its contents are then reusable until the block is allocated again, which is
/// when the caller must take it out of the index (lazy eviction).
///
/// Order of the free list, from the head where blocks are taken: blocks without owner, most
/// recently released first, then blocks with owner, least recently released first. It starts as 1,
/// 2, ..., N. So cached contents are given up only when nothing else is free, oldest first.
class BlockPool {
 public:
  /// Throws InvalidArgument unless 1 <= num_blocks <= kMaxBlocks.
  explicit BlockPool(int64_t num_blocks);

  static constexpr int64_t kMaxBlocks = int64_t{1} << 28;

  int32_t num_blocks() const { return num_blocks_; }
  int32_t num_free() const { return num_free_; }
  int32_t ref_count(int32_t block) const { return at(block).ref_count; }
  int32_t owner(int32_t block) const { return at(block).owner; }

  /// Records which node of the prefix index holds this block (0: none). A free block may only lose
  /// its owner when every free block does, so that the order of the free list stays as described.
  void set_owner(int32_t block, int32_t owner) { at(block).owner = owner; }

  /// Takes the block at the head of the free list with a reference count of 1; 0 when none is free.
  /// The block may still have an owner.
  int32_t allocate() {
    const int32_t block = blocks_[0].next;
    if (block == 0) return 0;
    unlink(block);
    at(block).ref_count = 1;
    return block;
  }

  /// Adds a reference to a block that is in use, or free but cached.
  void acquire(int32_t block) {
    if (at(block).ref_count++ == 0) unlink(block);
  }

  /// Drops a reference; the last one puts the block on the free list. Throws IntegrityError when
  /// there is none.
  void release(int32_t block) {
    Descriptor& d = at(block);
    if (d.ref_count <= 0) [[unlikely]]
      fail_release(block);
    if (--d.ref_count > 0) return;
    link_after(d.owner != 0 ? blocks_[0].prev : 0, block);
  }

  /// The free block after `block` (0: the head); 0 at the end.
  int32_t next_free(int32_t block) const { return at(block).next; }

  /// Throws IntegrityError unless the free list is a permutation of the blocks with reference count
  /// 0, in the order described above.
  void check_integrity() const;

 private:
  struct Descriptor {
    int32_t prev = 0;
    int32_t next = 0;
    int32_t ref_count = 0;
    int32_t owner = 0;
  };

  Descriptor& at(int32_t block) { return blocks_[static_cast<size_t>(block)]; }
  const Descriptor& at(int32_t block) const { return blocks_[static_cast<size_t>(block)]; }

  void unlink(int32_t block) {
    const Descriptor& d = at(block);
    at(d.prev).next = d.next;
    at(d.next).prev = d.prev;
    --num_free_;
  }

  void link_after(int32_t prev, int32_t block) {
    Descriptor& d = at(block);
    d.prev = prev;
    d.next = at(prev).next;
    at(d.next).prev = block;
    at(prev).next = block;
    ++num_free_;
  }

  [[noreturn]] static void fail_release(int32_t block);

  std::vector<Descriptor> blocks_;
  int32_t num_blocks_ = 0;
  int32_t num_free_ = 0;
};

}  // namespace sagellm::kv
