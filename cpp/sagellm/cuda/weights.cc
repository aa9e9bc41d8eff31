#include "sagellm/cuda/weights.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>

#include "sagellm/base/error.h"
#include "sagellm/base/math.h"
#include "sagellm/cuda/staging.h"
#include "sagellm/quant/codec.h"
#include "sagellm/quant/scale_grid.h"

namespace sagellm::cuda {

namespace {

using kernels::cuda::FloatType;

constexpr int64_t kAlignment = 256;

/// Row i of a NeoX-ordered matrix in terms of GGUF's interleaved order, per head of `dim` rows.
int64_t unpermuted_row(int64_t i, int64_t dim) {
  const int64_t j = i % dim;
  return i - j + 2 * (j % (dim / 2)) + j / (dim / 2);
}

std::string to_string(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (const int64_t extent : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(extent);
  return out + "]";
}

const HostTensor& find(const HostTensors& tensors, const std::string& name) {
  const auto it = tensors.find(name);
  require<CorruptFile>(it != tensors.end(), "the checkpoint has no tensor for '", name, "'");
  return it->second;
}

/// Collects what goes to the device, then allocates once and copies everything.
class Loader {
 public:
  Loader(const HostTensors& tensors, FloatType type) : tensors_(tensors), type_(type) {}

  /// Schedules matrices [n][k] below each other.
  void matrices(const std::vector<std::pair<std::string, int64_t>>& names, int64_t k,
                LinearWeights& out) {
    out.k = k;
    for (size_t i = 0; i < names.size();) {
      std::vector<const HostTensor*> rows = {&tensor(names[i].first, {names[i].second, k})};
      WeightPart part;
      part.first = out.n;
      part.n = names[i].second;
      part.is_quantized = kernels::cuda::is_device_format(rows[0]->format);
      part.is_fp8 = rows[0]->format == Format::kF8_E4M3;
      const size_t first = i;
      for (++i; i < names.size(); ++i) {
        const HostTensor& next = tensor(names[i].first, {names[i].second, k});
        const bool is_dense =
            !kernels::cuda::is_device_format(next.format) && next.format != Format::kF8_E4M3;
        const bool fits = part.is_quantized ? next.format == rows[0]->format &&
                                                  part.n % kernels::cuda::kTileRows == 0
                          : part.is_fp8 ? next.format == Format::kF8_E4M3
                                        : is_dense;
        if (!fits) break;
        rows.push_back(&next);
        part.n += names[i].second;
      }
      out.n += part.n;
      out.parts.push_back(part);
      if (part.is_quantized) {
        quantized(rows, k, out, out.parts.size() - 1);
      } else if (part.is_fp8) {
        std::vector<Fp8Rows> fp8_rows;
        for (size_t j = 0; j < rows.size(); ++j) {
          fp8_rows.push_back({names[first + j].first, rows[j], scales(names[first + j].first)});
        }
        fp8(std::move(fp8_rows), k, out, out.parts.size() - 1);
      } else {
        dense(rows, k, out, out.parts.size() - 1);
      }
    }
  }

  /// Schedules f32 vectors one after another.
  void vectors(const std::vector<std::pair<std::string, int64_t>>& names, const float*& out) {
    const int64_t begin = take(0);
    for (const auto& [name, n] : names) {
      const HostTensor& from = tensor(name, {n});
      refuse_fp8(name, from);
      jobs_.push_back({bytes_, 1, n * int64_t{sizeof(float)},
                       [&from, n = n](int64_t, std::byte* to) { vector(from, n, to); }});
      bytes_ += n * int64_t{sizeof(float)};
    }
    place_.push_back({begin, [&out](std::byte* at) { out = reinterpret_cast<float*>(at); }});
  }

  /// Only matrices of linear layers have scales.
  static void refuse_fp8(const std::string& name, const HostTensor& from) {
    require<Unsupported>(from.format != Format::kF8_E4M3, "tensor '", name,
                         "' is stored in FP8; only matrices of linear layers may be");
  }

  DeviceBuffer run(const Stream& stream) {
    DeviceBuffer memory(static_cast<size_t>(take(0)));
    for (const auto& [offset, set] : place_) set(memory.data() + offset);
    Staging staging(stream);
    for (const Job& job : jobs_) {
      staging.rows(memory.data() + job.offset, job.rows, job.row_bytes, job.write);
    }
    stream.synchronize();  // reports what failed
    return memory;
  }

 private:
  struct Job {
    int64_t offset;
    int64_t rows;
    int64_t row_bytes;
    std::function<void(int64_t, std::byte*)> write;
  };

  /// An FP8 matrix of the checkpoint.
  struct Fp8Rows {
    std::string name;
    const HostTensor* codes;
    quant::ScaleGrid scales;
  };

  quant::ScaleGrid scales(const std::string& name) const {
    const HostTensor& matrix = find(tensors_, name);
    const HostTensor& from = find(tensors_, name + "_scale");
    return {name + "_scale", from.format, from.shape, from.data, matrix.shape[0], matrix.shape[1]};
  }

  const HostTensor& tensor(const std::string& name, const std::vector<int64_t>& shape) const {
    const HostTensor& found = find(tensors_, name);
    if (found.shape != shape) {
      fail<CorruptFile>("tensor '", name, "' has shape ", to_string(found.shape), ", expected ",
                        to_string(shape));
    }
    require<CorruptFile>(found.unpermute_heads == 0 || shape[0] % (2 * found.unpermute_heads) == 0,
                         "tensor '", name, "' cannot be split into ", found.unpermute_heads,
                         " heads");
    return found;
  }

  int64_t take(int64_t bytes) {
    const int64_t begin = round_up(bytes_, kAlignment);
    bytes_ = begin + bytes;
    return begin;
  }

  void dense(const std::vector<const HostTensor*>& tensors, int64_t k, LinearWeights& out,
             size_t index) {
    const int64_t row_size = k * float_type_bytes(type_);
    WeightPart& part = out.parts[index];
    part.bytes = part.n * row_size;
    const int64_t begin = take(part.bytes);
    int64_t offset = begin;
    for (const HostTensor* from : tensors) {
      const int64_t n = from->shape[0];
      jobs_.push_back({offset, n, row_size, [this, from, k](int64_t row, std::byte* to) {
                         dense_row(*from, row, k, to);
                       }});
      offset += n * row_size;
    }
    place_.push_back({begin, [&out, index](std::byte* at) { out.parts[index].dense = at; }});
  }

  void quantized(const std::vector<const HostTensor*>& tensors, int64_t k, LinearWeights& out,
                 size_t index) {
    const Format format = tensors.front()->format;
    WeightPart& part = out.parts[index];
    part.quantized.format = format;
    part.quantized.layout = kernels::cuda::quant_layout(format, part.n, k);
    part.quantized.n = static_cast<int32_t>(part.n);
    part.quantized.k = static_cast<int32_t>(k);
    part.bytes = part.quantized.layout.bytes();
    const int64_t tile_bytes = part.quantized.layout.tile_row_bytes;
    const int64_t begin = take(part.bytes);
    int64_t offset = begin;
    for (const HostTensor* from : tensors) {
      const int64_t tiles = ceil_div(from->shape[0], kernels::cuda::kTileRows);
      jobs_.push_back({offset, tiles, tile_bytes,
                       [from, k](int64_t tile, std::byte* to) { tile_row(*from, tile, k, to); }});
      offset += tiles * tile_bytes;
    }
    place_.push_back({begin, [&out, index](std::byte* at) {
                        out.parts[index].quantized.data = reinterpret_cast<uint8_t*>(at);
                      }});
  }

  /// Codes as they are stored, one matrix below the other, and their scales as fp8.h wants them.
  void fp8(std::vector<Fp8Rows> matrices, int64_t k, LinearWeights& out, size_t index) {
    require<Unsupported>(
        k % kernels::cuda::kFp8Alignment == 0, "FP8 matrix '", matrices.front().name, "' has ", k,
        " columns; on a CUDA device they must be a multiple of ", kernels::cuda::kFp8Alignment);
    WeightPart& part = out.parts[index];
    bool has_blocks = false;
    for (const Fp8Rows& matrix : matrices) has_blocks |= matrix.scales.has_blocks();
    const int64_t groups = has_blocks ? ceil_div(k, kernels::cuda::kFp8Group) : 1;
    const int64_t scale_row_bytes = part.n * int64_t{sizeof(float)};
    part.fp8.n = static_cast<int32_t>(part.n);
    part.fp8.k = static_cast<int32_t>(k);
    part.fp8.groups = static_cast<int32_t>(groups);
    part.bytes = part.n * k + groups * scale_row_bytes;

    const int64_t codes = take(part.n * k);
    int64_t offset = codes;
    for (const Fp8Rows& matrix : matrices) {
      const int64_t n = matrix.codes->shape[0];
      jobs_.push_back(
          {offset, n, k, [from = matrix.codes, name = matrix.name, k](int64_t row, std::byte* to) {
             const uint8_t* stored = stored_row(*from, row, k);
             require<CorruptFile>(
                 !quant::has_nan_e4m3(stored, k), "tensor '", name,
                 "' has weights that are NaN; download or convert the model again");
             std::memcpy(to, stored, static_cast<size_t>(k));
           }});
      offset += n * k;
    }
    place_.push_back({codes, [&out, index](std::byte* at) {
                        out.parts[index].fp8.codes = reinterpret_cast<uint8_t*>(at);
                      }});

    const int64_t scales = take(groups * scale_row_bytes);
    const auto shared = std::make_shared<const std::vector<Fp8Rows>>(std::move(matrices));
    jobs_.push_back({scales, groups, scale_row_bytes, [shared](int64_t group, std::byte* to) {
                       auto* at = reinterpret_cast<float*>(to);
                       for (const Fp8Rows& matrix : *shared) {
                         for (int64_t row = 0; row < matrix.codes->shape[0]; ++row) {
                           *at++ = matrix.scales.at(row, group * kernels::cuda::kFp8Group);
                         }
                       }
                     }});
    place_.push_back({scales, [&out, index](std::byte* at) {
                        out.parts[index].fp8.scales = reinterpret_cast<float*>(at);
                      }});
  }

  /// The stored row that is row `row` after reordering.
  static const uint8_t* stored_row(const HostTensor& from, int64_t row, int64_t bytes) {
    const int64_t source =
        from.unpermute_heads > 0 ? unpermuted_row(row, from.shape[0] / from.unpermute_heads) : row;
    return from.data + source * bytes;
  }

  static void tile_row(const HostTensor& from, int64_t tile, int64_t k, std::byte* to) {
    const int64_t bytes = row_bytes(from.format, k);
    const int64_t first = tile * kernels::cuda::kTileRows;
    const int64_t count = std::min<int64_t>(kernels::cuda::kTileRows, from.shape[0] - first);
    std::vector<uint8_t> rows(static_cast<size_t>(count * bytes));
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(rows.data() + i * bytes, stored_row(from, first + i, bytes),
                  static_cast<size_t>(bytes));
    }
    kernels::cuda::repack_tile_row(from.format, k, rows.data(), bytes, static_cast<int32_t>(count),
                                   reinterpret_cast<uint8_t*>(to));
  }

  /// Row `row` of the matrix, after reordering, as `type_`.
  void dense_row(const HostTensor& from, int64_t row, int64_t k, std::byte* to) const {
    const uint8_t* data = stored_row(from, row, row_bytes(from.format, k));
    const Format same = type_ == FloatType::kF16 ? Format::kF16 : Format::kBF16;
    if (from.format == same) {
      std::memcpy(to, data, static_cast<size_t>(row_bytes(same, k)));
      return;
    }
    std::vector<float> values(static_cast<size_t>(k));
    quant::dequantize_row(from.format, data, values.data(), k);
    quant::quantize_row(same, values.data(), to, k);
  }

  static void vector(const HostTensor& from, int64_t n, std::byte* to) {
    std::vector<float> stored(static_cast<size_t>(n));
    quant::dequantize_row(from.format, from.data, stored.data(), n);
    auto* out = reinterpret_cast<float*>(to);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t source =
          from.unpermute_heads > 0 ? unpermuted_row(i, n / from.unpermute_heads) : i;
      out[i] = stored[static_cast<size_t>(source)] + (from.add_one ? 1.f : 0.f);
    }
  }

