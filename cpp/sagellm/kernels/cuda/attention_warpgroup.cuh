// Paged prefill attention for compute capability 9.0: the wide shape on wgmma and the copy engine.
//
// A block has three warpgroups. One thread of the last copies pages: for every step of 128 tokens,
// an entry of the ring for K and one for V, each a box of 64 dimensions after the other. The first
// two take 64 rows of a tile each. They hold scores, probabilities and sums in registers, and
// multiply the probabilities of one step with V while the scores of the next are already under way;
// they take turns, so that one computes exponents while the products of the other run.
//
// Steps lie on the absolute grid, and a row's bits depend on its own tokens and on the splits
// alone.
//
// Of an item, positions outside [kv_begin, kv_end) are masked, and their V must be finite, because
// 0 * NaN is NaN. Pages that lie outside altogether are copied from beyond the end of the array, as
// zeros, so blocks that were given back are not touched. The rows behind kv_end in the page that
// holds it may never have been written: the consumers overwrite them with zeros in shared memory.
// Rows before kv_begin in its page hold older tokens of the same sequence.
#pragma once

#include "sagellm/kernels/cuda/attention_launch.h"
#include "sagellm/kernels/cuda/attention_output.cuh"
#include "sagellm/kernels/cuda/wgmma.cuh"

namespace sagellm::kernels::cuda {

struct WarpgroupAttentionParams {
  TensorMap pages;  // [block][row of K, then V][dimension], boxes of a page and 64 dimensions
  AttentionParams attention;
};

template <int kDim>
struct WarpgroupShape {
  static constexpr int kGroupRows = 64;  // of a consumer warpgroup: m of wgmma
  static constexpr int kConsumers = wide_rows(kDim) / kGroupRows;
  static_assert(kConsumers == 2, "they take turns");
  static constexpr int kConsumerThreads = kConsumers * kWarpgroupSize;
  static constexpr int kThreads = kConsumerThreads + kWarpgroupSize;
  static constexpr int kTokens = 128;  // of a step: n of the scores
  static constexpr int kBoxDims = kWarpgroupBoxDims;
  static_assert(kBoxDims * 2 == kSwizzleRowBytes);
  static constexpr int kColumns = kDim / kBoxDims;
  static constexpr int kColumnBytes = kTokens * kSwizzleRowBytes;
  static constexpr int kEntryBytes = kColumns * kColumnBytes;
  static constexpr int kQueryColumnBytes = kGroupRows * kSwizzleRowBytes;
  static constexpr int kQueryGroupBytes = kColumns * kQueryColumnBytes;
  static constexpr int kQueryBytes = kConsumers * kQueryGroupBytes;
  static constexpr int kControlBytes = 1024;  // keeps what follows aligned
  static constexpr int kFixedBytes = kQueryBytes + kControlBytes;
  // Of 65536: 168 at the start for each of 384 threads, afterwards 2 * 128 * 232 + 128 * 40.
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kProducerRegisters = 40;
};

/// What lies behind Q: barriers of the ring's entries, and what finish_tokens() needs.
struct WarpgroupControl {
  uint64_t full[kLongestAttentionRing];   // one arrival, and the bytes of an entry
  uint64_t empty[kLongestAttentionRing];  // an arrival of every consumer warp
  int32_t complete[128];                  // by token of the item
};

/// An entry of the ring: `round` is the parity of how often the ring was gone through.
struct RingPlace {
  int slot;
  int round = 0;

  SAGE_DEVICE void advance(int entries, int ring) {  // entries <= ring
    slot += entries;
    if (slot >= ring) {
      slot -= ring;
      round ^= 1;
    }
  }
};

template <int kDim>
class WarpgroupRole {
 protected:
  using Shape = WarpgroupShape<kDim>;
  static_assert(sizeof(WarpgroupControl) <= Shape::kControlBytes);

  SAGE_DEVICE explicit WarpgroupRole(const AttentionParams& p) : p_(p) {}

