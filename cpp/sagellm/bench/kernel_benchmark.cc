#include "sagellm/bench/kernel_benchmark.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/base/math.h"
#include "sagellm/kv/kv_storage.h"
#include "sagellm/model/attention_plan.h"
#include "sagellm/model/forward_batch.h"
#include "sagellm/runtime/thread_pool.h"
#include "sagellm/sample/sampler.h"
#include "sagellm/tensor/buffer.h"

namespace sagellm::bench {

namespace {

constexpr int32_t kBlockSize = 32;
constexpr int64_t kTokenBlockBytes = int64_t{256} << 10;  // as in the decoder

/// Numbers in [-1, 1), the same ones in every run.
class Numbers {
 public:
  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f;
  }
  std::vector<float> take(int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = next();
    return values;
  }

 private:
  uint64_t state_ = 1;
};

/// Pages of some sequences whose blocks are scattered as after a while of serving, and the last
/// tokens of one of them. Rounds take every layer of a sequence, then the next pages.
class Pages {
 public:
  explicit Pages(const AttentionShape& shape)
      : shape_(checked(shape)),
        num_blocks_(static_cast<int32_t>(ceil_div(shape.context, kBlockSize))),
        storage_(int64_t{num_blocks_} * shape.num_sequences, shape.num_layers, shape.num_kv_heads,
                 shape.head_dim, kBlockSize, shape.dtype),
        row_(int64_t{shape.num_kv_heads} * (shape.group + 2) * shape.head_dim),
        block_tables_(static_cast<size_t>(num_blocks_) * static_cast<size_t>(shape.num_sequences)),
        token_ids_(static_cast<size_t>(shape.num_tokens)),
        positions_(static_cast<size_t>(shape.num_tokens)),
        query_starts_{0, shape.num_tokens} {
    for (size_t i = 0; i < block_tables_.size(); ++i) {
      const size_t block = i % 2 == 0 ? i / 2 : block_tables_.size() - 1 - i / 2;
      block_tables_[i] = static_cast<int32_t>(1 + block);
    }
    std::iota(positions_.begin(), positions_.end(), shape.context - shape.num_tokens);
    batch_.token_ids = token_ids_;
    batch_.positions = positions_;
    batch_.query_starts = query_starts_;
    batch_.block_tables = std::span(block_tables_).first(static_cast<size_t>(num_blocks_));
    batch_.num_groups = 1;
    batch_.max_blocks = num_blocks_;
    qkv_ = Numbers().take(row_ * shape.num_tokens);
  }

  /// Gives every position of every layer a key and a value.
  void fill(const kernels::KernelTable& table) {
    const std::vector<float> values = Numbers().take(int64_t{shape_.context} * shape_.head_dim);
    for (int64_t round = 0; round < num_rounds(); ++round) {
      for (int32_t head = 0; head < shape_.num_kv_heads; ++head) {
        write(table, round, head, 0, shape_.context, values.data(), values.data(), shape_.head_dim);
      }
    }
  }

  /// Writes K and V of one head, where the batch has them.
  void write_batch(const kernels::KernelTable& table, int64_t round, int32_t head) {
    const float* k = qkv_.data() + int64_t{shape_.num_kv_heads} * shape_.group * shape_.head_dim +
                     int64_t{head} * shape_.head_dim;
    const float* v = k + int64_t{shape_.num_kv_heads} * shape_.head_dim;
    write(table, round, head, positions_.front(), shape_.num_tokens, k, v, row_);
  }

  kernels::KvView view(int64_t round) {
    return storage_.view(static_cast<int>(round % shape_.num_layers));
  }
  const int32_t* block_table(int64_t round) const {
    return block_tables_.data() + round / shape_.num_layers % shape_.num_sequences * num_blocks_;
  }
  const model::ForwardBatch& batch() const { return batch_; }
  const float* q() const { return qkv_.data(); }
  int64_t row() const { return row_; }

 private:
  int64_t num_rounds() const { return int64_t{shape_.num_layers} * shape_.num_sequences; }

