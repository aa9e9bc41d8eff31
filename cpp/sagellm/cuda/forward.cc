#include "sagellm/cuda/forward.h"

#include <utility>

#include "sagellm/base/math.h"
#include "sagellm/kernels/cuda/elementwise.h"

namespace sagellm::cuda {

namespace {

using kernels::cuda::FloatType;

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

ForwardPass::ForwardPass(const model::ModelConfig& config, const DeviceWeights& weights,
                         Linear& linear, const Stream& stream, int32_t max_tokens,
                         int32_t head_rows)
    : config_(config),
      weights_(weights),
      linear_(linear),
      stream_(stream),
      type_(weights.type()),
      head_rows_(head_rows),
      q_size_(int64_t{config.num_heads} * config.head_dim),
      qkv_stride_(int64_t{config.num_heads + 2 * config.num_kv_heads} * config.head_dim),
      vocab_stride_(round_up(config.vocab_size, 8)) {
  allocate(max_tokens);
}

void ForwardPass::allocate(int64_t rows) {
  const int64_t hidden = config_.hidden_size;
  Carver carver;
  carver.take(residual_, rows * hidden);
  carver.take(projection_, rows * hidden);
  carver.take(normed_, rows * hidden, 2);
  carver.take(qkv_, rows * qkv_stride_, 2);
  carver.take(q_, rows * q_size_, 2);
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

void ForwardPass::run(const StepArrays& step, const KvPool& kv, const LayerAttention& attention) {
  step_ = step;
  kv_ = &kv;
  attention_ = &attention;
  embed();
  rotate();
  for (size_t i = 0; i < weights_.layers().size(); ++i) layer(i);
  if (step_.shape.logit_rows > 0) {
    normalize(weights_.final_norm(), weights_.layers().back().ffn_post_norm, projection_,
              step_.logit_rows, step_.shape.logit_rows);
  }
}

void ForwardPass::embed() {
  const WeightPart& table = weights_.embedding();
  if (table.is_quantized) {
    kernels::cuda::QuantizedEmbeddingParams p;
    p.weights = table.quantized;
    p.token_ids = step_.token_ids;
    p.out = residual_;
    p.out_stride = config_.hidden_size;
    p.num_tokens = step_.shape.tokens;
    p.scale = config_.embedding_scale;
    kernels::cuda::quantized_embedding(p, stream_.get());
    return;
  }
  kernels::cuda::EmbeddingParams p;
  p.table = table.dense;
  p.table_stride = config_.hidden_size;
  p.token_ids = step_.token_ids;
  p.out = residual_;
  p.out_stride = config_.hidden_size;
  p.num_tokens = step_.shape.tokens;
  p.n = config_.hidden_size;
  p.scale = config_.embedding_scale;
  kernels::cuda::embedding(type_, p, stream_.get());
}

/// The cosines and sines of the step's positions, which all layers read.
void ForwardPass::rotate() {
  for (size_t i = 0; i < config_.ropes.size(); ++i) {
    kernels::cuda::RopeTableParams rope;
    rope.positions = step_.positions;
    rope.frequencies = rope_frequencies_.as<double>() + rope_offset_[i];
    rope.cos = cos_[i];
    rope.sin = sin_[i];
    rope.num_tokens = step_.shape.tokens;
    rope.half = static_cast<int32_t>(config_.ropes[i].inverse_frequencies.size());
    rope.factor = config_.ropes[i].attention_factor;
    kernels::cuda::rope_table(rope, stream_.get());
  }
}

void ForwardPass::layer(size_t index) {
  const DeviceLayer& w = weights_.layers()[index];
  const int32_t tokens = step_.shape.tokens;
  const int64_t hidden = config_.hidden_size;
  const bool first = index == 0;
  normalize(w.attn_norm, first ? nullptr : weights_.layers()[index - 1].ffn_post_norm,
            first ? nullptr : projection_, nullptr, tokens);
  linear_(w.qkv, {normed_, hidden, tokens, qkv_, qkv_stride_, type_}, stream_.get());
  finish_qkv(index);
  attend(index);
  linear_(w.o, {qkv_, q_size_, tokens, projection_, hidden, FloatType::kF32}, stream_.get());
  normalize(w.ffn_norm, w.attn_post_norm, projection_, nullptr, tokens);
  feed_forward(w);
}

void ForwardPass::finish_qkv(size_t index) {
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
  p.num_tokens = step_.shape.tokens;
  p.num_heads = config_.num_heads;
  p.q_type = type_;
  p.q = q_;
  p.q_stride = q_size_;
  p.kv = kv_->pages(place.slot);
  p.slots = step_.slots + int64_t{place.group} * step_.shape.tokens;
  kernels::cuda::finish_qkv(type_, p, stream_.get());
}

/// From q_ and the pages to qkv_, whose content is in both by now.
void ForwardPass::attend(size_t index) {
  const model::LayerConfig& place = config_.layers[index];
  const kernels::cuda::KvPages pages = kv_->pages(place.slot);
  AttentionStep step;
  step.q = q_;
  step.out = qkv_;
  step.q_stride = step.out_stride = q_size_;
  step.pool = pages.pool;
  step.block_stride = pages.block_stride;
  step.block_tables =
      step_.block_tables + int64_t{place.group} * step_.shape.sequences * step_.shape.table_width;
  step.block_tables_stride = step_.shape.table_width;
  step.positions = step_.positions;
  step.upload = step_.plans[attention_->kind_of(index)];
  attention_->run(index, step, stream_);
}

void ForwardPass::feed_forward(const DeviceLayer& w) {
  const int32_t tokens = step_.shape.tokens;
  const int64_t hidden = config_.hidden_size;
  const int64_t ffn = config_.intermediate_size;
  linear_(w.gate_up, {normed_, hidden, tokens, gate_up_, 2 * ffn, type_}, stream_.get());
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
  kernels::cuda::gated_activation(type_, type_, gate, stream_.get());
  linear_(w.down, {ffn_, ffn, tokens, projection_, hidden, FloatType::kF32}, stream_.get());
}

void ForwardPass::normalize(const float* weight, const float* post_norm, const float* delta,
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

void ForwardPass::head(int32_t first, int32_t count) {
  const int64_t hidden = config_.hidden_size;
  const std::byte* x = normed_ + first * hidden * float_type_bytes(type_);
  linear_(weights_.head(), {x, hidden, count, logits_, vocab_stride_, FloatType::kF32},
          stream_.get());
  if (config_.final_softcap > 0.f) {
    kernels::cuda::softcap({logits_, count * vocab_stride_, config_.final_softcap}, stream_.get());
  }
}

const float* ForwardPass::hidden(int32_t count) {
  // projection_ has served
  kernels::cuda::convert(type_, FloatType::kF32,
                         {normed_, projection_, int64_t{count} * config_.hidden_size},
                         stream_.get());
  return projection_;
}

}  // namespace sagellm::cuda
