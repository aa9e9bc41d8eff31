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

}  // namespace

size_t Decoder::ShapeHash::operator()(const StepShape& shape) const {
  return static_cast<size_t>(shape.sequences) * 0x9e3779b97f4a7c15u +
         static_cast<size_t>(shape.table_width) * 64 + static_cast<size_t>(shape.wide_kinds) * 2 +
         static_cast<size_t>(shape.samples);
}

Decoder::Decoder(model::ModelConfig config, const HostTensors& tensors,
                 const DecoderOptions& options)
    : config_(validated(std::move(config))),
      options_(validated(options)),
      device_(device_info(options.device)),
      weights_((check_supported(), config_), tensors, stream_),
      kv_type_(stored_as(options.kv_type, weights_.type())),
      head_rows_(std::min(kHeadRows, options.max_batch_tokens)),
      library_(options.use_cublas && !options.deterministic
                   ? std::make_shared<const CublasLt>(options.cublas_folders)
                   : nullptr),
      linear_({.type = weights_.type(),
               .deterministic = options.deterministic,
               .max_k = weights_.max_quantized_k(),
               .max_fp8_k = weights_.max_fp8_k(),
               .fp8_tensor_cores = 10 * device_.major + device_.minor >= 89,
               .library = library_}),
      forward_(config_, weights_, linear_, stream_, options.max_batch_tokens, head_rows_),
      sampler_(config_.vocab_size, forward_.vocab_stride(), options.max_batch_tokens, head_rows_) {}

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

KvPoolOptions Decoder::pool_options(int64_t num_blocks, int32_t block_size) const {
  int32_t slots = 0;
  for (const model::LayerConfig& layer : config_.layers) slots = std::max(slots, layer.slot + 1);
  return {.num_blocks = num_blocks,
          .block_size = block_size,
          .num_slots = slots,
          .num_kv_heads = config_.num_kv_heads,
          .head_dim = config_.head_dim,
          .type = kv_type_};
}

int64_t Decoder::kv_bytes_per_block(int32_t block_size) const {
  return pool_options(0, block_size).block_bytes();
}

void Decoder::allocate_kv(int64_t num_blocks, int32_t block_size) {
  require<InvalidArgument>(kv_ == nullptr, "the KV pages are allocated already");
  select_device(options_.device);
  auto pool = std::make_unique<KvPool>(pool_options(num_blocks, block_size), stream_);
  PagedAttentionOptions attention;
  attention.plan.num_heads = config_.num_heads;
  attention.plan.num_kv_heads = config_.num_kv_heads;
  attention.plan.head_dim = config_.head_dim;
  attention.plan.page_size = block_size;
  attention.plan.deterministic = options_.deterministic;
  attention.type = weights_.type();
  attention.kv_type = kv_type_;
  attention.scale = config_.attention_scale;
  attention.softcap = config_.attention_softcap;
  attention_ = std::make_unique<LayerAttention>(config_, attention, device_);
  reserve_upload(kLeastUpload);
  kv_ = std::move(pool);
}

std::string Decoder::matmul() const {
  return library_ ? "cuBLASLt " + std::to_string(library_->version()) : "own kernels";
}

size_t Decoder::free_bytes() const {
  select_device(options_.device);
  return device_memory().free_bytes;
}

size_t Decoder::workspace_bytes() const {
  return forward_.bytes() + upload_.size() + sampler_.bytes() + linear_.bytes() +
         (attention_ ? attention_->workspace_bytes() : 0);
}

size_t Decoder::num_graphs() const {
  return static_cast<size_t>(std::count_if(graphs_.begin(), graphs_.end(), [](const auto& entry) {
    return static_cast<bool>(entry.second);
  }));
}

void Decoder::step(const model::ForwardBatch& batch, std::span<const sample::RowParams> sampling,
                   const StepOutputs& outputs) {
  require<InvalidArgument>(num_in_flight() == 0, "a step is in flight; wait for it first");
  require<InvalidArgument>(outputs.sampled.size() == sampling.size(),
                           "sampled and sampling differ in length");
  queue(batch, sampling, {}, outputs);
  std::ranges::move(wait().sampled, outputs.sampled.begin());
}

void Decoder::launch(const model::ForwardBatch& batch, std::span<const sample::RowParams> sampling,
                     std::span<const int32_t> token_sources) {
  queue(batch, sampling, token_sources, {});
}

