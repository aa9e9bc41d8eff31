#include "sagellm/model/weights.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <span>

#include "sagellm/base/dtype.h"
#include "sagellm/base/error.h"
#include "sagellm/base/math.h"
#include "sagellm/quant/codec.h"
#include "sagellm/quant/scale_grid.h"
#include "sagellm/quant/unpack.h"

namespace sagellm::model {

namespace {

/// Rows of a NeoX-ordered matrix in terms of GGUF's interleaved order, per head.
std::vector<int64_t> unpermuted_rows(int64_t n, int64_t heads) {
  const int64_t dim = n / heads;
  std::vector<int64_t> rows(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t j = i % dim;
    rows[static_cast<size_t>(i)] = i - j + 2 * (j % (dim / 2)) + j / (dim / 2);
  }
  return rows;
}

/// Collects packing work over all matrices, then runs it on the pool in chunks of row blocks.
class Loader {
 public:
  explicit Loader(const TensorSources& sources) : sources_(sources) {}

  const TensorSource& source(const std::string& name) const {
    const auto it = sources_.find(name);
    require<CorruptFile>(it != sources_.end(), "the checkpoint has no tensor for '", name, "'");
    return it->second;
  }

  const checkpoint::TensorInfo& tensor(const std::string& name, std::vector<int64_t> shape) const {
    const TensorSource& from = source(name);
    const checkpoint::TensorInfo& info = from.file->tensor(from.tensor);
    if (info.shape != shape) {
      fail<CorruptFile>("tensor '", from.tensor, "' (", name, ") has shape ", to_string(info.shape),
                        ", expected ", to_string(shape));
    }
    return info;
  }

  std::vector<float> vector(const std::string& name, int64_t n) const {
    const checkpoint::TensorInfo& info = tensor(name, {n});
    const TensorSource& from = source(name);
    refuse_fp8(info);
    std::vector<float> stored(static_cast<size_t>(n));
    quant::dequantize_row(info.format, info.data, stored.data(), n);
    if (from.unpermute_heads > 0) {
      const std::vector<int64_t> rows = unpermuted_rows(n, from.unpermute_heads);
      std::vector<float> ordered(stored.size());
      for (size_t i = 0; i < rows.size(); ++i) ordered[i] = stored[static_cast<size_t>(rows[i])];
      stored = std::move(ordered);
    }
    if (from.add_one) {
      for (float& value : stored) value += 1.f;
    }
    return stored;
  }

  /// Only matrices of linear layers have scales.
  static void refuse_fp8(const checkpoint::TensorInfo& info) {
    require<Unsupported>(info.format != Format::kF8_E4M3, "tensor '", info.name,
                         "' is stored in FP8; only matrices of linear layers may be");
  }

  /// Schedules `name` [n, k] to be packed into `out`, which must stay in place until `run`.
  void matrix(const std::string& name, int64_t n, int64_t k, quant::PackedMatrix& out) {
    const checkpoint::TensorInfo& info = tensor(name, {n, k});
    const TensorSource& from = source(name);
    require<CorruptFile>(from.unpermute_heads == 0 || n % (2 * from.unpermute_heads) == 0,
                         "tensor '", name, "' cannot be split into ", from.unpermute_heads,
                         " heads");
    out.format = quant::packed_format_of(info.format);
    out.n = n;
    out.k = k;
    out.row_block_stride = kernels::packed_row_block_bytes(out.format, k);
    Job job{from.file.get(), &info, &out, {}, {}};
    if (info.format == Format::kF8_E4M3) job.scales = scales(name, n, k);
    if (from.unpermute_heads > 0) job.row_map = unpermuted_rows(n, from.unpermute_heads);
    jobs_.push_back(std::move(job));
  }

  void run(runtime::ThreadPool& pool) {
    allocate();
    struct Chunk {
      const Job* job;
      int64_t begin, end;
    };
    std::vector<Chunk> chunks;
    for (const Job& job : jobs_) {
      const int64_t blocks = job.out->num_row_blocks();
      const int64_t step = std::max<int64_t>(
          1, (int64_t{1} << 20) / static_cast<int64_t>(job.out->row_block_stride));
      for (int64_t b = 0; b < blocks; b += step)
        chunks.push_back({&job, b, std::min(b + step, blocks)});
    }
    std::atomic<const Job*> damaged{nullptr};
    runtime::WorkQueue queue(1);
    pool.run([&](int thread) {
      queue.for_each(0, thread, pool.size(), static_cast<int64_t>(chunks.size()), 1,
                     [&](int64_t begin, int64_t end) {
                       for (int64_t i = begin; i < end; ++i) {
                         const Chunk& chunk = chunks[static_cast<size_t>(i)];
                         const Job& job = *chunk.job;
                         if (has_nan(job, chunk.begin, chunk.end)) damaged = &job;
                         quant::pack_row_blocks(
                             job.info->format, job.info->data,
                             static_cast<size_t>(row_bytes(job.info->format, job.out->k)),
                             std::span<const int64_t>(job.row_map), *job.out, chunk.begin,
                             chunk.end, job.scales ? &*job.scales : nullptr);
                         forget_rows(job, chunk.begin, chunk.end);
                       }
                     });
    });
    if (const Job* job = damaged) {
      fail<CorruptFile>("tensor '", job->info->name,
                        "' has weights that are NaN; download or convert the model again");
    }
  }