  SAGE_DEVICE static std::byte* query() { return shared_memory<std::byte>(); }
  SAGE_DEVICE static WarpgroupControl& control() {
    return *reinterpret_cast<WarpgroupControl*>(query() + Shape::kQueryBytes);
  }
  SAGE_DEVICE static std::byte* entry(int slot) {
    return query() + Shape::kFixedBytes + slot * Shape::kEntryBytes;
  }
  SAGE_DEVICE static int first_step(const AttentionItem& item) {
    return item.kv_begin / Shape::kTokens;
  }
  SAGE_DEVICE static int num_steps(const AttentionItem& item) {
    return (item.kv_end + Shape::kTokens - 1) / Shape::kTokens - first_step(item);
  }

  const AttentionParams& p_;
};

/// One warp: copies K and V of the items, as far ahead as the ring allows.
template <int kDim>
class WarpgroupProducer : WarpgroupRole<kDim> {
  using Role = WarpgroupRole<kDim>;
  using Role::control;
  using Role::entry;
  using Role::p_;
  using typename Role::Shape;

 public:
  SAGE_DEVICE WarpgroupProducer(const AttentionParams& p, const TensorMap& map)
      : Role(p), map_(map) {
    if (lane_id() == 0) prefetch_tensor_map(&map_);
  }

  SAGE_DEVICE void run(const AttentionItem& item) {
    const int step = Role::first_step(item);
    const int end = step + Role::num_steps(item);
    const int plane_rows = p_.kv.page_size * p_.kv.num_kv_heads;
    const int first_row = p_.kv.page_size * static_cast<int>(blockIdx.y);
    int next = block_of_page(item, step);
    for (int i = step; i < end; ++i) {
      const int block = next;
      if (i + 1 < end) next = block_of_page(item, i + 1);
      copy(block, first_row, 2 * plane_rows);
      copy(block, plane_rows + first_row, 2 * plane_rows);
    }
  }

 private:
  // Lane i: the block of page i of a step, -1 outside the item's range.
  SAGE_DEVICE int block_of_page(const AttentionItem& item, int step) const {
    const int token = step * Shape::kTokens + lane_id() * p_.kv.page_size;
    const bool inside = lane_id() * p_.kv.page_size < Shape::kTokens && token < item.kv_end &&
                        token + p_.kv.page_size > item.kv_begin;
    if (!inside) return -1;
    return p_.block_tables[item.table * p_.block_tables_stride + token / p_.kv.page_size];
  }

  // An entry from rows `row` .. of the pages' blocks; rows from `beyond` on do not exist.
  SAGE_DEVICE void copy(int block_of_lane, int row, int beyond) {
    uint64_t* full = control().full + place_.slot;
    std::byte* to = entry(place_.slot);
    mbarrier_wait(control().empty + place_.slot, place_.round ^ 1);
    if (lane_id() == 0) mbarrier_arrive_expect(full, Shape::kEntryBytes);
    for (int i = 0; i * p_.kv.page_size < Shape::kTokens; ++i) {
      const int block = shfl(block_of_lane, i);
      if (lane_id() == 0) {
#pragma unroll
        for (int c = 0; c < Shape::kColumns; ++c) {
          copy_box(to + c * Shape::kColumnBytes, &map_, full, c * Shape::kBoxDims,
                   block >= 0 ? row : beyond, max(block, 0));
        }
      }
      to += p_.kv.page_size * kSwizzleRowBytes;
    }
    place_.advance(1, p_.ring);
  }

  const TensorMap& map_;
  RingPlace place_{0};
};

/// Four warps: 64 rows of every item.
template <int kDim, typename T>
class WarpgroupConsumer : WarpgroupRole<kDim> {
  using Role = WarpgroupRole<kDim>;
  using Role::control;
  using Role::entry;
  using Role::p_;
  using typename Role::Shape;
  static constexpr int kTokens = Shape::kTokens;
  static constexpr float kLog2E = 1.4426950408889634f;
  static constexpr FloatType kType = std::is_same_v<T, bf16> ? FloatType::kBF16 : FloatType::kF16;
  enum Barrier : int { kTurn = 1, kGroup = 3, kAll = 5 };