void Decoder::queue(const model::ForwardBatch& batch, std::span<const sample::RowParams> sampling,
                    std::span<const int32_t> token_sources, const StepOutputs& outputs) {
  const auto start = std::chrono::steady_clock::now();
  require<InvalidArgument>(kv_ != nullptr, "no KV pages are allocated");
  require<InvalidArgument>(num_in_flight() < 2, "two steps are in flight; wait for the older one");
  model::validate(batch, config_,
                  {.max_batch_tokens = options_.max_batch_tokens,
                   .num_blocks = kv_->options().num_blocks,
                   .block_size = kv_->options().block_size});
  require<InvalidArgument>(sampling.empty() || sampling.size() == batch.logit_rows.size(),
                           "sampling has ", sampling.size(), " entries for ",
                           batch.logit_rows.size(), " logit rows");
  check_sources(token_sources, batch.num_tokens());
  select_device(options_.device);
  const bool decode = is_decode(batch);
  num_rows_ = batch.num_logit_rows();
  prepare(batch, sampling, token_sources, decode);
  present().num_rows = static_cast<int32_t>(sampling.size());
  try {
    copy_to_device(upload_.data(), present().upload.data(), upload_bytes_, stream_.get());
    kv_->copy_blocks(batch.block_copies, stream_);
    if (!token_sources.empty()) {
      sampler_.take(reinterpret_cast<int32_t*>(upload_.data() + at_.token_ids),
                    reinterpret_cast<const int32_t*>(upload_.data() + at_.token_sources),
                    batch.num_tokens(), stream_);
    }
    if (decode) {
      run_recorded();
    } else {
      forward_.run(arrays_, *kv_, *attention_);
    }
    output(outputs, decode);
    present().done.record(stream_);
  } catch (...) {
    drain();  // what was queued reads the upload, and may write to the caller's arrays
    throw;
  }
  ++num_launched_;
  launch_seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Decoder::check_sources(std::span<const int32_t> sources, int32_t num_tokens) const {
  if (sources.empty()) return;
  require<InvalidArgument>(static_cast<int32_t>(sources.size()) == num_tokens, "token_sources has ",
                           sources.size(), " entries for ", num_tokens, " tokens");
  require<InvalidArgument>(num_in_flight() > 0, "token_sources name a step, and none is in flight");
  const int32_t rows = flights_[static_cast<size_t>((num_launched_ - 1) % 2)].num_rows;
  for (const int32_t row : sources) {
    require<InvalidArgument>(row >= -1 && row < rows, "token_sources has ", row,
                             "; the step before chooses ", rows, " tokens");
  }
}

StepResult Decoder::wait() {
  require<InvalidArgument>(num_in_flight() > 0, "no step was launched");
  Flight& flight = flights_[static_cast<size_t>(num_finished_++ % 2)];
  select_device(options_.device);
  flight.done.synchronize();
  if (flight.num_rows == 0) return {};
  return {.sampled = flight.choices.results(), .num_logprobs = flight.choices.num_logprobs};
}

/// One token of every sequence, and the logits of all: a step whose launches depend on few sizes.
bool Decoder::is_decode(const model::ForwardBatch& batch) const {
  const int32_t tokens = batch.num_tokens();
  return tokens <= std::min(options_.max_graph_sequences, head_rows_) &&
         batch.num_sequences() == tokens && batch.num_logit_rows() == tokens;
}

void Decoder::reserve_upload(size_t bytes) {
  if (upload_.size() < bytes) {
    stream_.synchronize();
    graphs_.clear();  // they read the old upload
    const size_t grown = std::max(bytes, 2 * upload_.size());
    upload_ = DeviceBuffer();
    upload_ = DeviceBuffer(grown);
  }
  if (present().upload.size() < bytes) present().upload = PinnedBuffer(upload_.size());
}

void Decoder::prepare(const model::ForwardBatch& batch, std::span<const sample::RowParams> sampling,
                      std::span<const int32_t> token_sources, bool decode) {
  shape_ = {.tokens = batch.num_tokens(),
            .sequences = batch.num_sequences(),
            .logit_rows = batch.num_logit_rows(),
            .table_width = batch.max_blocks};
  if (decode) {
    const int64_t widest = ceil_div(config_.max_position, kv_->options().block_size);
    shape_ = decode_bucket(batch.num_sequences(), batch.max_blocks,
                           std::min(options_.max_graph_sequences, head_rows_),
                           static_cast<int32_t>(std::max<int64_t>(widest, batch.max_blocks)));
  }
  shape_.samples = !sampling.empty();
  at_ = step_layout(shape_, batch.num_groups, {});
  reserve_upload(at_.bytes);
  write_inputs(batch, token_sources);
  const bool moved = attention_->plan({.query_starts = query_starts_,
                                       .positions = pinned<int32_t>(at_.positions),
                                       .block_tables = pinned<int32_t>(at_.block_tables)},
                                      shape_, decode, stream_);
  if (moved) graphs_.clear();  // they use the old workspace
  const std::vector<int64_t>& words = attention_->words();
  at_ = step_layout(shape_, batch.num_groups, words);
  const int32_t padding = decode && shape_.samples ? shape_.logit_rows - num_rows_ : 0;
  Choices& choices = present().choices;
  upload_bytes_ = at_.bytes + sampler_.measure(sampling, padding, choices, stream_);
  if (upload_.size() < upload_bytes_ || present().upload.size() < upload_bytes_) {
    reserve_upload(upload_bytes_);
    write_inputs(batch, token_sources);
  }
  sampler_.write(sampling, padding, choices, pinned<std::byte>(at_.bytes),
                 upload_.data() + at_.bytes);
  for (size_t i = 0; i < words.size(); ++i) attention_->write(i, pinned<int32_t>(at_.plans[i]));
  find_arrays();
}

/// Where the arrays of the step lie on the device.
void Decoder::find_arrays() {
  const auto uploaded = [this](size_t offset) {
    return reinterpret_cast<const int32_t*>(upload_.data() + offset);
  };
  arrays_ = {.shape = shape_,
             .token_ids = uploaded(at_.token_ids),
             .positions = uploaded(at_.positions),
             .slots = uploaded(at_.slots),
             .logit_rows = uploaded(at_.logit_rows),
             .block_tables = uploaded(at_.block_tables),
             .plans = {}};
  for (const size_t offset : at_.plans) arrays_.plans.push_back(uploaded(offset));
}

/// Padding: token 0 at position 0 of a sequence of its own, whose blocks are block 0, not stored.
void Decoder::write_inputs(const model::ForwardBatch& batch,
                           std::span<const int32_t> token_sources) {
  const int32_t block_size = kv_->options().block_size;
  const auto copy_padded = [&](size_t offset, std::span<const int32_t> values, int32_t count) {
    int32_t* to = pinned<int32_t>(offset);
    std::copy(values.begin(), values.end(), to);
    std::fill(to + values.size(), to + count, 0);
  };
  copy_padded(at_.token_ids, batch.token_ids, shape_.tokens);
  std::ranges::copy(token_sources, pinned<int32_t>(at_.token_sources));
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

/// Logits and chosen tokens too: what is launched depends on the shape alone, the rules of choosing
/// are data. Penalties need counts of their tokens, launched before.
void Decoder::run_recorded() {
  const auto work = [this] {
    forward_.run(arrays_, *kv_, *attention_);
    forward_.head(0, shape_.logit_rows);
    if (shape_.samples) sampler_.choose(forward_.logits(), 0, shape_.logit_rows, stream_);
  };
  if (shape_.samples) sampler_.count(0, num_rows_, stream_);
  const auto [entry, is_new] = graphs_.try_emplace(shape_);
  if (is_new) {  // once without recording: libraries prepare themselves for a shape
    work();
    return;
  }
  if (!entry->second) entry->second = Graph(stream_, work);
  entry->second.launch(stream_);
  ++graph_replays_;
}

/// What the step has computed, on its way to the caller; a step that is not recorded has its output
/// head here, some rows at a time.
void Decoder::output(const StepOutputs& outputs, bool decode) {
  if (num_rows_ == 0) return;
  if (outputs.hidden != nullptr) {
    const auto bytes = sizeof(float) * static_cast<size_t>(config_.hidden_size);
    copy_to_host(outputs.hidden, forward_.hidden(num_rows_), bytes * static_cast<size_t>(num_rows_),
                 stream_.get());
  }
  if (!shape_.samples && outputs.logits == nullptr) return;
  for (int32_t first = 0; first < num_rows_; first += head_rows_) {
    const int32_t count = std::min(head_rows_, num_rows_ - first);
    if (!decode) {
      forward_.head(first, count);
      if (shape_.samples) {
        sampler_.count(first, count, stream_);
        sampler_.choose(forward_.logits(), first, count, stream_);
      }
    }
    if (outputs.logits != nullptr) {
      copy_rows_to_host(outputs.logits + int64_t{first} * config_.vocab_size, config_.vocab_size,
                        forward_.logits(), forward_.vocab_stride(), count, stream_.get());
    }
    if (shape_.samples) sampler_.fetch(first, count, present().choices, stream_);
  }
}

}  // namespace sagellm::cuda
