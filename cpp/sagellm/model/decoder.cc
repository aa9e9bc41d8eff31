#include "sagellm/model/decoder.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "sagellm/base/error.h"
#include "sagellm/base/math.h"
#include "sagellm/kernels/cpu/dispatch.h"

namespace sagellm::model {

namespace {

constexpr int32_t kSmallStep = 2;  // tokens up to which every thread prepares all rows itself
constexpr int32_t kHeadRows = 64;  // logit rows per pass over the output head
constexpr int64_t kTokenBlockBytes = int64_t{256} << 10;  // activations kept in the L2 cache

Buffer float_buffer(int64_t rows, int64_t stride) {
  return Buffer(static_cast<size_t>(rows * stride) * sizeof(float));
}

float* floats(Buffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

const kernels::KernelTable& select_table(const std::string& isa) {
  return isa.empty() ? kernels::kernel_table() : kernels::kernel_table(isa);
}

ModelConfig validated(ModelConfig config) {
  config.validate();
  return config;
}

DecoderOptions validated(DecoderOptions options) {
  require<InvalidArgument>(options.max_batch_tokens >= 1 && options.max_batch_tokens <= (1 << 20),
                           "max_batch_tokens is ", options.max_batch_tokens,
                           "; choose between 1 and 1048576");
  return options;
}

}  // namespace

struct Decoder::StepState {
  const ForwardBatch& batch;
  std::span<const sample::RowParams> sampling;
  const StepOutputs& outputs;
  bool small;  // every thread has private rows

