#include "sagellm/kernels/cpu/ops_cpu.h"

#include <algorithm>
#include <vector>

#include "sagellm/base/math.h"
#include "sagellm/tensor/buffer.h"

namespace sagellm::kernels::cpu {

namespace {

constexpr int64_t kTokenBlock = 48;  // tokens that share one pass over the weights

/// The activations of up to `rows` tokens in the representation that one matmul wants.
class EncodedRows {
 public:
  EncodedRows(const KernelTable& table, ActKind kind, ActPrecision precision, int64_t rows,
              int64_t k)
      : table_(table), kind_(kind), k_(k) {
    const auto sized = [rows](auto& values, int64_t per_row) {
      values.resize(static_cast<size_t>(rows * per_row));
    };
    if (kind == ActKind::kF32) sized(f32_, k);
    if (kind == ActKind::kBF16) sized(bf16_, round_up(k, 2));
    if (kind == ActKind::kI8) {
      sized(q_, k);
      if (precision == ActPrecision::kA15) sized(q_lo_, k);
      sized(d_, k / kUnit);
      sized(s_, k / kUnit);
      sized(sum16_, k / 16);
    }
  }

  /// Encodes `count` rows; the result is valid until the next call.
  Activations encode(const float* x, int64_t stride, int64_t count) {
    Activations out;
    if (kind_ == ActKind::kF32) {
      for (int64_t t = 0; t < count; ++t) std::copy_n(x + t * stride, k_, f32_.data() + t * k_);
      out.f32 = f32_.data();
    } else if (kind_ == ActKind::kBF16) {
      for (int64_t t = 0; t < count; ++t)
        table_.to_bf16(x + t * stride, bf16_.data() + t * round_up(k_, 2), k_);
      out.bf16 = bf16_.data();
    } else {
      QuantizeParams p;
      p.x = x;
      p.x_stride = stride;
      p.k = k_;
      p.num_tokens = static_cast<int32_t>(count);
      p.q = q_.data();
      p.q_lo = q_lo_.empty() ? nullptr : q_lo_.data();
      p.d = d_.data();
      p.s = s_.data();
      p.sum16 = sum16_.data();
      table_.quantize(p);
      out = {nullptr, nullptr, p.q, p.q_lo, p.d, p.s, p.sum16};
    }
    return out;
  }

 private:
  const KernelTable& table_;
  ActKind kind_;
  int64_t k_;
  std::vector<float> f32_;
  std::vector<uint16_t> bf16_;
  std::vector<int8_t> q_, q_lo_;
  std::vector<float> d_, s_;
  std::vector<int32_t> sum16_;
};

const int32_t* block_table(const RaggedParams& batch, int64_t sequence) {
  return batch.block_tables + sequence * batch.block_tables_stride;
}

}  // namespace

void linear(const KernelTable& table, const LinearParams& p) {
  if (p.num_tokens == 0) return;
  const int64_t columns = round_up(p.n, kRowBlock);
  const int64_t block = std::min(kTokenBlock, p.num_tokens);
  EncodedRows rows(table, table.act_kind[static_cast<size_t>(p.format)], p.precision, block, p.k);
  // The kernel writes whole row blocks, which would run over the end of a row of `out`.
  std::vector<float> padded(columns == p.n ? 0 : static_cast<size_t>(block * columns));
  MatmulParams matmul;
  matmul.format = p.format;
  matmul.weights = p.weights;
  matmul.k = p.k;
  matmul.row_block_end = static_cast<int32_t>(columns / kRowBlock);
  for (int64_t t = 0; t < p.num_tokens; t += block) {
    const int64_t count = std::min(block, p.num_tokens - t);
    float* out = p.out + t * p.out_stride;
    matmul.num_tokens = static_cast<int32_t>(count);
    matmul.x = rows.encode(p.x + t * p.x_stride, p.x_stride, count);
    matmul.out = padded.empty() ? out : padded.data();
    matmul.out_stride = padded.empty() ? p.out_stride : columns;
    table.matmul(matmul);
    if (padded.empty()) continue;
    for (int64_t i = 0; i < count; ++i)
      std::copy_n(padded.data() + i * columns, p.n, out + i * p.out_stride);
  }
}

void rms_norm(const KernelTable& table, const RmsNormParams& p) {
  for (int64_t r = 0; r < p.num_rows; ++r)
    table.rms_norm(p.x + r * p.x_stride, p.weight, p.eps, p.n, p.out + r * p.out_stride);
}

void rope(const KernelTable& table, const RopeParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t h = 0; h < p.num_heads; ++h) {
      table.rope(p.x + t * p.x_stride + h * p.head_dim, p.cos + t * p.cos_stride,
                 p.sin + t * p.sin_stride, 2 * p.half);
    }
  }
}

