#include "sagellm/model/encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "sagellm/base/dtype.h"
#include "sagellm/base/error.h"
#include "sagellm/base/math.h"
#include "sagellm/kernels/cpu/dispatch.h"
#include "sagellm/quant/codec.h"

namespace sagellm::model {

namespace {

constexpr int64_t kQueryTile = 48;  // queries that share one pass over a head's keys and values
constexpr int64_t kTokenTile = 48;  // tokens of a tile are a multiple of this, but for the last
constexpr int64_t kTileBytes = int64_t{256} << 10;  // activations kept in the L2 cache
constexpr float kMinLength = 1e-12f;
constexpr int kPhasesPerLayer = 10;

const kernels::KernelTable& select_table(const std::string& isa) {
  return isa.empty() ? kernels::kernel_table() : kernels::kernel_table(isa);
}

EncoderConfig validated(EncoderConfig config) {
  config.validate();
  return config;
}

EncoderOptions validated(EncoderOptions options) {
  require<InvalidArgument>(options.max_batch_tokens >= 1 && options.max_batch_tokens <= (1 << 20),
                           "max_batch_tokens is ", options.max_batch_tokens,
                           "; choose between 1 and 1048576");
  return options;
}

Buffer float_buffer(int64_t rows, int64_t stride) {
  return Buffer(static_cast<size_t>(rows * stride) * sizeof(float));
}

float* floats(Buffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

}  // namespace

void EncoderConfig::validate() const {
  const auto positive = [](int32_t value, const char* field) {
    require<InvalidArgument>(value > 0, field, " is ", value, ", must be positive");
  };
  positive(vocab_size, "vocab_size");
  positive(hidden_size, "hidden_size");
  positive(intermediate_size, "intermediate_size");
  positive(num_layers, "num_layers");
  positive(num_heads, "num_heads");
  positive(num_positions, "num_positions");
  positive(num_token_types, "num_token_types");
  require<InvalidArgument>(position_offset >= 0 && position_offset < num_positions,
                           "position_offset ", position_offset, " is outside the ", num_positions,
                           " positions");
  require<InvalidArgument>(std::isfinite(norm_eps) && norm_eps >= 0.f, "norm_eps is ", norm_eps);
  require<InvalidArgument>(hidden_size % num_heads == 0, "hidden_size ", hidden_size,
                           " is not a multiple of ", num_heads, " heads");
  require<Unsupported>(
      hidden_size % kernels::kRowBlock == 0 && intermediate_size % kernels::kRowBlock == 0,
      "the native encoder needs sizes that are multiples of ", kernels::kRowBlock, ", not ",
      hidden_size, " and ", intermediate_size, "; use device 'reference'");
}

// ---- weights ------------------------------------------------------------------------------------

/// Reads and packs tensors, checking every shape.
class Encoder::Loader {
 public:
  explicit Loader(const TensorSources& sources) : sources_(sources) {}

  Table table(const std::string& name, int64_t rows, int64_t columns) const {
    const TensorSource& source = find(name);
    return {source.file, &tensor(name, {rows, columns})};
  }

  std::vector<float> values(const std::string& name, std::vector<int64_t> shape) const {
    const checkpoint::TensorInfo& info = tensor(name, shape);
    int64_t count = 1;
    for (const int64_t extent : shape) count *= extent;
    std::vector<float> out(static_cast<size_t>(count));
    quant::dequantize_row(info.format, info.data, out.data(), count);
    return out;
  }

  Norm norm(const std::string& name, int64_t n) const {
    return {values(name, {n}), values(name + "_bias", {n})};
  }