  int64_t num_tokens() const { return batch.num_tokens(); }
  /// First workspace row of `thread`.
  int64_t base(int thread) const { return small ? int64_t{thread} * kSmallStep : 0; }
};

Decoder::Decoder(ModelConfig config, const TensorSources& sources, const DecoderOptions& options)
    : config_(validated(std::move(config))),
      options_(validated(options)),
      table_(select_table(options.isa)),
      pool_(options.num_threads),
      weights_(config_, sources, pool_),
      // Per layer at most 9 phases; 2 for the prologue and the final norm; 2 per pass over the
      // head.
      queue_(9 * config_.num_layers() + 4 +
             2 * static_cast<int>(ceil_div(options.max_batch_tokens, kHeadRows))),
      phase_timer_(options.num_threads),
      rows_(std::max<int64_t>(options.max_batch_tokens, int64_t{kSmallStep} * options.num_threads)),
      hidden_stride_(round_up(config_.hidden_size, kernels::kRowBlock)),
      qkv_stride_(int64_t{config_.num_heads + 2 * config_.num_kv_heads} * config_.head_dim),
      ffn_stride_(round_up(config_.intermediate_size, kernels::kRowBlock)),
      vocab_stride_(round_up(config_.vocab_size, kernels::kRowBlock)),
      residual_(float_buffer(rows_, config_.hidden_size)),
      projection_(float_buffer(rows_, hidden_stride_)),
      qkv_(float_buffer(rows_, qkv_stride_)),
      gate_(float_buffer(rows_, ffn_stride_)),
      up_(float_buffer(rows_, ffn_stride_)),
      logits_(float_buffer(std::min<int64_t>(kHeadRows, options.max_batch_tokens), vocab_stride_)),
      norm_scratch_(float_buffer(options.num_threads, hidden_stride_)),
      rope_tables_(config_.ropes, options.max_batch_tokens),
      hidden_in_(rows_, config_.hidden_size, options.precision, all_kinds()),
      attention_in_(rows_, int64_t{config_.num_heads} * config_.head_dim, options.precision,
                    all_kinds()),
      ffn_in_(rows_, config_.intermediate_size, options.precision, all_kinds()),
      attention_scratch_(
          static_cast<size_t>(round_up(static_cast<int64_t>(table_.attention_scratch_bytes), 64)) *
          static_cast<size_t>(options.num_threads)),
      sample_scratch_(static_cast<size_t>(options.num_threads)) {
  std::vector<int32_t> windows;
  for (const LayerConfig& layer : config_.layers) {
    auto it = std::find(windows.begin(), windows.end(), layer.window);
    if (it == windows.end()) it = windows.insert(windows.end(), layer.window);
    plan_of_layer_.push_back(static_cast<int32_t>(it - windows.begin()));
  }
  plans_.resize(windows.size());
  for (size_t i = 0; i < windows.size(); ++i) plans_[i].window = windows[i];
}

void Decoder::attach_kv(std::shared_ptr<kv::KvStorage> storage) {
  require<InvalidArgument>(storage != nullptr, "attach_kv needs a KV storage");
  require<InvalidArgument>(
      storage->num_kv_heads() == config_.num_kv_heads && storage->head_dim() == config_.head_dim,
      "the KV storage has ", storage->num_kv_heads(), " heads of ", storage->head_dim(),
      ", the model ", config_.num_kv_heads, " of ", config_.head_dim);
  for (const LayerConfig& layer : config_.layers) {
    require<InvalidArgument>(layer.slot < storage->num_slots(), "layer slot ", layer.slot,
                             " is outside the KV storage of ", storage->num_slots(), " slots");
  }
  kv_ = std::move(storage);
}

size_t Decoder::workspace_bytes() const {
  size_t total =
      hidden_in_.bytes() + attention_in_.bytes() + ffn_in_.bytes() + rope_tables_.bytes();
  for (const Buffer* buffer : {&residual_, &projection_, &qkv_, &gate_, &up_, &logits_,
                               &norm_scratch_, &attention_scratch_}) {
    total += buffer->size();
  }
  return total;
}

void Decoder::validate(const ForwardBatch& batch) const {
  require<InvalidArgument>(kv_ != nullptr, "no KV storage is attached");
  model::validate(batch, config_,
                  {.max_batch_tokens = options_.max_batch_tokens,
                   .num_blocks = kv_->num_blocks(),
                   .block_size = kv_->block_size()});
}

void Decoder::prepare(const ForwardBatch& batch) {
  for (size_t i = 0; i < batch.block_copies.size(); i += 2) {
    kv_->copy_block(batch.block_copies[i], batch.block_copies[i + 1]);
  }
  int64_t states = 0;
  for (AttentionPlan& plan : plans_) {
    plan.build(batch, plan.window, config_.group_size(), config_.num_kv_heads, pool_.size());
    states = std::max(states, plan.num_states * config_.num_kv_heads);
  }
  if (static_cast<int64_t>(state_m_.size()) < states) {
    state_m_.resize(static_cast<size_t>(states));
    state_l_.resize(static_cast<size_t>(states));
    state_acc_.resize(static_cast<size_t>(states * config_.head_dim));
  }
  queue_.reset();
}

void Decoder::step(const ForwardBatch& batch, std::span<const sample::RowParams> sampling,
                   const StepOutputs& outputs) {
  phase_timer_.begin_step();
  validate(batch);
  require<InvalidArgument>(sampling.empty() || sampling.size() == batch.logit_rows.size(),
                           "sampling has ", sampling.size(), " entries for ",
                           batch.logit_rows.size(), " logit rows");
  require<InvalidArgument>(outputs.sampled.size() == sampling.size(),
                           "sampled and sampling differ in length");
  prepare(batch);
  StepState step{batch, sampling, outputs, batch.num_tokens() <= kSmallStep};
  head_plan_.build(config_.vocab_size, sampling, outputs.logits != nullptr);
  phase_timer_.lap(0, Phase::kPrepare);
  pool_.run([&](int thread) { run_step(step, thread); });
  phase_timer_.end_step();
}

void Decoder::run_step(StepState& step, int thread) {
  int phase = 0;
  phase_timer_.lap(thread, Phase::kWait);
  embed(step, thread, phase);
  for (int layer = 0; layer < config_.num_layers(); ++layer) {
    attention_block(step, layer, thread, phase);
    feed_forward(step, layer, thread, phase);
  }
  if (step.batch.num_logit_rows() > 0) output_head(step, thread, phase);
}

template <typename Body>
void Decoder::for_tokens(const StepState& step, Phase kind, int thread, int64_t count, int& phase,
                         const Body& body) {
  if (step.small) {
    for (int64_t t = 0; t < count; ++t) body(t);
    phase_timer_.lap(thread, kind);
    return;
  }
  for_units({count, 16}, kind, thread, phase, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(t);
  });
}

template <typename Body>
void Decoder::for_units(const Units& units, Phase kind, int thread, int& phase, const Body& body) {
  queue_.for_each(phase++, thread, pool_.size(), units.total, units.max_chunk, body);
  phase_timer_.lap(thread, kind);
  pool_.barrier();
  phase_timer_.lap(thread, Phase::kWait);
}

Decoder::Units Decoder::units(const quant::PackedMatrix& matrix) {
  return {matrix.num_row_blocks(), 256};
}

ActKinds Decoder::kinds(std::initializer_list<const quant::PackedMatrix*> matrices) const {
  ActKinds kinds;
  for (const quant::PackedMatrix* matrix : matrices)
    kinds.add(table_.act_kind[static_cast<size_t>(matrix->format)]);
  return kinds;
}

ActKinds Decoder::all_kinds() const {
  ActKinds all = kinds({&weights_.head()});
  for (const LayerWeights& w : weights_.layers()) {
    for (const quant::PackedMatrix* matrix : {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down}) {
      all.add(table_.act_kind[static_cast<size_t>(matrix->format)]);
    }
  }
  return all;
}

void Decoder::matmul(const quant::PackedMatrix& matrix, int64_t block_begin, int64_t block_end,
                     const kernels::Activations& x, int64_t num_tokens, float* out,
                     int64_t out_stride) const {
  kernels::MatmulParams params;
  params.format = matrix.format;
  params.weights = matrix.storage.data();
  params.k = matrix.k;
  params.row_block_begin = static_cast<int32_t>(block_begin);
  params.row_block_end = static_cast<int32_t>(block_end);
  params.out_stride = out_stride;
  const int64_t k = matrix.k;
  const int64_t token_block = std::max<int64_t>(48, kTokenBlockBytes / k / 48 * 48);
  for (int64_t t = 0; t < num_tokens; t += token_block) {
    params.num_tokens = static_cast<int32_t>(std::min(token_block, num_tokens - t));
    params.x = x;
    params.x.f32 += t * k;
    if (x.bf16 != nullptr) params.x.bf16 += t * round_up(k, 2);
    if (x.q != nullptr) {
      params.x.q += t * k;
      if (x.q_lo != nullptr) params.x.q_lo += t * k;
      params.x.d += t * (k / kernels::kUnit);
      params.x.s += t * (k / kernels::kUnit);
      params.x.sum16 += t * (k / 16);
    }
    params.out = out + t * out_stride;
    table_.matmul(params);
  }
}

void Decoder::add_projection(float* x, const float* projection, const std::vector<float>& post_norm,
                             float* scratch) const {
  const float* delta = projection;
  if (!post_norm.empty()) {
    table_.rms_norm(projection, post_norm.data(), config_.norm_eps, config_.hidden_size, scratch);
    delta = scratch;
  }
  table_.add(x, delta, config_.hidden_size, x);
}

void Decoder::embed(StepState& step, int thread, int& phase) {
  float* x = floats(residual_) + step.base(thread) * config_.hidden_size;
  const auto embed_token = [&](int64_t t) {
    float* row = x + t * config_.hidden_size;
    weights_.embedding(step.batch.token_ids[static_cast<size_t>(t)], row);
    if (config_.embedding_scale != 1.f)
      table_.scale(row, config_.embedding_scale, config_.hidden_size);
  };
  if (step.small) {
    for (int64_t t = 0; t < step.num_tokens(); ++t) embed_token(t);
  }
  const Units tokens{step.num_tokens(), 16};
  for_units(tokens, Phase::kEmbed, thread, phase, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (!step.small) embed_token(t);
      rope_tables_.fill(t, step.batch.positions[static_cast<size_t>(t)]);
    }
  });
}