void gated_activation(const KernelTable& table, const GatedActivationParams& p) {
  const auto kernel = p.activation == GateActivation::kSilu ? table.silu_mul : table.gelu_tanh_mul;
  for (int64_t r = 0; r < p.num_rows; ++r)
    kernel(p.gate + r * p.gate_stride, p.up + r * p.up_stride, p.n, p.out + r * p.out_stride);
}

void kv_write(const KernelTable& table, const KvWriteBatchParams& p) {
  for (int64_t s = 0; s < p.batch.num_sequences; ++s) {
    const int32_t begin = p.batch.query_starts[s];
    const int32_t end = p.batch.query_starts[s + 1];
    if (begin == end) continue;
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      const int64_t column = head * p.kv.head_dim;
      // One stride serves k and v in the kernel, so rows of different strides go one by one.
      const int32_t step = p.k_stride == p.v_stride ? end - begin : 1;
      for (int32_t t = begin; t < end; t += step) {
        KvWriteParams write;
        write.kv = p.kv;
        write.kv_head = static_cast<int32_t>(head);
        write.block_table = block_table(p.batch, s);
        write.first_position = p.batch.positions[t];
        write.num_tokens = step;
        write.k = p.k + t * p.k_stride + column;
        write.v = p.v + t * p.v_stride + column;
        write.stride = p.k_stride;
        table.kv_write(write);
      }
    }
  }
}

void paged_attention(const KernelTable& table, const PagedAttentionParams& p) {
  const auto group = static_cast<int32_t>(p.num_heads / p.num_kv_heads);
  const int32_t tile_tokens = std::max(1, kAttentionRows / group);
  const int32_t max_rows = tile_tokens * group;
  const int64_t head_dim = p.kv.head_dim;
  std::vector<float> m(static_cast<size_t>(max_rows));
  std::vector<float> l(static_cast<size_t>(max_rows));
  std::vector<float> acc(static_cast<size_t>(max_rows * head_dim));
  Buffer scratch(table.attention_scratch_bytes);
  const auto attend = [&](int64_t sequence, int32_t first, int32_t count, int64_t kv_head) {
    const int64_t column = kv_head * group * head_dim;
    AttentionParams a;
    a.kv = p.kv;
    a.kv_head = static_cast<int32_t>(kv_head);
    a.block_table = block_table(p.batch, sequence);
    a.q = p.q + first * p.q_stride + column;
    a.q_stride = p.q_stride;
    a.group = group;
    a.num_tokens = count;
    a.first_position = p.batch.positions[first];
    const int32_t oldest = p.window > 0 ? std::max(0, a.first_position - p.window + 1) : 0;
    a.split_begin = oldest / kAttentionSplit;
    a.split_end = (a.first_position + count - 1) / kAttentionSplit + 1;
    a.window = p.window;
    a.scale = p.scale;
    a.softcap = p.softcap;
    a.m = m.data();
    a.l = l.data();
    a.acc = acc.data();
    a.scratch = scratch.data();
    table.attention(a);
    AttentionFinishParams f;
    f.m = m.data();
    f.l = l.data();
    f.acc = acc.data();
    f.count = 1;
    f.rows = count * group;
    f.head_dim = p.kv.head_dim;
    f.out = p.out + first * p.out_stride + column;
    f.out_stride = p.out_stride;
    f.group = group;
    table.attention_finish(f);
  };
  for (int64_t s = 0; s < p.batch.num_sequences; ++s) {
    const int32_t end = p.batch.query_starts[s + 1];
    for (int32_t t = p.batch.query_starts[s]; t < end; t += tile_tokens) {
      for (int64_t head = 0; head < p.num_kv_heads; ++head)
        attend(s, t, std::min(tile_tokens, end - t), head);
    }
  }
}

}  // namespace sagellm::kernels::cpu