  static const AttentionShape& checked(const AttentionShape& shape) {
    require<InvalidArgument>(
        shape.num_kv_heads > 0 && shape.group > 0 && shape.group <= kernels::kAttentionRows &&
            shape.head_dim > 0 && shape.context > 0 && shape.context <= (1 << 20) &&
            shape.num_tokens > 0 && shape.num_tokens <= shape.context && shape.num_layers > 0 &&
            shape.num_sequences > 0,
        "an attention benchmark needs positive sizes, at most ", kernels::kAttentionRows,
        " query heads per KV head, at most 1048576 positions and at most as "
        "many query tokens as positions");
    return shape;
  }

  void write(const kernels::KernelTable& table, int64_t round, int32_t head, int32_t first,
             int32_t count, const float* k, const float* v, int64_t stride) {
    kernels::KvWriteParams params;
    params.kv = view(round);
    params.kv_head = head;
    params.block_table = block_table(round);
    params.first_position = first;
    params.num_tokens = count;
    params.k = k;
    params.v = v;
    params.stride = stride;
    table.kv_write(params);
  }

  const AttentionShape shape_;
  const int32_t num_blocks_;
  kv::KvStorage storage_;
  const int64_t row_;  // floats of one token: q, k, v
  std::vector<int32_t> block_tables_, token_ids_, positions_, query_starts_;
  std::vector<float> qkv_;
  model::ForwardBatch batch_;
};

/// The part [begin, end) of `total` that a thread takes when all take equally much.
struct Share {
  Share(int64_t total, int thread, int num_threads)
      : begin(total * thread / num_threads), end(total * (thread + 1) / num_threads) {}
  int64_t begin;
  int64_t end;
};

}  // namespace

runtime::Timing time_matmul(const Run& run, const quant::PackedMatrix& weights, int32_t num_tokens,
                            model::Precision precision, int32_t copies) {
  require<InvalidArgument>(num_tokens > 0 && num_tokens <= (1 << 16) && copies > 0,
                           "a matmul benchmark needs 1 to 65536 tokens and at least one copy");
  Buffer all(weights.bytes() * static_cast<size_t>(copies));
  for (int32_t i = 0; i < copies; ++i) {
    std::memcpy(all.data() + static_cast<size_t>(i) * weights.bytes(), weights.storage.data(),
                weights.bytes());
  }
  model::ActKinds kinds;
  kinds.add(run.table.act_kind[static_cast<size_t>(weights.format)]);
  model::ActivationBuffer x(num_tokens, weights.k, precision, kinds);
  Numbers numbers;
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t i = 0; i < weights.k; ++i) x.row(t)[i] = numbers.next();
  }
  x.encode(run.table, kinds, 0, num_tokens);

  const int64_t blocks = weights.num_row_blocks();
  Buffer out(static_cast<size_t>(num_tokens * blocks * kernels::kRowBlock) * sizeof(float));
  runtime::ThreadPool pool(run.num_threads);
  const int64_t token_block = std::max<int64_t>(48, kTokenBlockBytes / weights.k / 48 * 48);
  return runtime::time_rounds(pool, run.seconds, [&](int thread, int64_t round) {
    const Share share(blocks, thread, run.num_threads);
    kernels::MatmulParams params;
    params.format = weights.format;
    params.weights = all.data() + static_cast<size_t>(round % copies) * weights.bytes();
    params.k = weights.k;
    params.row_block_begin = static_cast<int32_t>(share.begin);
    params.row_block_end = static_cast<int32_t>(share.end);
    params.out_stride = blocks * kernels::kRowBlock;
    for (int64_t t = 0; t < num_tokens; t += token_block) {
      params.num_tokens = static_cast<int32_t>(std::min(token_block, num_tokens - t));
      params.x = x.view(t);
      params.out = reinterpret_cast<float*>(out.data()) + t * params.out_stride;
      run.table.matmul(params);
    }
  });
}