void Decoder::finish_projection(const quant::PackedMatrix& matrix, const float* bias,
                                const float* norm, bool rotate, int layer, int64_t first_row,
                                const kernels::Activations& x, float* out, int64_t num_tokens) {
  const int64_t dim = config_.head_dim;
  matmul(matrix, first_row / kernels::kRowBlock, (first_row + dim) / kernels::kRowBlock, x,
         num_tokens, out, qkv_stride_);
  if (bias == nullptr && norm == nullptr && !rotate) return;
  const RopeTables::View rope = rope_tables_.view(config_.layers[static_cast<size_t>(layer)].rope);
  for (int64_t t = 0; t < num_tokens; ++t) {
    float* head = out + t * qkv_stride_ + first_row;
    if (bias != nullptr) table_.add(head, bias + first_row, dim, head);
    if (norm != nullptr) table_.rms_norm(head, norm, config_.norm_eps, dim, head);
    if (rotate) {
      table_.rope(head, rope.cos + t * rope.half, rope.sin + t * rope.half, 2 * rope.half);
    }
  }
}

void Decoder::qkv_unit(StepState& step, int layer, int64_t unit, const kernels::Activations& x) {
  const LayerWeights& w = weights_.layers()[static_cast<size_t>(layer)];
  const LayerConfig& place = config_.layers[static_cast<size_t>(layer)];
  const int64_t dim = config_.head_dim;
  const int64_t tokens = step.num_tokens();
  const auto pointer = [](const std::vector<float>& values) {
    return values.empty() ? nullptr : values.data();
  };
  float* q = floats(qkv_);
  float* k = q + config_.num_heads * dim;
  float* v = k + config_.num_kv_heads * dim;
  if (unit >= config_.num_kv_heads) {  // a query head
    finish_projection(w.q, pointer(w.q_bias), pointer(w.q_norm), true, layer,
                      (unit - config_.num_kv_heads) * dim, x, q, tokens);
    return;
  }
  const int64_t row = unit * dim;
  finish_projection(w.k, pointer(w.k_bias), pointer(w.k_norm), true, layer, row, x, k, tokens);
  finish_projection(w.v, pointer(w.v_bias), nullptr, false, layer, row, x, v, tokens);
  for (int32_t s = 0; s < step.batch.num_sequences(); ++s) {
    const int32_t begin = step.batch.query_starts[static_cast<size_t>(s)];
    kernels::KvWriteParams write;
    write.kv = kv_->view(place.slot);
    write.kv_head = static_cast<int32_t>(unit);
    write.block_table = step.batch.block_table(place.group, s);
    write.first_position = step.batch.positions[static_cast<size_t>(begin)];
    write.num_tokens = step.batch.query_starts[static_cast<size_t>(s) + 1] - begin;
    write.k = k + begin * qkv_stride_ + row;
    write.v = v + begin * qkv_stride_ + row;
    write.stride = qkv_stride_;
    table_.kv_write(write);
  }
}