  /// The matrices `names` [n, k], stacked by rows.
  Linear linear(const std::vector<std::string>& names, int64_t n, int64_t k) const {
    const checkpoint::TensorInfo& first = tensor(names.front(), {n, k});
    const auto stride = static_cast<size_t>(row_bytes(first.format, k));
    const int64_t rows = n * static_cast<int64_t>(names.size());
    Linear out;
    std::vector<uint8_t> stacked;
    for (const std::string& name : names) {
      const checkpoint::TensorInfo& info = tensor(name, {n, k});
      require<Unsupported>(info.format == first.format, "tensors '", find(names.front()).tensor,
                           "' and '", info.name, "' are stored in different formats");
      if (names.size() > 1) stacked.insert(stacked.end(), info.data, info.data + info.nbytes);
      const std::vector<float> bias = values(name + "_bias", {n});
      out.bias.insert(out.bias.end(), bias.begin(), bias.end());
    }
    out.matrix = quant::make_packed(first.format, rows, k);
    quant::pack_row_blocks(first.format, stacked.empty() ? first.data : stacked.data(), stride, {},
                           out.matrix, 0, out.matrix.num_row_blocks());
    for (const std::string& name : names) {  // the packed copy replaces these bytes
      const TensorSource& source = find(name);
      const checkpoint::TensorInfo& info = source.file->tensor(source.tensor);
      source.file->forget(info.data, info.nbytes);
    }
    return out;
  }

 private:
  const TensorSource& find(const std::string& name) const {
    const auto it = sources_.find(name);
    require<CorruptFile>(it != sources_.end(), "the checkpoint has no tensor for '", name, "'");
    return it->second;
  }

  const checkpoint::TensorInfo& tensor(const std::string& name,
                                       const std::vector<int64_t>& shape) const {
    const TensorSource& source = find(name);
    const checkpoint::TensorInfo& info = source.file->tensor(source.tensor);
    require<CorruptFile>(info.shape == shape, "tensor '", source.tensor, "' (", name,
                         ") does not have the shape that the configuration asks for");
    require<Unsupported>(
        info.format == Format::kF32 || info.format == Format::kF16 || info.format == Format::kBF16,
        "tensor '", source.tensor, "' is stored as ", format_info(info.format).name,
        "; encoders are read from F32, F16 and BF16");
    return info;
  }

  const TensorSources& sources_;
};

/// What one thread needs to attend: one head of one sequence, packed for the matmul kernel.
class Encoder::Scratch {
 public:
  Scratch(int64_t max_length, int64_t head_dim)
      : columns_(round_up(head_dim, kernels::kRowBlock)),
        keys_(float_buffer(round_up(max_length, kernels::kRowBlock), head_dim)),
        values_(float_buffer(round_up(max_length, kernels::kRowBlock), columns_)),
        queries_(float_buffer(kQueryTile, head_dim)),
        scores_(float_buffer(kQueryTile, round_up(max_length, kernels::kRowBlock))),
        out_(float_buffer(kQueryTile, columns_)) {}

  int64_t columns() const { return columns_; }
  float* keys() { return floats(keys_); }
  float* values() { return floats(values_); }
  float* queries() { return floats(queries_); }
  float* scores() { return floats(scores_); }
  float* out() { return floats(out_); }
  size_t bytes() const {
    return keys_.size() + values_.size() + queries_.size() + scores_.size() + out_.size();
  }