runtime::Timing time_attention(const Run& run, const AttentionShape& shape) {
  Pages pages(shape);
  pages.fill(run.table);
  model::AttentionPlan plan;
  plan.build(pages.batch(), 0, shape.group, shape.num_kv_heads, run.num_threads);
  const auto states = static_cast<size_t>(plan.num_states * shape.num_kv_heads);
  std::vector<float> m(states), l(states), acc(states * static_cast<size_t>(shape.head_dim));
  std::vector<float> out(static_cast<size_t>(int64_t{shape.num_tokens} * shape.num_kv_heads *
                                             shape.group * shape.head_dim));
  const size_t scratch_bytes = (run.table.attention_scratch_bytes + 63) / 64 * 64;
  Buffer scratch(std::max<size_t>(64, scratch_bytes * static_cast<size_t>(run.num_threads)));

  const auto attend = [&](int thread, int64_t round, int64_t unit) {
    const model::AttentionItem& item = plan.items[static_cast<size_t>(unit / shape.num_kv_heads)];
    const model::AttentionTile& tile = plan.tiles[static_cast<size_t>(item.tile)];
    const int64_t head = unit % shape.num_kv_heads;
    const int64_t state =
        head * plan.num_states + tile.state + int64_t{item.state} * tile.num_tokens * shape.group;
    kernels::AttentionParams params;
    params.kv = pages.view(round);
    params.kv_head = static_cast<int32_t>(head);
    params.block_table = pages.block_table(round);
    params.q = pages.q() + tile.first_token * pages.row() + head * shape.group * shape.head_dim;
    params.q_stride = pages.row();
    params.group = shape.group;
    params.num_tokens = tile.num_tokens;
    params.first_position = tile.first_position;
    params.split_begin = item.split_begin;
    params.split_end = item.split_end;
    params.scale = 1.f / std::sqrt(static_cast<float>(shape.head_dim));
    params.m = m.data() + state;
    params.l = l.data() + state;
    params.acc = acc.data() + state * shape.head_dim;
    params.scratch = scratch.data() + static_cast<size_t>(thread) * scratch_bytes;
    run.table.attention(params);
  };
  const auto merge = [&](int64_t token, int64_t head) {
    const model::AttentionTile& tile =
        plan.tiles[static_cast<size_t>(plan.tile_of_token[static_cast<size_t>(token)])];
    const int64_t state =
        head * plan.num_states + tile.state + (token - tile.first_token) * shape.group;
    kernels::AttentionFinishParams params;
    params.m = m.data() + state;
    params.l = l.data() + state;
    params.acc = acc.data() + state * shape.head_dim;
    params.count = tile.num_states;
    params.rows = params.group = shape.group;
    params.head_dim = shape.head_dim;
    params.out = out.data() + (token * shape.num_kv_heads + head) * shape.group * shape.head_dim;
    run.table.attention_finish(params);
  };

  runtime::ThreadPool pool(run.num_threads);
  const int64_t units = static_cast<int64_t>(plan.items.size()) * shape.num_kv_heads;
  return runtime::time_rounds(pool, run.seconds, [&](int thread, int64_t round) {
    for (int64_t unit = thread; unit < units; unit += run.num_threads) attend(thread, round, unit);
    pool.barrier();
    for (int64_t token = thread; token < shape.num_tokens; token += run.num_threads) {
      for (int64_t head = 0; head < shape.num_kv_heads; ++head) merge(token, head);
    }
  });
}

runtime::Timing time_kv_write(const Run& run, const AttentionShape& shape) {
  Pages pages(shape);
  pages.fill(run.table);
  runtime::ThreadPool pool(run.num_threads);
  return runtime::time_rounds(pool, run.seconds, [&](int thread, int64_t round) {
    for (int32_t head = thread; head < shape.num_kv_heads; head += run.num_threads) {
      pages.write_batch(run.table, round, head);
    }
  });
}