void Decoder::attention_unit(StepState& step, const LayerConfig& place, const AttentionPlan& plan,
                             int64_t unit, int64_t next, int thread) {
  const int32_t group = config_.group_size();
  const auto item_of = [&](int64_t n) -> const AttentionItem& {
    return plan.items[static_cast<size_t>(n / config_.num_kv_heads)];
  };
  const AttentionItem& item = item_of(unit);
  const AttentionTile& tile = plan.tiles[static_cast<size_t>(item.tile)];
  const int64_t head = unit % config_.num_kv_heads;
  const int64_t state =
      head * plan.num_states + tile.state + int64_t{item.state} * tile.num_tokens * group;
  kernels::AttentionParams params;
  params.kv = kv_->view(place.slot);
  params.kv_head = static_cast<int32_t>(head);
  params.block_table = step.batch.block_table(place.group, tile.sequence);
  params.q = floats(qkv_) + tile.first_token * qkv_stride_ + head * group * config_.head_dim;
  params.q_stride = qkv_stride_;
  params.group = group;
  params.num_tokens = tile.num_tokens;
  params.first_position = tile.first_position;
  params.split_begin = item.split_begin;
  params.split_end = item.split_end;
  params.window = place.window;
  params.scale = config_.attention_scale;
  params.softcap = config_.attention_softcap;
  if (next >= 0) {
    const AttentionTile& next_tile = plan.tiles[static_cast<size_t>(item_of(next).tile)];
    const AttentionPlan::Range range = plan.positions(item_of(next));
    params.next = {step.batch.block_table(place.group, next_tile.sequence),
                   static_cast<int32_t>(next % config_.num_kv_heads), range.begin, range.end};
  }
  params.m = state_m_.data() + state;
  params.l = state_l_.data() + state;
  params.acc = state_acc_.data() + state * config_.head_dim;
  params.scratch =
      attention_scratch_.data() +
      static_cast<size_t>(thread) * (attention_scratch_.size() / static_cast<size_t>(pool_.size()));
  table_.attention(params);
}