 private:
  int64_t columns_;  // head_dim, padded to whole row blocks
  Buffer keys_, values_, queries_, scores_, out_;
};

Encoder::Encoder(EncoderConfig config, const TensorSources& sources, const EncoderOptions& options)
    : config_(validated(config)),
      options_(validated(options)),
      table_(select_table(options.isa)),
      pool_(options.num_threads),
      queue_(kPhasesPerLayer * config_.num_layers + 2),
      layers_(static_cast<size_t>(config_.num_layers)),
      hidden_(0, 0, Precision::kA8, {}),
      context_(0, 0, Precision::kA8, {}),
      ffn_(0, 0, Precision::kA8, {}),
      qkv_(float_buffer(options.max_batch_tokens, int64_t{3} * config_.hidden_size)),
      projection_(float_buffer(options.max_batch_tokens, config_.hidden_size)) {
  const Loader loader(sources);
  const int64_t hidden = config_.hidden_size;
  const int64_t inner = config_.intermediate_size;
  words_ = loader.table("embed.word", config_.vocab_size, hidden);
  positions_ = loader.values("embed.position", {config_.num_positions, hidden});
  types_ = loader.values("embed.type", {config_.num_token_types, hidden});
  embedding_norm_ = loader.norm("embed.norm", hidden);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const std::string at = "layers." + std::to_string(i) + ".";
    Layer& layer = layers_[i];
    layer.qkv = loader.linear({at + "q", at + "k", at + "v"}, hidden, hidden);
    layer.output = loader.linear({at + "o"}, hidden, hidden);
    layer.attention_norm = loader.norm(at + "attn_norm", hidden);
    layer.up = loader.linear({at + "up"}, inner, hidden);
    layer.down = loader.linear({at + "down"}, hidden, inner);
    layer.ffn_norm = loader.norm(at + "ffn_norm", hidden);
    for (const Linear* linear : {&layer.qkv, &layer.output, &layer.up, &layer.down})
      weight_bytes_ += linear->matrix.bytes();
  }
  if (config_.has_head) {
    head_dense_ = loader.linear({"head.dense"}, hidden, hidden);
    head_out_ = loader.values("head.out", {1, hidden});
    head_out_bias_ = loader.values("head.out_bias", {1});
    weight_bytes_ += head_dense_.matrix.bytes();
  }
  weight_bytes_ += (positions_.size() + types_.size()) * sizeof(float) + words_.info->nbytes;

