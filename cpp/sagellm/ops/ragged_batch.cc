#include "sagellm/ops/ragged_batch.h"

#include <algorithm>

#include "sagellm/base/error.h"

namespace sagellm::ops {

namespace {

constexpr int64_t kMaxPosition = int64_t{1} << 30;  // kernels add to positions in 32 bits

/// Rows [begin, end) of a step, at positions first .. first + (end - begin) - 1.
struct SequenceRows {
  int64_t sequence;
  int64_t begin;
  int64_t end;
};

void check_positions(const Matcher& match, const int32_t* positions, const SequenceRows& rows) {
  const int64_t first = positions[rows.begin];
  require<InvalidArgument>(first >= 0 && first + (rows.end - rows.begin) <= kMaxPosition,
                           match.operation(), ": positions of sequence ", rows.sequence,
                           " start at ", first, ", must be within 0..", kMaxPosition - 1);
  for (int64_t t = rows.begin; t < rows.end; ++t) {
    require<InvalidArgument>(positions[t] == first + (t - rows.begin), match.operation(),
                             ": positions of sequence ", rows.sequence,
                             " are not consecutive: ", positions[t], " at row ", t, " after ",
                             positions[rows.begin], " at row ", rows.begin);
  }
}

}  // namespace

KvPages pages_of(kv::KvStorage& storage, int slot) {
  return {storage.view(slot), storage.num_blocks(), storage.num_kv_heads(), Device{}};
}

void match_pages(Matcher& match, const KvPages& pages) {
  const kernels::KvView& kv = pages.view;
  require<InvalidArgument>(kv.pool != nullptr && pages.num_blocks > 0 && pages.num_kv_heads > 0,
                           match.operation(), ": the KV pages are empty");
  require<InvalidArgument>(kv.block_size > 0 && kv.block_size % kernels::kSubPage == 0,
                           match.operation(), ": block_size of the KV pages is ", kv.block_size,
                           ", must be a multiple of ", kernels::kSubPage);
  require<InvalidArgument>(
      kv.head_dim > 0 && kv.head_dim % 16 == 0 && kv.head_dim <= kernels::kMaxHeadDim,
      match.operation(), ": head_dim of the KV pages is ", kv.head_dim,
      ", must be a multiple of 16 up to ", kernels::kMaxHeadDim);
  require<InvalidArgument>(kv.sub_page_bytes == kernels::kv_sub_page_bytes(kv.dtype, kv.head_dim),
                           match.operation(), ": sub_page_bytes of the KV pages is ",
                           kv.sub_page_bytes, ", must be ",
                           kernels::kv_sub_page_bytes(kv.dtype, kv.head_dim));
  match.bind("kv_heads", pages.num_kv_heads, "the KV pages");
  match.bind("head_dim", kv.head_dim, "the KV pages");
}

kernels::RaggedParams match_batch(Matcher& match, const RaggedBatch& batch, const KvPages& pages,
                                  bool attends, int32_t window) {
  match.host_tensor("positions", batch.positions, ElementType::kI32, {"tokens"});
  match.host_tensor("block_tables", batch.block_tables, ElementType::kI32,
                    {"sequences", "max_blocks"});
  match.host_tensor("query_starts", batch.query_starts, ElementType::kI32,
                    {match["sequences"] + 1});
  kernels::RaggedParams p;
  p.num_sequences = match["sequences"];
  p.query_starts = batch.query_starts.as<int32_t>();
  p.positions = batch.positions.as<int32_t>();
  p.block_tables = batch.block_tables.as<int32_t>();
  p.block_tables_stride = batch.block_tables.strides[0];
  const int64_t tokens = match["tokens"];
  require<InvalidArgument>(p.query_starts[0] == 0 && p.query_starts[p.num_sequences] == tokens,
                           match.operation(), ": query_starts runs from ", p.query_starts[0],
                           " to ", p.query_starts[p.num_sequences], ", must run from 0 to ", tokens,
                           " (tokens)");
  for (int64_t s = 0; s < p.num_sequences; ++s) {
    const SequenceRows rows{s, p.query_starts[s], p.query_starts[s + 1]};
    require<InvalidArgument>(rows.begin <= rows.end && rows.end <= tokens, match.operation(),
                             ": query_starts of sequence ", s, " are ", rows.begin, " and ",
                             rows.end, ", must ascend within 0..", tokens);
    if (rows.begin == rows.end) continue;
    check_positions(match, p.positions, rows);
    const int64_t first = p.positions[rows.begin];
    const int64_t last = p.positions[rows.end - 1];
    int64_t oldest = first;
    if (attends) oldest = window > 0 ? std::max<int64_t>(0, first - window + 1) : 0;
    const int64_t block_size = pages.view.block_size;
    require<InvalidArgument>(last / block_size < match["max_blocks"], match.operation(),
                             ": block_tables holds ", match["max_blocks"] * block_size,
                             " positions of sequence ", s, ", position ", last, " is beyond");
    for (int64_t i = oldest / block_size; i <= last / block_size; ++i) {
      const int32_t block = p.block_tables[s * p.block_tables_stride + i];
      require<InvalidArgument>(block > 0 && block <= pages.num_blocks, match.operation(),
                               ": block_tables of sequence ", s, " has block ", block, " at index ",
                               i, ", valid are 1..", pages.num_blocks);
    }
  }
  return p;
}

}  // namespace sagellm::ops