namespace {

/// One row of a row-wise kernel.
using RowKernel = void (*)(const kernels::KernelTable& table, const float* x, const float* y,
                           int64_t columns, float* out, model::ActivationBuffer& encoded,
                           int64_t row);

RowKernel row_kernel(std::string_view name) {
  using Table = kernels::KernelTable;
  using Encoded = model::ActivationBuffer;
  if (name == "rms_norm") {
    return [](const Table& table, const float* x, const float* y, int64_t n, float* out, Encoded&,
              int64_t) { table.rms_norm(x, y, 1e-5f, n, out); };
  }
  if (name == "quantize") {
    return [](const Table& table, const float*, const float*, int64_t, float*, Encoded& encoded,
              int64_t row) { encoded.encode(table, {.i8 = true, .bf16 = false}, row, row + 1); };
  }
  if (name == "rope") {  // in place; cos and sin lie in the two halves of y
    return [](const Table& table, const float*, const float* y, int64_t n, float* out, Encoded&,
              int64_t) { table.rope(out, y, y + n / 2, n); };
  }
  if (name == "silu_mul") {
    return [](const Table& table, const float* x, const float* y, int64_t n, float* out, Encoded&,
              int64_t) { table.silu_mul(x, y, n, out); };
  }
  if (name == "gelu_tanh_mul") {
    return [](const Table& table, const float* x, const float* y, int64_t n, float* out, Encoded&,
              int64_t) { table.gelu_tanh_mul(x, y, n, out); };
  }
  if (name == "argmax") {
    return [](const Table& table, const float* x, const float*, int64_t n, float* out, Encoded&,
              int64_t) {
      int32_t index = 0;
      table.argmax(x, n, out, &index);
    };
  }
  fail<InvalidArgument>("no row-wise kernel '", name,
                        "'; choose rms_norm, quantize, rope, silu_mul, gelu_tanh_mul or argmax");
}

}  // namespace

runtime::Timing time_rows(const Run& run, std::string_view kernel, int64_t rows, int64_t columns) {
  require<InvalidArgument>(rows > 0 && columns > 0 && columns % kernels::kUnit == 0 &&
                               rows * columns <= (int64_t{1} << 28),
                           "a row-wise benchmark needs rows and columns (a multiple of ",
                           kernels::kUnit, "), together at most 2^28 values");
  const RowKernel body = row_kernel(kernel);
  const auto team_rows = rows * run.num_threads;
  model::ActivationBuffer x(team_rows, columns, model::Precision::kA8, {.i8 = true, .bf16 = false});
  Numbers numbers;
  for (int64_t i = 0; i < team_rows * columns; ++i) x.row(0)[i] = numbers.next();
  const std::vector<float> y = numbers.take(columns);
  std::vector<float> out = numbers.take(team_rows * columns);
  runtime::ThreadPool pool(run.num_threads);
  return runtime::time_rounds(pool, run.seconds, [&](int thread, int64_t) {
    for (int64_t row = thread * rows; row < (thread + 1) * rows; ++row) {
      body(run.table, x.row(row), y.data(), columns, out.data() + row * columns, x, row);
    }
  });
}

runtime::Timing time_sampler(const Run& run, int64_t vocab, double temperature, int64_t top_k,
                             double top_p) {
  require<InvalidArgument>(vocab > 0 && vocab <= (int64_t{1} << 24),
                           "a sampler benchmark needs a vocabulary of 1 to 2^24 tokens");
  sample::RowParams row;
  row.temperature = temperature;
  row.top_k = top_k;
  row.top_p = top_p;
  row.seed = 1;
  sample::validate(row, vocab);
  Numbers numbers;
  std::vector<float> logits(static_cast<size_t>(vocab));
  for (float& logit : logits) {  // twelve uniform numbers are nearly normal, with deviation 2
    logit = 0.f;
    for (int i = 0; i < 12; ++i) logit += 1.5f * numbers.next();
  }
  std::vector<sample::Scratch> scratch(static_cast<size_t>(run.num_threads));
  runtime::ThreadPool pool(run.num_threads);
  return runtime::time_rounds(pool, run.seconds, [&](int thread, int64_t round) {
    sample::RowParams mine = row;
    mine.position = static_cast<uint64_t>(round);
    sample::sample_row(logits.data(), vocab, mine, run.table, scratch[static_cast<size_t>(thread)]);
  });
}

}  // namespace sagellm::bench