  const int64_t rows = options_.max_batch_tokens;
  kinds_ = all_kinds();
  hidden_ = ActivationBuffer(rows, hidden, Precision::kA8, kinds_);
  context_ = ActivationBuffer(rows, hidden, Precision::kA8, kinds_);
  ffn_ = ActivationBuffer(rows, inner, Precision::kA8, kinds_);
  const int64_t longest = std::min<int64_t>(rows, config_.max_tokens());
  for (int32_t i = 0; i < options_.num_threads; ++i)
    scratch_.emplace_back(longest, config_.head_dim());
}

Encoder::~Encoder() = default;

size_t Encoder::workspace_bytes() const {
  size_t total =
      hidden_.bytes() + context_.bytes() + ffn_.bytes() + qkv_.size() + projection_.size();
  for (const Scratch& scratch : scratch_) total += scratch.bytes();
  return total;
}

ActKinds Encoder::all_kinds() const {
  ActKinds kinds;
  const auto add = [&](const Linear& linear) {
    kinds.add(table_.act_kind[static_cast<size_t>(linear.matrix.format)]);
  };
  for (const Layer& layer : layers_) {
    for (const Linear* linear : {&layer.qkv, &layer.output, &layer.up, &layer.down}) add(*linear);
  }
  if (config_.has_head) add(head_dense_);
  return kinds;
}

// ---- one batch ----------------------------------------------------------------------------------

void Encoder::validate(const EncoderBatch& batch, const EncoderOutputs& outputs) const {
  const int64_t tokens = batch.num_tokens();
  require<InvalidArgument>(tokens >= 1 && tokens <= options_.max_batch_tokens, "a batch of ",
                           tokens, " tokens; max_batch_tokens is ", options_.max_batch_tokens);
  require<InvalidArgument>(batch.token_types.size() == batch.token_ids.size(),
                           "token_types and token_ids differ in length");
  require<InvalidArgument>(batch.query_starts.size() >= 2 && batch.query_starts.front() == 0 &&
                               batch.query_starts.back() == tokens,
                           "query_starts must run from 0 to the number of tokens");
  for (int64_t s = 0; s < batch.num_sequences(); ++s) {
    const auto at = static_cast<size_t>(s);
    const int64_t length = int64_t{batch.query_starts[at + 1]} - batch.query_starts[at];
    require<InvalidArgument>(length >= 1, "sequence ", s, " has no token");
    require<InvalidArgument>(length <= config_.max_tokens(), "sequence ", s, " has ", length,
                             " tokens; the model takes ", config_.max_tokens());
  }
  for (size_t t = 0; t < batch.token_ids.size(); ++t) {
    const int32_t id = batch.token_ids[t];
    const int32_t type = batch.token_types[t];
    require<InvalidArgument>(id >= 0 && id < config_.vocab_size, "token id ", id,
                             " is outside the vocabulary of ", config_.vocab_size);
    require<InvalidArgument>(type >= 0 && type < config_.num_token_types, "token type ", type,
                             " is outside the ", config_.num_token_types, " of the model");
  }
  require<Unsupported>(outputs.scores == nullptr || config_.has_head,
                       "this model has no cross-encoder head");
}

void Encoder::run(const EncoderBatch& batch, const EncoderOutputs& outputs) {
  validate(batch, outputs);
  queue_.reset();
  pool_.run([&](int thread) { forward(batch, thread); });
  if (outputs.hidden != nullptr)
    std::copy_n(hidden_.row(0), batch.num_tokens() * config_.hidden_size, outputs.hidden);
  for (int64_t s = 0; s < batch.num_sequences(); ++s) {
    if (outputs.pooled != nullptr) pool(batch, outputs, s);
  }
  if (outputs.scores != nullptr) score(batch, outputs.scores);
}

void Encoder::forward(const EncoderBatch& batch, int thread) {
  int phase = 0;
  const int64_t tokens = batch.num_tokens();
  embed(batch, thread, phase);
  for (const Layer& layer : layers_) {
    const auto add_bias = [&](const Linear& linear) {
      return [this, bias = linear.bias.data()](float* row, int64_t column, int64_t count) {
        table_.add(row + column, bias + column, count, row + column);
      };
    };
    project(layer.qkv, hidden_, floats(qkv_), tokens, thread, phase, add_bias(layer.qkv));
    attend(batch, thread, phase);
    encode_rows(context_, tokens, thread, phase);
    float* projection = floats(projection_);
    project(layer.output, context_, projection, tokens, thread, phase, add_bias(layer.output));
    add_and_norm(layer.attention_norm, tokens, thread, phase);
    project(layer.up, hidden_, ffn_.row(0), tokens, thread, phase,
            [&](float* row, int64_t column, int64_t count) {
              table_.bias_gelu(row + column, layer.up.bias.data() + column, count, row + column);
            });
    encode_rows(ffn_, tokens, thread, phase);
    project(layer.down, ffn_, projection, tokens, thread, phase, add_bias(layer.down));
    add_and_norm(layer.ffn_norm, tokens, thread, phase);
  }
}

void Encoder::embed(const EncoderBatch& batch, int thread, int& phase) {
  const int64_t n = config_.hidden_size;
  const size_t row_size = words_.info->nbytes / static_cast<size_t>(config_.vocab_size);
  const auto sequences = static_cast<int64_t>(batch.num_sequences());
  queue_.for_each(phase++, thread, pool_.size(), sequences, 1, [&](int64_t begin, int64_t) {
    const int32_t first = batch.query_starts[static_cast<size_t>(begin)];
    const int32_t end = batch.query_starts[static_cast<size_t>(begin) + 1];
    for (int32_t t = first; t < end; ++t) {
      const auto id = static_cast<size_t>(batch.token_ids[static_cast<size_t>(t)]);
      const int64_t type = batch.token_types[static_cast<size_t>(t)];
      const int64_t position = config_.position_offset + t - first;
      float* row = hidden_.row(t);
      quant::dequantize_row(words_.info->format, words_.info->data + id * row_size, row, n);
      table_.add(row, types_.data() + type * n, n, row);
      table_.add(row, positions_.data() + position * n, n, row);
      table_.layer_norm(row, embedding_norm_.weight.data(), embedding_norm_.bias.data(),
                        config_.norm_eps, n, row);
      hidden_.encode(table_, kinds_, t, t + 1);
    }
  });
  pool_.barrier();
}

template <typename Finish>
void Encoder::project(const Linear& linear, const ActivationBuffer& x, float* out,
                      int64_t num_tokens, int thread, int& phase, const Finish& finish) {
  const quant::PackedMatrix& matrix = linear.matrix;
  const int64_t blocks = matrix.num_row_blocks();
  const int64_t per_tile =
      std::max<int64_t>(1, kTileBytes / (4 * matrix.k) / kTokenTile) * kTokenTile;
  const int64_t token_tiles = ceil_div(num_tokens, per_tile);
  // Few tokens: threads share the row blocks, so that each reads its part of the weights only.
  const int64_t parts =
      std::clamp<int64_t>(ceil_div(int64_t{4} * pool_.size(), token_tiles), 1, blocks);
  const int64_t blocks_per_part = ceil_div(blocks, parts);
  const int64_t block_tiles = ceil_div(blocks, blocks_per_part);
  queue_.for_each(
      phase++, thread, pool_.size(), token_tiles * block_tiles, 1, [&](int64_t unit, int64_t) {
        const int64_t first = unit / block_tiles * per_tile;
        const int64_t block = unit % block_tiles * blocks_per_part;
        kernels::MatmulParams p;
        p.format = matrix.format;
        p.weights = matrix.storage.data();
        p.k = matrix.k;
        p.row_block_begin = static_cast<int32_t>(block);
        p.row_block_end = static_cast<int32_t>(std::min(block + blocks_per_part, blocks));
        p.num_tokens = static_cast<int32_t>(std::min(per_tile, num_tokens - first));
        p.x = x.view(first);
        p.out = out + first * matrix.n;
        p.out_stride = matrix.n;
        table_.matmul(p);
        const int64_t column = block * kernels::kRowBlock;
        const int64_t count = int64_t{p.row_block_end} * kernels::kRowBlock - column;
        for (int64_t t = 0; t < p.num_tokens; ++t) finish(p.out + t * matrix.n, column, count);
      });
  pool_.barrier();
}

void Encoder::encode_rows(ActivationBuffer& x, int64_t num_tokens, int thread, int& phase) {
  if (!kinds_.bf16) return;  // float32 kernels read the rows as they are
  queue_.for_each(phase++, thread, pool_.size(), num_tokens, 16,
                  [&](int64_t begin, int64_t end) { x.encode(table_, kinds_, begin, end); });
  pool_.barrier();
}

void Encoder::add_and_norm(const Norm& norm, int64_t num_tokens, int thread, int& phase) {
  const int64_t n = config_.hidden_size;
  queue_.for_each(phase++, thread, pool_.size(), num_tokens, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* row = hidden_.row(t);
      table_.add(row, floats(projection_) + t * n, n, row);
      table_.layer_norm(row, norm.weight.data(), norm.bias.data(), config_.norm_eps, n, row);
    }
    hidden_.encode(table_, kinds_, begin, end);
  });
  pool_.barrier();
}

