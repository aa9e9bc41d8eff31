#include "sagellm/cuda/decoder.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "sagellm/base/error.h"
#include "sagellm/base/math.h"
#include "sagellm/kernels/cuda/elementwise.h"

namespace sagellm::cuda {

namespace {

using kernels::cuda::FloatType;
using kernels::cuda::KvType;

constexpr int32_t kHeadRows = 256;  // logit rows per pass over the output head
constexpr size_t kLeastUpload = size_t{1} << 20;

model::ModelConfig validated(model::ModelConfig config) {
  config.validate();
  return config;
}

DecoderOptions validated(DecoderOptions options) {
  require<InvalidArgument>(options.max_batch_tokens >= 1 && options.max_batch_tokens <= (1 << 20),
                           "max_batch_tokens is ", options.max_batch_tokens,
                           "; choose between 1 and 1048576");
  use_device(options.device);
  return options;
}

KvType stored_as(KvType wanted, FloatType type) {
  if (kernels::cuda::kv_has_scales(wanted)) return wanted;
  return type == FloatType::kF16 ? KvType::kF16 : KvType::kBF16;
}

/// Cuts one allocation into arrays.
class Carver {
 public:
  template <typename T>
  void take(T*& array, int64_t count, int64_t element_bytes = sizeof(T)) {
    places_.push_back({reinterpret_cast<void**>(&array), bytes_});
    bytes_ = round_up(bytes_ + count * element_bytes, 256);
  }
  DeviceBuffer allocate() const {
    DeviceBuffer memory(static_cast<size_t>(bytes_));
    for (const auto& [array, offset] : places_) *array = memory.data() + offset;
    return memory;
  }