 public:
  SAGE_DEVICE explicit WarpgroupConsumer(const AttentionParams& p)
      : Role(p),
        group_(warp_id() / 4),
        row_(group_ * Shape::kGroupRows + warp_id() % 4 * 16 + lane_id() / 4) {
    if (group_ == 1) pass_turn();  // the first begins
  }
  /// After the last item: takes the turn that nobody will take.
  SAGE_DEVICE void finish() const {
    if (group_ == 0) take_turn();
  }

  SAGE_DEVICE void run(const AttentionItem& item) {
    kv_begin_ = item.kv_begin;
    kv_end_ = item.kv_end;
    store_query(item);
    find_limits(item);
    fence_async_proxy();
    sync_group();

    float acc[kDim / 2] = {};
    float s[kTokens / 2];
    uint32_t probabilities[kTokens / 16][4];
    float shrink[2];
    maximum_[0] = maximum_[1] = -INFINITY;
    sum_[0] = sum_[1] = 0.f;
    int first_token = Role::first_step(item) * kTokens;
    wait_full(keys_);
    start_scores(s);
    wgmma_wait<0>(s);
    release(keys_);
    softmax(s, first_token, shrink);
    pack(probabilities, s);
    int rest = Role::num_steps(item) - 1;
    if (rest > 0) wait_full(keys_);
    for (; rest > 0; --rest) {
      first_token += kTokens;
      take_turn();
      start_scores(s);
      wait_full(values_);
      start_output(acc, probabilities);
      pass_turn();
      wgmma_wait<1>(s);
      release(keys_);
      softmax(s, first_token, shrink);
      compute_here(s);
      // Here and not at the next turn, because its loop also keeps the compiler from taking the
      // wait for the product with V in front of the exponents, which it is there to cover.
      if (rest > 1) wait_full(keys_);
      wgmma_wait<0>(acc);
      release(values_);
      rescale(acc, shrink);
      pack(probabilities, s);
    }
    wait_full(values_);
    clear_tail(first_token);
    start_output(acc, probabilities);
    wgmma_wait<0>(acc);
    release(values_);
    write(item, acc);
  }

 private:
  // ----------------------------------------------------------------------------------- in step
  SAGE_DEVICE void take_turn() const { sync_named(kTurn + group_, Shape::kConsumerThreads); }
  SAGE_DEVICE void pass_turn() const { arrive_named(kTurn + 1 - group_, Shape::kConsumerThreads); }
  SAGE_DEVICE void sync_group() const { sync_named(kGroup + group_, kWarpgroupSize); }
  SAGE_DEVICE static void wait_full(const RingPlace& place) {
    mbarrier_wait(control().full + place.slot, place.round);
  }
  SAGE_DEVICE void release(RingPlace& place) const {
    if (lane_id() == 0) mbarrier_arrive(control().empty + place.slot);
    place.advance(2, p_.ring);  // K and V take turns in the ring
  }