void Decoder::attention_block(StepState& step, int layer, int thread, int& phase) {
  const LayerWeights& w = weights_.layers()[static_cast<size_t>(layer)];
  const LayerConfig& place = config_.layers[static_cast<size_t>(layer)];
  const int64_t hidden = config_.hidden_size;
  const int64_t dim = config_.head_dim;
  const int32_t group = config_.group_size();
  const int64_t base = step.base(thread);
  float* scratch = floats(norm_scratch_) + thread * hidden_stride_;

  const ActKinds qkv_kinds = kinds({&w.q, &w.k, &w.v});
  for_tokens(step, Phase::kNormEncode, thread, step.num_tokens(), phase, [&](int64_t t) {
    float* x = floats(residual_) + (base + t) * hidden;
    if (layer > 0) {
      add_projection(x, floats(projection_) + t * hidden_stride_,
                     weights_.layers()[static_cast<size_t>(layer) - 1].ffn_post_norm, scratch);
    }
    table_.rms_norm(x, w.attn_norm.data(), config_.norm_eps, hidden, hidden_in_.row(base + t));
    hidden_in_.encode(table_, qkv_kinds, base + t, base + t + 1);
  });
  const kernels::Activations qkv_x = hidden_in_.view(base);
  for_units({config_.num_kv_heads + config_.num_heads, 1}, Phase::kQkv, thread, phase,
            [&](int64_t begin, int64_t end) {
              for (int64_t unit = begin; unit < end; ++unit) qkv_unit(step, layer, unit, qkv_x);
            });

  const AttentionPlan& plan =
      plans_[static_cast<size_t>(plan_of_layer_[static_cast<size_t>(layer)])];
  const int64_t num_units = static_cast<int64_t>(plan.items.size()) * config_.num_kv_heads;
  for_units({num_units, 4}, Phase::kAttention, thread, phase, [&](int64_t begin, int64_t end) {
    // Behind its chunk a thread expects the one after those that the other threads now work on.
    const int64_t next_chunk = end + (pool_.size() - 1) * (end - begin);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t next = unit + 1 < end ? unit + 1 : next_chunk;
      attention_unit(step, place, plan, unit, next < num_units ? next : -1, thread);
    }
  });

  const ActKinds out_kinds = kinds({&w.o});
  for_tokens(step, Phase::kMerge, thread, step.num_tokens(), phase, [&](int64_t t) {
    const AttentionTile& tile =
        plan.tiles[static_cast<size_t>(plan.tile_of_token[static_cast<size_t>(t)])];
    for (int64_t head = 0; head < config_.num_kv_heads; ++head) {
      const int64_t state = head * plan.num_states + tile.state + (t - tile.first_token) * group;
      kernels::AttentionFinishParams params;
      params.m = state_m_.data() + state;
      params.l = state_l_.data() + state;
      params.acc = state_acc_.data() + state * dim;
      params.count = tile.num_states;
      params.rows = group;
      params.head_dim = config_.head_dim;
      params.out = attention_in_.row(base + t) + head * group * dim;
      params.out_stride = 0;
      params.group = group;
      table_.attention_finish(params);
    }
    attention_in_.encode(table_, out_kinds, base + t, base + t + 1);
  });
  const kernels::Activations out_x = attention_in_.view(base);
  for_units(units(w.o), Phase::kOutput, thread, phase, [&](int64_t begin, int64_t end) {
    matmul(w.o, begin, end, out_x, step.num_tokens(), floats(projection_), hidden_stride_);
  });
}

void Decoder::feed_forward(StepState& step, int layer, int thread, int& phase) {
  const LayerWeights& w = weights_.layers()[static_cast<size_t>(layer)];
  const int64_t hidden = config_.hidden_size;
  const int64_t base = step.base(thread);
  float* scratch = floats(norm_scratch_) + thread * hidden_stride_;

  const ActKinds in_kinds = kinds({&w.gate, &w.up});
  for_tokens(step, Phase::kNormEncode, thread, step.num_tokens(), phase, [&](int64_t t) {
    float* x = floats(residual_) + (base + t) * hidden;
    add_projection(x, floats(projection_) + t * hidden_stride_, w.attn_post_norm, scratch);
    table_.rms_norm(x, w.ffn_norm.data(), config_.norm_eps, hidden, hidden_in_.row(base + t));
    hidden_in_.encode(table_, in_kinds, base + t, base + t + 1);
  });
  const kernels::Activations in_x = hidden_in_.view(base);
  const auto activate =
      config_.activation == Activation::kSilu ? table_.silu_mul : table_.gelu_tanh_mul;
  for_units(units(w.gate), Phase::kGateUp, thread, phase, [&](int64_t begin, int64_t end) {
    matmul(w.gate, begin, end, in_x, step.num_tokens(), floats(gate_), ffn_stride_);
    matmul(w.up, begin, end, in_x, step.num_tokens(), floats(up_), ffn_stride_);
    const int64_t first = begin * kernels::kRowBlock;
    const int64_t count = (end - begin) * kernels::kRowBlock;
    for (int64_t t = 0; t < step.num_tokens(); ++t) {
      float* gate = floats(gate_) + t * ffn_stride_ + first;
      activate(gate, floats(up_) + t * ffn_stride_ + first, count, gate);
    }
  });

  const ActKinds down_kinds = kinds({&w.down});
  for_tokens(step, Phase::kNormEncode, thread, step.num_tokens(), phase, [&](int64_t t) {
    std::copy_n(floats(gate_) + t * ffn_stride_, config_.intermediate_size, ffn_in_.row(base + t));
    ffn_in_.encode(table_, down_kinds, base + t, base + t + 1);
  });
  const kernels::Activations down_x = ffn_in_.view(base);
  for_units(units(w.down), Phase::kDown, thread, phase, [&](int64_t begin, int64_t end) {
    matmul(w.down, begin, end, down_x, step.num_tokens(), floats(projection_), hidden_stride_);
  });
}