void Encoder::attend(const EncoderBatch& batch, int thread, int& phase) {
  const int64_t heads = config_.num_heads;
  const int64_t total = batch.num_sequences() * heads;
  queue_.for_each(phase++, thread, pool_.size(), total, heads, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto s = static_cast<size_t>(unit / heads);
      const int64_t first = batch.query_starts[s];
      attend_head(first, batch.query_starts[s + 1] - first, unit % heads,
                  scratch_[static_cast<size_t>(thread)]);
    }
  });
  pool_.barrier();
}

/// softmax(Q K^T / sqrt(d)) V for one head of the tokens [first, first + length).
void Encoder::attend_head(int64_t first, int64_t length, int64_t head, Scratch& scratch) {
  constexpr int64_t kLane = kernels::kRowBlock;
  const int64_t n = config_.hidden_size;
  const int64_t d = config_.head_dim();
  const int64_t padded = round_up(length, kLane);  // keys; those added weigh exactly 0
  const float* q = floats(qkv_) + first * 3 * n + head * d;
  const float* k = q + n;
  const float* v = k + n;
  for (int64_t key = 0; key < padded; ++key) {
    float* keys = scratch.keys() + key / kLane * kLane * d + key % kLane;  // [block][d][16 keys]
    for (int64_t i = 0; i < d; ++i) keys[i * kLane] = key < length ? k[key * 3 * n + i] : 0.f;
    for (int64_t i = 0; i < scratch.columns(); i += kLane) {
      float* values = scratch.values() + i * padded + key * kLane;  // [block of columns][key][16]
      const int64_t count = key < length ? std::min(kLane, d - i) : 0;
      std::copy_n(v + key * 3 * n + i, count, values);
      std::fill_n(values + count, kLane - count, 0.f);
    }
  }
  const float scale = 1.f / std::sqrt(static_cast<float>(d));
  kernels::MatmulParams scores;
  scores.weights = scratch.keys();
  scores.k = d;
  scores.row_block_end = static_cast<int32_t>(padded / kLane);
  scores.x.f32 = scratch.queries();
  scores.out = scratch.scores();
  scores.out_stride = padded;
  kernels::MatmulParams mix;
  mix.weights = scratch.values();
  mix.k = padded;
  mix.row_block_end = static_cast<int32_t>(scratch.columns() / kLane);
  mix.x.f32 = scratch.scores();
  mix.out = scratch.out();
  mix.out_stride = scratch.columns();
  for (int64_t begin = 0; begin < length; begin += kQueryTile) {
    const int64_t rows = std::min(kQueryTile, length - begin);
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(q + (begin + r) * 3 * n, d, scratch.queries() + r * d);
    table_.scale(scratch.queries(), scale, rows * d);
    scores.num_tokens = mix.num_tokens = static_cast<int32_t>(rows);
    table_.matmul(scores);
    for (int64_t r = 0; r < rows; ++r) {
      table_.softmax(scores.out + r * padded, length);
      std::fill_n(scores.out + r * padded + length, padded - length, 0.f);
    }
    table_.matmul(mix);
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(mix.out + r * mix.out_stride, d, context_.row(first + begin + r) + head * d);
  }
}