  // ---------------------------------------------------------------------------------- products
  SAGE_DEVICE std::byte* group_query() const {
    return Role::query() + group_ * Shape::kQueryGroupBytes;
  }
  SAGE_DEVICE void start_scores(float (&s)[kTokens / 2]) const {
    const uint64_t q = matrix_descriptor(group_query(), 0);
    const uint64_t k = matrix_descriptor(entry(keys_.slot), 0);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      const int column = step / 4;
      const int within = step % 4 * 32;
      wgmma_shared<T>(s, moved(q, column * Shape::kQueryColumnBytes + within),
                      moved(k, column * Shape::kColumnBytes + within), step > 0);
    }
    wgmma_commit();
  }
  SAGE_DEVICE void start_output(float (&acc)[kDim / 2],
                                const uint32_t (&probabilities)[kTokens / 16][4]) const {
    const uint64_t v = matrix_descriptor(entry(values_.slot), Shape::kColumnBytes);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTokens / 16; ++step) {
      wgmma_registers<T>(acc, probabilities[step], moved(v, step * 2 * kSwizzleBlockBytes), true);
    }
    wgmma_commit();
  }

  // ----------------------------------------------------------------------------------- softmax
  // Scores become exp2(score - maximum); `shrink` is for what was summed under a lower maximum.
  SAGE_DEVICE void softmax(float (&s)[kTokens / 2], int first_token, float (&shrink)[2]) {
    if (p_.softcap > 0.f) {
      const float inward = 2.f * kLog2E * p_.scale / p_.softcap;
#pragma unroll
      for (float& score : s) {  // softcap * tanh, in units of softcap
        score = 1.f - 2.f * reciprocal(1.f + ex2(score * inward));
      }
    }
    if (first_token < all_begin_ || first_token + kTokens > all_end_) mask(s, first_token);
    const float factor = (p_.softcap > 0.f ? p_.softcap : p_.scale) * kLog2E;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
        highest = fmaxf(highest, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
      }
      const float now = fmaxf(maximum_[half], warp_max<4>(highest) * factor);
      const float base = exponent_base(now);
      shrink[half] = ex2(maximum_[half] - base);
      maximum_[half] = now;
      float added = 0.f;
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
        for (int i = 4 * n + 2 * half; i < 4 * n + 2 * half + 2; ++i) {
          s[i] = ex2(fmaf(s[i], factor, -base));
          added += s[i];
        }
      }
      sum_[half] = fmaf(sum_[half], shrink[half], added);
    }
  }

  SAGE_DEVICE void mask(float (&s)[kTokens / 2], int first_token) const {
    const int window = p_.window > 0 ? p_.window : INT32_MAX;
    const int column = first_token + lane_id() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int begin = max(kv_begin_, end_[half] - window) - column;
      const int end = min(kv_end_, end_[half]) - column;
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int token = n * 8 + j;
          float& score = s[4 * n + 2 * half + j];
          score = token >= begin && token < end ? score : -INFINITY;
        }
      }
    }
  }

  SAGE_DEVICE static void rescale(float (&acc)[kDim / 2], const float (&shrink)[2]) {
    // Multiplying by exactly 1 changes nothing: most steps find no higher score.
    if (ballot(shrink[0] != 1.f || shrink[1] != 1.f) == 0) return;
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) acc[i] *= shrink[i / 2 % 2];
  }

  // Of D, a lane has columns 8 n + 2 c and the next; of A, 16 t + 2 c, and 8 further on.
  SAGE_DEVICE static void pack(uint32_t (&probabilities)[kTokens / 16][4],
                               const float (&s)[kTokens / 2]) {
#pragma unroll
    for (int t = 0; t < kTokens / 16; ++t) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        probabilities[t][w] = pack2<T>(s[8 * t + 2 * w], s[8 * t + 2 * w + 1]);
      }
    }
  }

  // -------------------------------------------------------------------------- begin and end
  // Rows of Q; rows and dimensions beyond the tile's are zeros.
  SAGE_DEVICE void store_query(const AttentionItem& item) const {
    constexpr int kPieces = kDim / 8;
    const int rows = item.num_tokens * item.num_heads;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupSize;
#pragma unroll
    for (int j = 0; j < Shape::kGroupRows * kPieces / kWarpgroupSize; ++j) {  // all loads at once
      const int i = j * kWarpgroupSize + thread;
      const int own = i / kPieces;
      const int piece = i % kPieces;
      const int row = group_ * Shape::kGroupRows + own;
      uint4 words{0, 0, 0, 0};
      if (row < rows && piece * 8 < p_.kv.head_dim) {
        words = load_stream(static_cast<const uint16_t*>(p_.q) +
                            token_of_row(p_, item, row) * p_.q_stride +
                            int64_t{head_of_row(p_, item, row)} * p_.kv.head_dim + piece * 8);
      }
      *reinterpret_cast<uint4*>(group_query() + piece / 8 * Shape::kQueryColumnBytes +
                                swizzled(own, piece % 8)) = words;
    }
  }

  // The ends of this lane's rows: a row sees tokens before its end. Rows beyond the tile see
  // everything; they are not written.
  SAGE_DEVICE void find_limits(const AttentionItem& item) {
    const int rows = item.num_tokens * item.num_heads;
    int earliest = kv_end_;
    int latest = kv_begin_;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_ + 8 * half;
      end_[half] = kv_end_;
      if (row >= rows) continue;
      end_[half] = p_.positions[token_of_row(p_, item, row)] + 1;
      earliest = min(earliest, end_[half]);
      latest = max(latest, end_[half]);
    }