 private:
  std::vector<std::pair<void**, int64_t>> places_;
  int64_t bytes_ = 0;
};

}  // namespace

size_t Decoder::ShapeHash::operator()(const StepShape& shape) const {
  return static_cast<size_t>(shape.sequences) * 0x9e3779b97f4a7c15u +
         static_cast<size_t>(shape.table_width) * 64 + static_cast<size_t>(shape.wide_kinds);
}

Decoder::Decoder(model::ModelConfig config, const HostTensors& tensors,
                 const DecoderOptions& options)
    : config_(validated(std::move(config))),
      options_(validated(options)),
      device_(device_info(options.device)),
      weights_((check_supported(), config_), tensors, stream_),
      type_(weights_.type()),
      kv_type_(stored_as(options.kv_type, type_)),
      qkv_stride_(int64_t{config_.num_heads + 2 * config_.num_kv_heads} * config_.head_dim),
      vocab_stride_(round_up(config_.vocab_size, 8)),
      head_rows_(std::min(kHeadRows, options.max_batch_tokens)) {
  std::shared_ptr<const CublasLt> library;
  if (options_.use_cublas && !options_.deterministic) {
    library = std::make_shared<CublasLt>(options_.cublas_folders);
  }
  matmul_ = library ? "cuBLASLt " + std::to_string(library->version()) : "own kernels";
  linear_ = std::make_unique<Linear>(
      LinearOptions{.type = type_,
                    .deterministic = options_.deterministic,
                    .max_k = weights_.max_quantized_k(),
                    .max_fp8_k = weights_.max_fp8_k(),
                    .fp8_tensor_cores = 10 * device_.major + device_.minor >= 89,
                    .library = std::move(library)});
  allocate_workspace();
  sampler_ = std::make_unique<Sampler>(config_.vocab_size, vocab_stride_, head_rows_);
}

Decoder::~Decoder() { drain(); }  // nothing may use memory that is freed now

void Decoder::drain() noexcept {
  try {
    stream_.synchronize();
  } catch (...) {  // the device failed: nothing runs any more, and the next call says so
  }
}

void Decoder::check_supported() const {
  const auto multiple_of_8 = [](int64_t value, const char* name) {
    require<Unsupported>(value % 8 == 0, name, " is ", value,
                         "; on a CUDA device it must be a multiple of 8");
  };
  multiple_of_8(config_.hidden_size, "hidden_size");
  multiple_of_8(config_.intermediate_size, "intermediate_size");
  require<Unsupported>(config_.hidden_size <= kernels::cuda::kMaxNormLength, "hidden_size is ",
                       config_.hidden_size, "; on a CUDA device it is at most ",
                       kernels::cuda::kMaxNormLength);
  for (const model::Rope& rope : config_.ropes) {
    multiple_of_8(static_cast<int64_t>(rope.inverse_frequencies.size()),
                  "half of the rotated values of a head");
  }
}

void Decoder::allocate_workspace() {
  const int64_t rows = options_.max_batch_tokens;
  const int64_t hidden = config_.hidden_size;
  const int64_t q_size = int64_t{config_.num_heads} * config_.head_dim;
  Carver carver;
  carver.take(residual_, rows * hidden);
  carver.take(projection_, rows * hidden);
  carver.take(normed_, rows * hidden, 2);
  carver.take(qkv_, rows * qkv_stride_, 2);
  carver.take(q_, rows * q_size, 2);
  carver.take(gate_up_, rows * 2 * config_.intermediate_size, 2);
  carver.take(ffn_, rows * config_.intermediate_size, 2);
  carver.take(logits_, head_rows_ * vocab_stride_);
  cos_.resize(config_.ropes.size());
  sin_.resize(config_.ropes.size());
  std::vector<double> frequencies;
  for (size_t i = 0; i < config_.ropes.size(); ++i) {
    const std::vector<double>& values = config_.ropes[i].inverse_frequencies;
    carver.take(cos_[i], rows * static_cast<int64_t>(values.size()));
    carver.take(sin_[i], rows * static_cast<int64_t>(values.size()));
    rope_offset_.push_back(frequencies.size());
    frequencies.insert(frequencies.end(), values.begin(), values.end());
  }
  workspace_ = carver.allocate();
  rope_frequencies_ = DeviceBuffer(frequencies.size() * sizeof(double));
  copy_to_device(rope_frequencies_.data(), frequencies.data(), rope_frequencies_.size(),
                 stream_.get());
  stream_.synchronize();
}

int64_t Decoder::kv_bytes_per_block(int32_t block_size) const {
  int32_t slots = 0;
  for (const model::LayerConfig& layer : config_.layers) slots = std::max(slots, layer.slot + 1);
  return KvPoolOptions{.block_size = block_size,
                       .num_slots = slots,
                       .num_kv_heads = config_.num_kv_heads,
                       .head_dim = config_.head_dim,
                       .type = kv_type_}
      .block_bytes();
}

void Decoder::allocate_kv(int64_t num_blocks, int32_t block_size) {
  require<InvalidArgument>(kv_ == nullptr, "the KV pages are allocated already");
  select_device(options_.device);
  int32_t slots = 0;
  for (const model::LayerConfig& layer : config_.layers) slots = std::max(slots, layer.slot + 1);
  auto pool = std::make_unique<KvPool>(KvPoolOptions{.num_blocks = num_blocks,
                                                     .block_size = block_size,
                                                     .num_slots = slots,
                                                     .num_kv_heads = config_.num_kv_heads,
                                                     .head_dim = config_.head_dim,
                                                     .type = kv_type_},
                                       stream_);
  make_layer_kinds(block_size);
  reserve_upload(kLeastUpload);
  kv_ = std::move(pool);
}

void Decoder::make_layer_kinds(int32_t block_size) {
  kinds_.clear();
  kind_of_layer_.clear();
  for (const model::LayerConfig& layer : config_.layers) {
    auto kind = std::find_if(kinds_.begin(), kinds_.end(), [&](const LayerKind& k) {
      return k.window == layer.window && k.group == layer.group;
    });
    if (kind == kinds_.end()) {
      PagedAttentionOptions options;
      options.plan.num_heads = config_.num_heads;
      options.plan.num_kv_heads = config_.num_kv_heads;
      options.plan.head_dim = config_.head_dim;
      options.plan.page_size = block_size;
      options.plan.window = layer.window;
      options.plan.deterministic = options_.deterministic;
      options.type = type_;
      options.kv_type = kv_type_;
      options.scale = config_.attention_scale;
      options.softcap = config_.attention_softcap;
      LayerKind& made = kinds_.emplace_back();
      made.window = layer.window;
      made.group = layer.group;
      made.attention = std::make_unique<PagedAttention>(options, device_);
      kind = kinds_.end() - 1;
    }
    kind_of_layer_.push_back(static_cast<int32_t>(kind - kinds_.begin()));
  }
  require<Unsupported>(kinds_.size() <= 64, "the model has ", kinds_.size(),
                       " kinds of attention layers; at most 64 are supported");
}

size_t Decoder::free_bytes() const {
  select_device(options_.device);
  return device_memory().free_bytes;
}

size_t Decoder::workspace_bytes() const {
  return workspace_.size() + upload_.size() + rope_frequencies_.size() + sampler_->bytes() +
         linear_->bytes() + attention_workspace_.bytes();
}

size_t Decoder::num_graphs() const {
  return static_cast<size_t>(std::count_if(graphs_.begin(), graphs_.end(), [](const auto& entry) {
    return static_cast<bool>(entry.second);
  }));
}

void Decoder::launch(const model::ForwardBatch& batch, std::span<const sample::RowParams> sampling,
                     const StepOutputs& outputs) {
  const auto start = std::chrono::steady_clock::now();
  require<InvalidArgument>(kv_ != nullptr, "no KV pages are allocated");
  require<InvalidArgument>(!in_flight_, "the step before this one has not been waited for");
  model::validate(batch, config_,
                  {.max_batch_tokens = options_.max_batch_tokens,
                   .num_blocks = kv_->options().num_blocks,
                   .block_size = kv_->options().block_size});
  require<InvalidArgument>(sampling.empty() || sampling.size() == batch.logit_rows.size(),
                           "sampling has ", sampling.size(), " entries for ",
                           batch.logit_rows.size(), " logit rows");
  require<InvalidArgument>(outputs.sampled.size() == sampling.size(),
                           "sampled and sampling differ in length");
  select_device(options_.device);
  const bool decode = is_decode(batch);
  prepare(batch, sampling, decode);
  outputs_ = outputs;
  num_rows_ = batch.num_logit_rows();
  try {
    copy_to_device(upload_.data(), pinned_.data(), upload_bytes_, stream_.get());
    kv_->copy_blocks(batch.block_copies, stream_);
    if (decode) {
      run_recorded();
    } else {
      forward();
    }
    output(sampling, decode);
  } catch (...) {
    drain();  // what was queued writes to the caller's arrays and reads the upload
    throw;
  }
  in_flight_ = true;
  launch_seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Decoder::wait() {
  require<InvalidArgument>(in_flight_, "no step was launched");
  in_flight_ = false;
  select_device(options_.device);
  stream_.synchronize();
  sampler_->finish(outputs_.sampled);
  outputs_ = {};
}

/// One token of every sequence, and the logits of all: a step whose launches depend on few sizes.
bool Decoder::is_decode(const model::ForwardBatch& batch) const {
  const int32_t tokens = batch.num_tokens();
  return tokens <= std::min(options_.max_graph_sequences, head_rows_) &&
         batch.num_sequences() == tokens && batch.num_logit_rows() == tokens;
}

void Decoder::reserve_upload(size_t bytes) {
  if (pinned_.size() >= bytes) return;
  stream_.synchronize();
  graphs_.clear();  // they read the old upload
  upload_ = DeviceBuffer();
  upload_ = DeviceBuffer(std::max(bytes, 2 * pinned_.size()));
  pinned_ = PinnedBuffer(upload_.size());
}

void Decoder::prepare(const model::ForwardBatch& batch, std::span<const sample::RowParams> sampling,
                      bool decode) {
  const int32_t most = std::min(options_.max_graph_sequences, head_rows_);
  shape_ = {.tokens = batch.num_tokens(),
            .sequences = batch.num_sequences(),
            .logit_rows = batch.num_logit_rows(),
            .table_width = batch.max_blocks};
  if (decode) {
    const int64_t widest = ceil_div(config_.max_position, kv_->options().block_size);
    shape_ = decode_bucket(batch.num_sequences(), batch.max_blocks, most,
                           static_cast<int32_t>(std::max<int64_t>(widest, batch.max_blocks)));
  }
  at_ = step_layout(shape_, batch.num_groups, {});
  reserve_upload(at_.bytes);
  write_inputs(batch);

  const int64_t stride = shape_.table_width;
  const int64_t plane = shape_.sequences * stride;
  std::vector<int64_t> words;
  for (LayerKind& kind : kinds_) {
    AttentionPlanner& planner = kind.attention->planner();
    planner.plan({.query_starts = query_starts_,
                  .positions = {pinned<int32_t>(at_.positions), static_cast<size_t>(shape_.tokens)},
                  .block_tables = {pinned<int32_t>(at_.block_tables) + kind.group * plane,
                                   static_cast<size_t>(plane)},
                  .block_tables_stride = stride});
    kind.capacity = planner.required();
    if (decode) {
      const bool wide = kind.capacity.wide_items > 0;
      kind.capacity =
          planner.capacity(shape_.sequences, shape_.tokens, 1, stride * kv_->options().block_size);
      if (!wide) kind.capacity.wide_items = 0;  // one launch less in every layer
      shape_.wide_kinds |= uint64_t{wide} << words.size();
    }
    words.push_back(planner.upload_layout(kind.capacity).words);
    const float* before = attention_workspace_.accumulators();
    const int32_t* arrivals = attention_workspace_.arrivals();
    attention_workspace_.reserve(planner, kind.capacity, stream_.get());
    if (before != attention_workspace_.accumulators() ||
        arrivals != attention_workspace_.arrivals()) {
      graphs_.clear();  // they use the old workspace
    }
  }
  at_ = step_layout(shape_, batch.num_groups, words);
  upload_bytes_ = at_.bytes + sampler_->measure(sampling, stream_);
  if (pinned_.size() < upload_bytes_) {
    reserve_upload(upload_bytes_);
    write_inputs(batch);
  }
  sampler_->write(sampling, pinned_.data() + at_.bytes, upload_.data() + at_.bytes);
  for (size_t i = 0; i < kinds_.size(); ++i) {
    kinds_[i].attention->planner().write_upload(
        kinds_[i].capacity, {pinned<int32_t>(at_.plans[i]), static_cast<size_t>(words[i])});
  }
}

/// Padding: token 0 at position 0 of a sequence of its own, whose blocks are block 0, not stored.
void Decoder::write_inputs(const model::ForwardBatch& batch) {
  const int32_t block_size = kv_->options().block_size;
  const auto copy_padded = [&](size_t offset, std::span<const int32_t> values, int32_t count) {
    int32_t* to = pinned<int32_t>(offset);
    std::copy(values.begin(), values.end(), to);
    std::fill(to + values.size(), to + count, 0);
  };
  copy_padded(at_.token_ids, batch.token_ids, shape_.tokens);
  copy_padded(at_.positions, batch.positions, shape_.tokens);
  copy_padded(at_.logit_rows, batch.logit_rows, shape_.logit_rows);
  query_starts_.assign(batch.query_starts.begin(), batch.query_starts.end());
  while (static_cast<int32_t>(query_starts_.size()) <= shape_.sequences) {
    query_starts_.push_back(query_starts_.back() + 1);
  }
  int32_t* row = pinned<int32_t>(at_.block_tables);
  int32_t* slots = pinned<int32_t>(at_.slots);
  for (int32_t g = 0; g < batch.num_groups; ++g) {
    for (int32_t s = 0; s < shape_.sequences; ++s, row += shape_.table_width) {
      const bool real = s < batch.num_sequences();
      const int32_t width = real ? batch.max_blocks : 0;
      if (real) std::copy_n(batch.block_table(g, s), width, row);
      std::fill(row + width, row + shape_.table_width, 0);
      const int32_t end = query_starts_[static_cast<size_t>(s) + 1];
      for (int32_t t = query_starts_[static_cast<size_t>(s)]; t < end; ++t) {
        const int32_t p = real ? batch.positions[static_cast<size_t>(t)] : 0;
        *slots++ = real ? row[p / block_size] * block_size + p % block_size : -1;
      }
    }
  }
}

void Decoder::run_recorded() {
  const auto work = [this] {
    forward();
    head(0, shape_.logit_rows);
  };
  const auto [entry, is_new] = graphs_.try_emplace(shape_);
  if (is_new) {  // once without recording: libraries prepare themselves for a shape
    work();
    return;
  }
  if (!entry->second) entry->second = Graph(stream_, work);
  entry->second.launch(stream_);
  ++graph_replays_;
}

void Decoder::forward() {
  embed();
  for (size_t i = 0; i < config_.ropes.size(); ++i) {
    kernels::cuda::RopeTableParams rope;
    rope.positions = uploaded<int32_t>(at_.positions);
    rope.frequencies = rope_frequencies_.as<double>() + rope_offset_[i];
    rope.cos = cos_[i];
    rope.sin = sin_[i];
    rope.num_tokens = shape_.tokens;
    rope.half = static_cast<int32_t>(config_.ropes[i].inverse_frequencies.size());
    rope.factor = config_.ropes[i].attention_factor;
    kernels::cuda::rope_table(rope, stream_.get());
  }
  for (size_t i = 0; i < weights_.layers().size(); ++i) layer(i);
  if (shape_.logit_rows > 0) {
    normalize(weights_.final_norm(), weights_.layers().back().ffn_post_norm, projection_,
              uploaded<int32_t>(at_.logit_rows), shape_.logit_rows);
  }
}

void Decoder::embed() {
  const WeightPart& table = weights_.embedding();
  if (table.is_quantized) {
    kernels::cuda::QuantizedEmbeddingParams p;
    p.weights = table.quantized;
    p.token_ids = uploaded<int32_t>(at_.token_ids);
    p.out = residual_;
    p.out_stride = config_.hidden_size;
    p.num_tokens = shape_.tokens;
    p.scale = config_.embedding_scale;
    kernels::cuda::quantized_embedding(p, stream_.get());
    return;
  }
  kernels::cuda::EmbeddingParams p;
  p.table = table.dense;
  p.table_stride = config_.hidden_size;
  p.token_ids = uploaded<int32_t>(at_.token_ids);
  p.out = residual_;
  p.out_stride = config_.hidden_size;
  p.num_tokens = shape_.tokens;
  p.n = config_.hidden_size;
  p.scale = config_.embedding_scale;
  kernels::cuda::embedding(type_, p, stream_.get());
}

void Decoder::layer(size_t index) {
  const DeviceLayer& w = weights_.layers()[index];
  const int32_t tokens = shape_.tokens;
  const int64_t hidden = config_.hidden_size;
  const int64_t ffn = config_.intermediate_size;
  const int64_t q_size = int64_t{config_.num_heads} * config_.head_dim;
  void* stream = stream_.get();
  const bool first = index == 0;
  normalize(w.attn_norm, first ? nullptr : weights_.layers()[index - 1].ffn_post_norm,
            first ? nullptr : projection_, nullptr, tokens);
  (*linear_)(w.qkv, {normed_, hidden, tokens, qkv_, qkv_stride_, type_}, stream);
  finish_qkv(index);
  attend(index);
  (*linear_)(w.o, {qkv_, q_size, tokens, projection_, hidden, FloatType::kF32}, stream);
  normalize(w.ffn_norm, w.attn_post_norm, projection_, nullptr, tokens);
  (*linear_)(w.gate_up, {normed_, hidden, tokens, gate_up_, 2 * ffn, type_}, stream);
  kernels::cuda::GatedParams gate;
  gate.x = gate_up_;
  gate.x_stride = 2 * ffn;
  gate.out = ffn_;
  gate.out_stride = ffn;
  gate.num_rows = tokens;
  gate.n = static_cast<int32_t>(ffn);
  gate.function = config_.activation == model::Activation::kSilu
                      ? kernels::cuda::GateFunction::kSilu
                      : kernels::cuda::GateFunction::kGeluTanh;
  kernels::cuda::gated_activation(type_, type_, gate, stream);
  (*linear_)(w.down, {ffn_, ffn, tokens, projection_, hidden, FloatType::kF32}, stream);
}

void Decoder::finish_qkv(size_t index) {
  const DeviceLayer& w = weights_.layers()[index];
  const model::LayerConfig& place = config_.layers[index];
  const auto rope = static_cast<size_t>(place.rope);
  kernels::cuda::QkvParams p;
  p.qkv = qkv_;
  p.stride = qkv_stride_;
  p.bias = w.qkv_bias;
  p.q_norm = w.q_norm;
  p.k_norm = w.k_norm;
  p.eps = config_.norm_eps;
  p.cos = cos_[rope];
  p.sin = sin_[rope];
  p.half = static_cast<int32_t>(config_.ropes[rope].inverse_frequencies.size());
  p.num_tokens = shape_.tokens;
  p.num_heads = config_.num_heads;
  p.q_type = type_;
  p.q = q_;
  p.q_stride = int64_t{config_.num_heads} * config_.head_dim;
  p.kv = kv_->pages(place.slot);
  p.slots = uploaded<int32_t>(at_.slots) + int64_t{place.group} * shape_.tokens;
  kernels::cuda::finish_qkv(type_, p, stream_.get());
}

/// From q_ and the pages to qkv_, whose content is in both by now.
void Decoder::attend(size_t index) {
  const model::LayerConfig& place = config_.layers[index];
  const auto kind = static_cast<size_t>(kind_of_layer_[index]);
  const kernels::cuda::KvPages pages = kv_->pages(place.slot);
  AttentionStep step;
  step.q = q_;
  step.out = qkv_;
  step.q_stride = step.out_stride = int64_t{config_.num_heads} * config_.head_dim;
  step.pool = pages.pool;
  step.block_stride = pages.block_stride;
  step.block_tables = uploaded<int32_t>(at_.block_tables) +
                      int64_t{place.group} * shape_.sequences * shape_.table_width;
  step.block_tables_stride = shape_.table_width;
  step.positions = uploaded<int32_t>(at_.positions);
  step.upload = uploaded<int32_t>(at_.plans[kind]);
  kinds_[kind].attention->run(step, kinds_[kind].capacity, attention_workspace_, stream_.get());
}

void Decoder::normalize(const float* weight, const float* post_norm, const float* delta,
                        const int32_t* rows, int32_t num_rows) {
  kernels::cuda::AddRmsNormParams p;
  p.residual = residual_;
  p.residual_stride = p.delta_stride = p.out_stride = config_.hidden_size;
  p.delta = delta;
  p.post_norm = delta != nullptr ? post_norm : nullptr;
  p.weight = weight;
  p.rows = rows;
  p.out = normed_;
  p.num_rows = num_rows;
  p.n = config_.hidden_size;
  p.eps = config_.norm_eps;
  kernels::cuda::add_rms_norm(FloatType::kF32, type_, p, stream_.get());
}

/// Logits of the rows [first, first + count) of normed_.
void Decoder::head(int32_t first, int32_t count) {
  const int64_t hidden = config_.hidden_size;
  const std::byte* x = normed_ + first * hidden * float_type_bytes(type_);
  (*linear_)(weights_.head(), {x, hidden, count, logits_, vocab_stride_, FloatType::kF32},
             stream_.get());
  if (config_.final_softcap > 0.f) {
    kernels::cuda::softcap({logits_, count * vocab_stride_, config_.final_softcap}, stream_.get());
  }
}

void Decoder::output(std::span<const sample::RowParams> sampling, bool decode) {
  if (num_rows_ == 0) return;
  if (outputs_.hidden != nullptr) {  // projection_ has served
    const int64_t count = int64_t{num_rows_} * config_.hidden_size;
    kernels::cuda::convert(type_, FloatType::kF32, {normed_, projection_, count}, stream_.get());
    copy_to_host(outputs_.hidden, projection_, static_cast<size_t>(count) * sizeof(float),
                 stream_.get());
  }
  if (sampling.empty() && outputs_.logits == nullptr) return;
  for (int32_t first = 0; first < num_rows_; first += head_rows_) {
    const int32_t count = std::min(head_rows_, num_rows_ - first);
    if (!decode) head(first, count);  // a decode step has done it
    if (outputs_.logits != nullptr) {
      copy_rows_to_host(outputs_.logits + int64_t{first} * config_.vocab_size, config_.vocab_size,
                        logits_, vocab_stride_, count, stream_.get());
    }
    if (!sampling.empty()) sampler_->run(logits_, first, count, stream_);
  }
}

}  // namespace sagellm::cuda