void Decoder::output_head(StepState& step, int thread, int& phase) {
  const int64_t hidden = config_.hidden_size;
  const int64_t base = step.base(thread);
  const int64_t rows = step.batch.num_logit_rows();
  const quant::PackedMatrix& head = weights_.head();
  const ActKinds head_kinds = kinds({&head});
  for_tokens(step, Phase::kNormEncode, thread, rows, phase, [&](int64_t r) {
    const int64_t t = step.batch.logit_rows[static_cast<size_t>(r)];
    float* x = floats(residual_) + (base + t) * hidden;
    add_projection(x, floats(projection_) + t * hidden_stride_,
                   weights_.layers().back().ffn_post_norm,
                   floats(norm_scratch_) + thread * hidden_stride_);
    table_.rms_norm(x, weights_.final_norm().data(), config_.norm_eps, hidden,
                    hidden_in_.row(base + r));
    // In a small step every thread has the row; one of them hands it out.
    if (step.outputs.hidden != nullptr && (!step.small || thread == 0)) {
      std::copy_n(hidden_in_.row(base + r), hidden, step.outputs.hidden + r * hidden);
    }
    hidden_in_.encode(table_, head_kinds, base + r, base + r + 1);
  });
  if (step.sampling.empty() && step.outputs.logits == nullptr) return;
  const Units blocks{head_plan_.num_blocks(), 256};
  for (int64_t first = 0; first < rows; first += kHeadRows) {
    const int64_t count = std::min<int64_t>(kHeadRows, rows - first);
    const kernels::Activations x = hidden_in_.view(base + first);
    for_units(blocks, Phase::kHead, thread, phase, [&](int64_t begin, int64_t end) {
      head_plan_.for_runs(begin, end, [&](int64_t run_begin, int64_t run_end) {
        matmul(head, run_begin, run_end, x, count, floats(logits_), vocab_stride_);
      });
    });
    for_units({count, 1}, Phase::kSample, thread, phase, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        choose(step, first + i, floats(logits_) + i * vocab_stride_,
               sample_scratch_[static_cast<size_t>(thread)]);
      }
    });
  }
}

void Decoder::choose(StepState& step, int64_t row, float* logits, sample::Scratch& scratch) {
  const int64_t vocab = config_.vocab_size;
  int64_t done = 0;  // logits before it are final
  head_plan_.for_runs(0, head_plan_.num_blocks(), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kernels::kRowBlock;
    const int64_t last = std::min(end * kernels::kRowBlock, vocab);
    std::fill(logits + done, logits + first, 0.f);  // not computed, and masked by the sampler
    if (config_.final_softcap > 0.f) {
      table_.softcap(logits + first, config_.final_softcap, last - first);
    }
    done = last;
  });
  std::fill(logits + done, logits + vocab, 0.f);
  if (step.outputs.logits != nullptr) {
    std::copy_n(logits, vocab, step.outputs.logits + row * vocab);
  }
  if (step.sampling.empty()) return;
  sample::Result& result = step.outputs.sampled[static_cast<size_t>(row)];
  try {
    result =
        sample::sample_row(logits, vocab, step.sampling[static_cast<size_t>(row)], table_, scratch);
  } catch (const std::exception& error) {  // this row alone fails
    result = sample::Result{};
    result.error = error.what();
  }
}

}  // namespace sagellm::model