#pragma unroll
    for (int lanes = 16; lanes >= 4; lanes /= 2) {
      earliest = min(earliest, shfl_xor(earliest, lanes));
      latest = max(latest, shfl_xor(latest, lanes));
    }
    all_end_ = earliest;
    all_begin_ = p_.window > 0 ? max(kv_begin_, latest - p_.window) : kv_begin_;
  }

  // Zeros over V behind kv_end, up to the end of its page. Both warpgroups write the same bytes.
  SAGE_DEVICE void clear_tail(int first_token) const {
    const int rest = kv_end_ & (p_.kv.page_size - 1);
    if (rest == 0) return;
    const int first = kv_end_ - first_token;
    const int count = (p_.kv.page_size - rest) * 8;
    std::byte* values = entry(values_.slot);
#pragma unroll
    for (int c = 0; c < Shape::kColumns; ++c) {
      for (int i = static_cast<int>(threadIdx.x) % kWarpgroupSize; i < count; i += kWarpgroupSize) {
        *reinterpret_cast<uint4*>(values + c * Shape::kColumnBytes + first * kSwizzleRowBytes +
                                  i * 16) = uint4{0, 0, 0, 0};
      }
    }
    fence_async_proxy();
    sync_group();
  }

  SAGE_DEVICE void write(const AttentionItem& item, const float (&acc)[kDim / 2]) const {
    const bool to_output = writes_output(p_, item);
    const int rows = item.num_tokens * item.num_heads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = warp_sum<4>(sum_[half]);
      if (row_ + 8 * half >= rows) continue;
      write_row<kDim>(
          p_, item, kType, row_ + 8 * half, to_output, maximum_[half], sum, 1.f,
          [&](int group, int word) {
            const int at = 4 * (2 * group + word) + 2 * half;
            return float2{acc[at], acc[at + 1]};
          },
          [](int group, int word) { return group * 16 + word * 8 + lane_id() % 4 * 2; });
    }
    if (to_output) return;
    const auto sync = [] { sync_named(kAll, Shape::kConsumerThreads); };
    finish_tokens<Shape::kConsumerThreads>(p_, item, control().complete, sync);
    sync();  // before the next item writes `complete`
  }

  const int group_;
  const int row_;  // of the tile; this lane's other row is eight below
  RingPlace keys_{0};
  RingPlace values_{1};
  int kv_begin_ = 0;
  int kv_end_ = 0;
  int end_[2] = {};
  int all_begin_ = 0;  // tokens in [all_begin_, all_end_) are seen by every row of the warp
  int all_end_ = 0;
  float maximum_[2] = {};
  float sum_[2] = {};
};

template <int kDim, typename T>
__global__ void __launch_bounds__(WarpgroupShape<kDim>::kThreads, 1)
    attention_warpgroup_kernel(const __grid_constant__ WarpgroupAttentionParams params) {
#if SAGE_WARPGROUP_CODE
  using Shape = WarpgroupShape<kDim>;
  const AttentionParams& p = params.attention;
  auto& control =
      *reinterpret_cast<WarpgroupControl*>(shared_memory<std::byte>() + Shape::kQueryBytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.ring; ++i) {
      mbarrier_init(control.full + i, 1);
      mbarrier_init(control.empty + i, Shape::kConsumerThreads / kWarpSize);
    }
    mbarrier_publish();
  }
  sync_block();
  const int begin = p.work.bin_begin[blockIdx.x];
  const int end = p.work.bin_begin[blockIdx.x + 1];
  if (threadIdx.x >= Shape::kConsumerThreads) {
    lower_registers<Shape::kProducerRegisters>();
    if (warp_id() == Shape::kConsumerThreads / kWarpSize) {
      WarpgroupProducer<kDim> producer(p, params.pages);
      for (int i = begin; i < end; ++i) producer.run(p.work.items[i]);
    }
  } else {
    raise_registers<Shape::kConsumerRegisters>();
    WarpgroupConsumer<kDim, T> consumer(p);
    for (int i = begin; i < end; ++i) consumer.run(p.work.items[i]);
    consumer.finish();
  }
#endif
}

}  // namespace sagellm::kernels::cuda