void Encoder::pool(const EncoderBatch& batch, const EncoderOutputs& outputs,
                   int64_t sequence) const {
  const int64_t n = config_.hidden_size;
  const int64_t first = batch.query_starts[static_cast<size_t>(sequence)];
  const int64_t end = batch.query_starts[static_cast<size_t>(sequence) + 1];
  float* out = outputs.pooled + sequence * n;
  std::copy_n(hidden_.row(first), n, out);
  if (outputs.pooling == Pooling::kMean) {
    for (int64_t t = first + 1; t < end; ++t) table_.add(out, hidden_.row(t), n, out);
    table_.scale(out, 1.f / static_cast<float>(end - first), n);
  }
  if (!outputs.normalize) return;
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += double{out[i]} * double{out[i]};
  const auto length = std::max(static_cast<float>(std::sqrt(squares)), kMinLength);
  table_.scale(out, 1.f / length, n);
}

void Encoder::score(const EncoderBatch& batch, float* scores) {
  const int64_t n = config_.hidden_size;
  const int64_t sequences = batch.num_sequences();
  for (int64_t s = 0; s < sequences; ++s)
    std::copy_n(hidden_.row(batch.query_starts[static_cast<size_t>(s)]), n, context_.row(s));
  context_.encode(table_, kinds_, 0, sequences);
  kernels::MatmulParams p;
  p.format = head_dense_.matrix.format;
  p.weights = head_dense_.matrix.storage.data();
  p.k = n;
  p.row_block_end = static_cast<int32_t>(head_dense_.matrix.num_row_blocks());
  p.num_tokens = static_cast<int32_t>(sequences);
  p.x = context_.view(0);
  p.out = floats(projection_);
  p.out_stride = n;
  table_.matmul(p);
  for (int64_t s = 0; s < sequences; ++s) {
    double sum = head_out_bias_.front();
    for (int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<size_t>(i);
      sum += std::tanh(double{p.out[s * n + i]} + double{head_dense_.bias[at]}) *
             double{head_out_[at]};
    }
    scores[s] = static_cast<float>(sum);
  }
}

}  // namespace sagellm::model