  const HostTensors& tensors_;
  FloatType type_;
  std::vector<Job> jobs_;
  std::vector<std::pair<int64_t, std::function<void(std::byte*)>>> place_;
  int64_t bytes_ = 0;
};

FloatType type_of(const HostTensors& tensors) {
  Format format = find(tensors, "layers.0.q").format;
  if (format == Format::kF8_E4M3) format = find(tensors, "embed").format;  // what is not quantized
  return format == Format::kF16 ? FloatType::kF16 : FloatType::kBF16;
}

}  // namespace

DeviceWeights::DeviceWeights(const model::ModelConfig& config, const HostTensors& tensors,
                             const Stream& stream)
    : type_(type_of(tensors)), layers_(config.layers.size()) {
  Loader loader(tensors, type_);
  const int64_t hidden = config.hidden_size;
  const int64_t ffn = config.intermediate_size;
  const int64_t q_size = int64_t{config.num_heads} * config.head_dim;
  const int64_t kv_size = int64_t{config.num_kv_heads} * config.head_dim;
  for (size_t i = 0; i < layers_.size(); ++i) {
    DeviceLayer& layer = layers_[i];
    const std::string at = "layers." + std::to_string(i) + ".";
    loader.vectors({{at + "attn_norm", hidden}}, layer.attn_norm);
    loader.matrices({{at + "q", q_size}, {at + "k", kv_size}, {at + "v", kv_size}}, hidden,
                    layer.qkv);
    if (config.qkv_bias) {
      loader.vectors({{at + "q_bias", q_size}, {at + "k_bias", kv_size}, {at + "v_bias", kv_size}},
                     layer.qkv_bias);
    }
    if (config.qk_norm) {
      loader.vectors({{at + "q_norm", config.head_dim}}, layer.q_norm);
      loader.vectors({{at + "k_norm", config.head_dim}}, layer.k_norm);
    }
    loader.matrices({{at + "o", hidden}}, q_size, layer.o);
    if (config.post_norms) {
      loader.vectors({{at + "attn_post_norm", hidden}}, layer.attn_post_norm);
      loader.vectors({{at + "ffn_post_norm", hidden}}, layer.ffn_post_norm);
    }
    loader.vectors({{at + "ffn_norm", hidden}}, layer.ffn_norm);
    loader.matrices({{at + "gate", ffn}, {at + "up", ffn}}, hidden, layer.gate_up);
    loader.matrices({{at + "down", hidden}}, ffn, layer.down);
  }
  loader.vectors({{"final_norm", hidden}}, final_norm_);
  Loader::refuse_fp8("embed", find(tensors, "embed"));
  loader.matrices({{config.tie_embeddings ? "embed" : "lm_head", config.vocab_size}}, hidden,
                  head_);
  if (!config.tie_embeddings) loader.matrices({{"embed", config.vocab_size}}, hidden, embedding_);
  memory_ = loader.run(stream);

  const auto account = [&](const LinearWeights& w) {
    for (const WeightPart& part : w.parts) {
      bytes_per_token_ += static_cast<size_t>(part.bytes);
      if (part.is_quantized) max_quantized_k_ = std::max(max_quantized_k_, w.k);
      if (part.is_fp8) max_fp8_k_ = std::max(max_fp8_k_, w.k);
    }
  };
  for (const DeviceLayer& layer : layers_) {
    for (const LinearWeights* w : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) account(*w);
  }
  account(head_);
}

}  // namespace sagellm::cuda