 private:
  struct Job {
    const checkpoint::File* file;
    const checkpoint::TensorInfo* info;
    quant::PackedMatrix* out;
    std::vector<int64_t> row_map;
    std::optional<quant::ScaleGrid> scales;  // of F8_E4M3
  };

  /// The scales of the FP8 matrix `name`, whose tensor has the same name and "_scale".
  quant::ScaleGrid scales(const std::string& name, int64_t n, int64_t k) const {
    const TensorSource& from = source(name + "_scale");
    const checkpoint::TensorInfo& info = from.file->tensor(from.tensor);
    return {from.tensor, info.format, info.shape, info.data, n, k};
  }

  /// Whether FP8 rows of these blocks have a code that is no number.
  static bool has_nan(const Job& job, int64_t block_begin, int64_t block_end) {
    if (job.info->format != Format::kF8_E4M3) return false;
    const int64_t begin = block_begin * kernels::kRowBlock * job.out->k;
    const int64_t end = std::min(block_end * kernels::kRowBlock, job.out->n) * job.out->k;
    return quant::has_nan_e4m3(job.info->data + begin, end - begin);
  }

  /// All matrices share one mapping, in the order in which a step reads them, so that small ones
  /// get huge pages too.
  void allocate() {
    const auto bytes = [](const quant::PackedMatrix& m) {
      return static_cast<size_t>(
          round_up(static_cast<int64_t>(m.row_block_stride) * m.num_row_blocks(), 64));
    };
    size_t total = 0;
    for (const Job& job : jobs_) total += bytes(*job.out);
    Buffer all(total);
    size_t offset = 0;
    for (const Job& job : jobs_) {
      job.out->storage = all.slice(offset, bytes(*job.out));
      offset += bytes(*job.out);
    }
  }

  /// The packed copy replaces these rows: without this, memory peaks at twice the weights.
  static void forget_rows(const Job& job, int64_t block_begin, int64_t block_end) {
    const int64_t row = row_bytes(job.info->format, job.out->k);
    const int64_t begin = block_begin * kernels::kRowBlock;
    const int64_t end = std::min(block_end * kernels::kRowBlock, job.out->n);
    job.file->forget(job.info->data + begin * row, static_cast<size_t>((end - begin) * row));
  }

  static std::string to_string(const std::vector<int64_t>& shape) {
    std::string out = "[";
    for (const int64_t extent : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(extent);
    return out + "]";
  }

  const TensorSources& sources_;
  std::vector<Job> jobs_;
};

}  // namespace

Weights::Weights(const ModelConfig& config, const TensorSources& sources, runtime::ThreadPool& pool)
    : layers_(config.layers.size()), hidden_size_(config.hidden_size) {
  Loader loader(sources);
  const int64_t hidden = config.hidden_size;
  const int64_t q_size = int64_t{config.num_heads} * config.head_dim;
  const int64_t kv_size = int64_t{config.num_kv_heads} * config.head_dim;
  for (size_t i = 0; i < layers_.size(); ++i) {
    LayerWeights& layer = layers_[i];
    const std::string at = "layers." + std::to_string(i) + ".";
    loader.matrix(at + "q", q_size, hidden, layer.q);
    loader.matrix(at + "k", kv_size, hidden, layer.k);
    loader.matrix(at + "v", kv_size, hidden, layer.v);
    loader.matrix(at + "o", hidden, q_size, layer.o);
    loader.matrix(at + "gate", config.intermediate_size, hidden, layer.gate);
    loader.matrix(at + "up", config.intermediate_size, hidden, layer.up);
    loader.matrix(at + "down", hidden, config.intermediate_size, layer.down);
    layer.attn_norm = loader.vector(at + "attn_norm", hidden);
    layer.ffn_norm = loader.vector(at + "ffn_norm", hidden);
    if (config.qkv_bias) {
      layer.q_bias = loader.vector(at + "q_bias", q_size);
      layer.k_bias = loader.vector(at + "k_bias", kv_size);
      layer.v_bias = loader.vector(at + "v_bias", kv_size);
    }
    if (config.qk_norm) {
      layer.q_norm = loader.vector(at + "q_norm", config.head_dim);
      layer.k_norm = loader.vector(at + "k_norm", config.head_dim);
    }
    if (config.post_norms) {
      layer.attn_post_norm = loader.vector(at + "attn_post_norm", hidden);
      layer.ffn_post_norm = loader.vector(at + "ffn_post_norm", hidden);
    }
  }
  final_norm_ = loader.vector("final_norm", hidden);
  loader.matrix(config.tie_embeddings ? "embed" : "lm_head", config.vocab_size, hidden, head_);
  if (!config.tie_embeddings) {
    const checkpoint::TensorInfo& info = loader.tensor("embed", {config.vocab_size, hidden});
    Loader::refuse_fp8(info);
    embedding_file_ = loader.source("embed").file;
    embedding_format_ = info.format;
    embedding_rows_ = info.data;
    embedding_row_bytes_ = row_bytes(info.format, hidden);
  }
  loader.run(pool);

  for (const LayerWeights& layer : layers_) {
    for (const quant::PackedMatrix* m :
         {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
      bytes_ += m->bytes();
    }
  }
  bytes_ += head_.bytes();
  bytes_per_token_ = bytes_;
}

void Weights::embedding(int32_t token, float* out) const {
  if (embedding_file_ == nullptr) {
    quant::unpack_row(head_, token, out);
  } else {
    quant::dequantize_row(embedding_format_, embedding_rows_ + token * embedding_row_bytes_, out,
                          hidden_size_);
  }
}

}  // namespace sagellm::model
