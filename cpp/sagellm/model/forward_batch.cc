#include "sagellm/model/forward_batch.h"

#include <algorithm>

#include "sagellm/base/error.h"

namespace sagellm::model {

namespace {

void validate_sequence(const ForwardBatch& batch, int32_t s, const ModelConfig& config,
                       const BatchLimits& limits) {
  const int32_t begin = batch.query_starts[static_cast<size_t>(s)];
  const int32_t end = batch.query_starts[static_cast<size_t>(s) + 1];
  require<InvalidArgument>(end > begin, "sequence ", s, " has no token in this step");
  const int32_t first = batch.positions[static_cast<size_t>(begin)];
  const int32_t last = first + (end - begin) - 1;
  require<InvalidArgument>(first >= 0 && last < config.max_position, "positions ", first, "..",
                           last, " are outside the model's context of ", config.max_position);
  for (int32_t t = begin; t < end; ++t) {
    require<InvalidArgument>(batch.positions[static_cast<size_t>(t)] == first + t - begin,
                             "positions of a sequence must be consecutive");
  }
  for (const LayerConfig& layer : config.layers) {
    if (layer.slot != 0) continue;  // one layer speaks for its group
    require<InvalidArgument>(layer.group < batch.num_groups, "block_tables lack KV group ",
                             layer.group);
    const int32_t oldest = layer.window > 0 ? std::max(0, first - layer.window + 1) : 0;
    const int32_t last_block = last / limits.block_size;
    require<InvalidArgument>(last_block < batch.max_blocks, "the block table of sequence ", s,
                             " ends before position ", last);
    const int32_t* table = batch.block_table(layer.group, s);
    for (int32_t b = oldest / limits.block_size; b <= last_block; ++b) {
      require<InvalidArgument>(table[b] > 0 && table[b] <= limits.num_blocks, "sequence ", s,
                               " has block id ", table[b], " at index ", b,
                               " of its table; valid are 1..", limits.num_blocks);
    }
  }
}

}  // namespace

void validate(const ForwardBatch& batch, const ModelConfig& config, const BatchLimits& limits) {
  const int32_t tokens = batch.num_tokens();
  const int32_t sequences = batch.num_sequences();
  require<InvalidArgument>(tokens >= 1 && tokens <= limits.max_batch_tokens, "a step of ", tokens,
                           " tokens; max_batch_tokens is ", limits.max_batch_tokens);
  require<InvalidArgument>(batch.positions.size() == batch.token_ids.size(),
                           "positions and token_ids differ in length");
  require<InvalidArgument>(sequences >= 1 && batch.query_starts.front() == 0 &&
                               batch.query_starts.back() == tokens &&
                               std::is_sorted(batch.query_starts.begin(), batch.query_starts.end()),
                           "query_starts must run from 0 to the number of tokens");
  require<InvalidArgument>(batch.max_blocks >= 1 && batch.block_tables.size() ==
                                                        static_cast<size_t>(batch.num_groups) *
                                                            static_cast<size_t>(sequences) *
                                                            static_cast<size_t>(batch.max_blocks),
                           "block_tables must have shape [groups, sequences, max_blocks]");
  for (const int32_t id : batch.token_ids) {
    require<InvalidArgument>(id >= 0 && id < config.vocab_size, "token id ", id,
                             " is outside the vocabulary of ", config.vocab_size);
  }
  for (size_t i = 0; i < batch.logit_rows.size(); ++i) {
    const int32_t row = batch.logit_rows[i];
    require<InvalidArgument>(row >= 0 && row < tokens && (i == 0 || row > batch.logit_rows[i - 1]),
                             "logit_rows must be ascending indices into the tokens");
  }
  require<InvalidArgument>(batch.block_copies.size() % 2 == 0,
                           "block_copies must have shape [n, 2]");
  for (const int32_t block : batch.block_copies) {
    require<InvalidArgument>(block > 0 && block <= limits.num_blocks, "block copy names block ",
                             block, " of ", limits.num_blocks);
  }
  for (int32_t s = 0; s < sequences; ++s) validate_sequence(batch, s, config, limits);
}

}  // namespace sagellm::model
