// Bound by memory: every byte is read and written once, in pieces of 16 bytes, with all loads of a
// thread issued before the first use.
#include <cmath>

#include "sagellm/kernels/cuda/elementwise.h"
#include "sagellm/kernels/cuda/vector.cuh"

namespace sagellm::kernels::cuda {

namespace {

constexpr int kThreads = 128;  // of kernels without a barrier

SAGE_DEVICE int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

Grid blocks_for(int64_t threads, int block = kThreads) {
  return Grid{static_cast<uint32_t>((threads + block - 1) / block)};
}

// ------------------------------------------------------------------------------------- embedding
template <typename T>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(const __grid_constant__ EmbeddingParams p) {
  const int pieces = p.n / kVector;
  const int64_t index = global_thread();
  if (index >= int64_t{p.num_tokens} * pieces) return;
  const int64_t token = index / pieces;
  const int64_t column = index % pieces * kVector;
  const T* row = static_cast<const T*>(p.table) + p.token_ids[token] * p.table_stride;
  Vector x = load_vector(row + column);
#pragma unroll
  for (float& v : x.v) v *= p.scale;
  store_vector(p.out + token * p.out_stride + column, x);
}

// ------------------------------------------------------------------------------------------ norms
constexpr int kNormVectors = 2;  // of a thread

/// Threads of a row's block: one per 8 elements, up to 1024.
int norm_threads(int n) {
  const int threads = (n / kVector + kWarpSize - 1) / kWarpSize * kWarpSize;
  return threads < 1024 ? threads : 1024;
}

SAGE_DEVICE float inverse_rms(float squares, int n, float eps) {
  return __fdiv_rn(1.f, __fsqrt_rn(__fdiv_rn(squares, static_cast<float>(n)) + eps));
}

template <typename Delta, typename Out>
__global__ void __launch_bounds__(1024)
    add_rms_norm_kernel(const __grid_constant__ AddRmsNormParams p) {
  auto* scratch = shared_memory<float>();
  const int64_t row = p.rows != nullptr ? p.rows[blockIdx.x] : static_cast<int64_t>(blockIdx.x);
  float* residual = p.residual + row * p.residual_stride;
  int columns[kNormVectors];
  Vector x[kNormVectors];
  Vector delta[kNormVectors];
#pragma unroll
  for (int i = 0; i < kNormVectors; ++i) {
    columns[i] = static_cast<int>(i * blockDim.x + threadIdx.x) * kVector;
    x[i] = delta[i] = zero_vector();
    if (columns[i] >= p.n) continue;
    x[i] = load_vector<float, false>(residual + columns[i]);
    if (p.delta == nullptr) continue;
    delta[i] = load_vector(static_cast<const Delta*>(p.delta) + row * p.delta_stride + columns[i]);
  }
  if (p.delta != nullptr) {
    if (p.post_norm != nullptr) {
      float squares = 0.f;
#pragma unroll
      for (const Vector& d : delta) squares += sum_of_squares(d);
      const float inverse = inverse_rms(block_sum(squares, scratch), p.n, p.eps);
#pragma unroll
      for (int i = 0; i < kNormVectors; ++i) {
        if (columns[i] >= p.n) continue;
        const Vector weight = load_vector(p.post_norm + columns[i]);
#pragma unroll
        for (int j = 0; j < kVector; ++j) delta[i].v[j] = delta[i].v[j] * inverse * weight.v[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kNormVectors; ++i) {
      if (columns[i] >= p.n) continue;
#pragma unroll
      for (int j = 0; j < kVector; ++j) x[i].v[j] += delta[i].v[j];
      store_vector(residual + columns[i], x[i]);
    }
  }
  if (p.out == nullptr) return;  // the same for the whole grid
  float squares = 0.f;
#pragma unroll
  for (const Vector& value : x) squares += sum_of_squares(value);
  // Other words than those of the first sum, so that no barrier has to part them.
  const float inverse = inverse_rms(block_sum(squares, scratch + kWarpSize), p.n, p.eps);
  Out* out = static_cast<Out*>(p.out) + blockIdx.x * p.out_stride;
#pragma unroll
  for (int i = 0; i < kNormVectors; ++i) {
    if (columns[i] >= p.n) continue;
    const Vector weight = load_vector(p.weight + columns[i]);
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[i].v[j] = x[i].v[j] * inverse * weight.v[j];
    store_vector(out + columns[i], x[i]);
  }
}

// ------------------------------------------------------------------------------------------- rope
__global__ void __launch_bounds__(kThreads)
    rope_table_kernel(const __grid_constant__ RopeTableParams p) {
  const int64_t index = global_thread();
  if (index >= int64_t{p.num_tokens} * p.half) return;
  const double angle = p.positions[index / p.half] * p.frequencies[index % p.half];
  const double factor = static_cast<double>(p.factor);
  p.cos[index] = static_cast<float>(cos(angle) * factor);
  p.sin[index] = static_cast<float>(sin(angle) * factor);
}

/// Lanes that share a head: each holds 16 of its values.
SAGE_DEVICE int head_lanes(int head_dim) { return head_dim <= 64 ? 4 : head_dim <= 128 ? 8 : 16; }

/// Two pieces of 8 values of a head, in places `at`: a rotated pair of pieces, or neighbours.
struct HeadPieces {
  Vector x[2];
  int at[2];
};

/// The largest magnitude and the sum over the lanes of a head.
SAGE_DEVICE float head_max(float value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) value = fmaxf(value, shfl_xor(value, mask));
  return value;
}
SAGE_DEVICE float head_sum(float value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  return value;
}

template <typename T>
SAGE_DEVICE void add_bias_and_norm(HeadPieces& head, const float* bias, const float* norm,
                                   const QkvParams& p, int lanes, bool active) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (bias == nullptr || !active) continue;
    const Vector b = load_vector(bias + head.at[i]);
#pragma unroll
    for (int j = 0; j < kVector; ++j) head.x[i].v[j] += b.v[j];
  }
  // Every lane of the warp comes along, whatever its head needs.
  const float squares = head_sum(sum_of_squares(head.x[0]) + sum_of_squares(head.x[1]), lanes);
  if (norm == nullptr || !active) return;
  const float inverse = inverse_rms(squares, p.kv.head_dim, p.eps);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Vector weight = load_vector(norm + head.at[i]);
#pragma unroll
    for (int j = 0; j < kVector; ++j) head.x[i].v[j] = head.x[i].v[j] * inverse * weight.v[j];
  }
}

SAGE_DEVICE void rotate(HeadPieces& head, const QkvParams& p, int64_t token) {
  const int64_t first = token * p.half + head.at[0];
  const Vector cos = load_vector(p.cos + first);
  const Vector sin = load_vector(p.sin + first);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const float a = head.x[0].v[j];
    const float b = head.x[1].v[j];
    head.x[0].v[j] = a * cos.v[j] - b * sin.v[j];
    head.x[1].v[j] = b * cos.v[j] + a * sin.v[j];
  }
}

template <typename Code>
SAGE_DEVICE uint2 encode(const Vector& x, float inverse) {
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const float value = x.v[j] * inverse;
    uint32_t code;
    if constexpr (std::is_same_v<Code, fp8>) {
      code = from_float<fp8>(value).bits;
    } else {
      code = static_cast<uint32_t>(__float2int_rn(fminf(fmaxf(value, -127.f), 127.f))) & 0xffu;
    }
    words[j / 4] |= code << (j % 4 * 8);
  }
  return make_uint2(words[0], words[1]);
}

/// Stores a row of K (plane 0) or V (plane 1).
SAGE_DEVICE void store_kv(const HeadPieces& head, const KvPages& kv, int slot, int kv_head,
                          int plane, float largest, bool first_lane) {
  const int64_t plane_bytes = kv_plane_bytes(kv.type, kv.page_size, kv.num_kv_heads, kv.head_dim);
  std::byte* block = kv.pool + slot / kv.page_size * kv.block_stride;
  const int64_t row = int64_t{kv_head} * kv.page_size + slot % kv.page_size;
  std::byte* to = block + plane * plane_bytes + row * kv.head_dim * kv_element_bytes(kv.type);
  if (!kv_has_scales(kv.type)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (kv.type == KvType::kBF16) {
        store_vector(reinterpret_cast<bf16*>(to) + head.at[i], head.x[i]);
      } else {
        store_vector(reinterpret_cast<f16*>(to) + head.at[i], head.x[i]);
      }
    }
    return;
  }
  const bool is_fp8 = kv.type == KvType::kFp8E4M3;
  const float scale = __fdiv_rn(largest, is_fp8 ? 448.f : 127.f);
  // Below this a row is stored as zeros: its inverse would not be finite.
  const float inverse = scale > 1e-36f ? __fdiv_rn(1.f, scale) : 0.f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    *reinterpret_cast<uint2*>(to + head.at[i]) =
        is_fp8 ? encode<fp8>(head.x[i], inverse) : encode<int8_t>(head.x[i], inverse);
  }
  if (!first_lane) return;
  auto* scales = reinterpret_cast<float*>(block + 2 * plane_bytes);
  scales[int64_t{plane} * kv.num_kv_heads * kv.page_size + row] = scale;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) finish_qkv_kernel(const __grid_constant__ QkvParams p) {
  const int dim = p.kv.head_dim;
  const int lanes = head_lanes(dim);
  const int heads = p.num_heads + 2 * p.kv.num_kv_heads;
  const int64_t index = global_thread() / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const bool active = index < int64_t{p.num_tokens} * heads && lane < dim / 16;
  const int64_t token = active ? index / heads : 0;
  const int head_index = active ? static_cast<int>(index % heads) : 0;
  const int group = head_index < p.num_heads                       ? 0
                    : head_index < p.num_heads + p.kv.num_kv_heads ? 1
                                                                   : 2;  // q, k, v
  const bool rotated = group < 2 && lane < p.half / kVector;
  HeadPieces head;
  head.at[0] = lane * (lane < p.half / kVector ? kVector : 2 * kVector);
  head.at[1] = head.at[0] + (lane < p.half / kVector ? p.half : kVector);
  const int64_t column = int64_t{head_index} * dim;
  const T* from = static_cast<const T*>(p.qkv) + token * p.stride + column;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    head.x[i] = active ? load_vector(from + head.at[i]) : zero_vector();
  }
  add_bias_and_norm<T>(head, p.bias != nullptr ? p.bias + column : nullptr,
                       group == 0   ? p.q_norm
                       : group == 1 ? p.k_norm
                                    : nullptr,
                       p, lanes, active);
  if (active && rotated) rotate(head, p, token);
  float largest = 0.f;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    largest = fmaxf(largest, fmaxf(fabsf(head.x[0].v[j]), fabsf(head.x[1].v[j])));
  }
  largest = head_max(active ? largest : 0.f, lanes);
  if (!active) return;
  if (group == 0) {
    const int64_t at = token * p.q_stride + column;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (p.q_type == FloatType::kBF16) {
        store_vector(static_cast<bf16*>(p.q) + at + head.at[i], head.x[i]);
      } else {
        store_vector(static_cast<f16*>(p.q) + at + head.at[i], head.x[i]);
      }
    }
    return;
  }
  const int slot = p.slots[token];
  if (slot < 0) return;
  const int kv_head = head_index - p.num_heads - (group - 1) * p.kv.num_kv_heads;
  store_kv(head, p.kv, slot, kv_head, group - 1, largest, lane == 0);
}

// ------------------------------------------------------------------------------- gate, cap,
// convert
SAGE_DEVICE float silu(float x) { return __fdiv_rn(x, 1.f + expf(-x)); }
SAGE_DEVICE float gelu_tanh(float x) {
  const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.f + tanhf(inner));
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) gated_kernel(const __grid_constant__ GatedParams p) {
  const int pieces = p.n / kVector;
  const int64_t index = global_thread();
  if (index >= int64_t{p.num_rows} * pieces) return;
  const int64_t row = index / pieces;
  const int64_t column = index % pieces * kVector;
  const In* from = static_cast<const In*>(p.x) + row * p.x_stride + column;
  const Vector gate = load_vector(from);
  const Vector up = load_vector(from + p.n);
  Vector out;
  if (p.function == GateFunction::kSilu) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) out.v[j] = silu(gate.v[j]) * up.v[j];
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) out.v[j] = gelu_tanh(gate.v[j]) * up.v[j];
  }
  store_vector(static_cast<Out*>(p.out) + row * p.out_stride + column, out);
}

__global__ void __launch_bounds__(kThreads)
    softcap_kernel(const __grid_constant__ SoftcapParams p) {
  const int64_t at = global_thread() * kVector;
  if (at >= p.count) return;
  Vector x = load_vector<float, false>(p.x + at);
#pragma unroll
  for (float& v : x.v) v = p.cap * tanhf(__fdiv_rn(v, p.cap));
  store_vector(p.x + at, x);
}

template <typename From, typename To>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const __grid_constant__ ConvertParams p) {
  const int64_t at = global_thread() * kVector;
  if (at >= p.count) return;
  store_vector(static_cast<To*>(p.to) + at, load_vector(static_cast<const From*>(p.from) + at));
}

template <typename Delta, typename Out>
void launch_norm(const AddRmsNormParams& p, void* stream) {
  launch(add_rms_norm_kernel<Delta, Out>, Grid{static_cast<uint32_t>(p.num_rows)},
         static_cast<uint32_t>(norm_threads(p.n)), 2 * kWarpSize * sizeof(float), stream, p);
}

template <typename In, typename Out>
void launch_gated(const GatedParams& p, void* stream) {
  launch(gated_kernel<In, Out>, blocks_for(int64_t{p.num_rows} * (p.n / kVector)), kThreads, 0,
         stream, p);
}

template <typename From, typename To>
void launch_convert(const ConvertParams& p, void* stream) {
  launch(convert_kernel<From, To>, blocks_for(p.count / kVector), kThreads, 0, stream, p);
}

}  // namespace

void embedding(FloatType table, const EmbeddingParams& p, void* stream) {
  if (p.num_tokens == 0) return;
  const Grid grid = blocks_for(int64_t{p.num_tokens} * (p.n / kVector));
  const auto kernel = table == FloatType::kBF16  ? embedding_kernel<bf16>
                      : table == FloatType::kF16 ? embedding_kernel<f16>
                                                 : embedding_kernel<float>;
  launch(kernel, grid, kThreads, 0, stream, p);
}

void add_rms_norm(FloatType delta, FloatType out, const AddRmsNormParams& p, void* stream) {
  if (p.num_rows == 0) return;
  const bool wide = delta == FloatType::kF32;
  if (out == FloatType::kF32) return launch_norm<float, float>(p, stream);
  if (out == FloatType::kBF16) {
    return wide ? launch_norm<float, bf16>(p, stream) : launch_norm<bf16, bf16>(p, stream);
  }
  return wide ? launch_norm<float, f16>(p, stream) : launch_norm<f16, f16>(p, stream);
}

void rope_table(const RopeTableParams& p, void* stream) {
  if (p.num_tokens == 0 || p.half == 0) return;
  launch(rope_table_kernel, blocks_for(int64_t{p.num_tokens} * p.half), kThreads, 0, stream, p);
}

void finish_qkv(FloatType input, const QkvParams& p, void* stream) {
  if (p.num_tokens == 0) return;
  const int dim = p.kv.head_dim;
  const int lanes = dim <= 64 ? 4 : dim <= 128 ? 8 : 16;
  const int64_t heads = int64_t{p.num_tokens} * (p.num_heads + 2 * p.kv.num_kv_heads);
  const auto kernel = input == FloatType::kBF16  ? finish_qkv_kernel<bf16>
                      : input == FloatType::kF16 ? finish_qkv_kernel<f16>
                                                 : finish_qkv_kernel<float>;
  launch(kernel, blocks_for(heads * lanes), kThreads, 0, stream, p);
}

void gated_activation(FloatType input, FloatType output, const GatedParams& p, void* stream) {
  if (p.num_rows == 0) return;
  if (input == FloatType::kBF16) return launch_gated<bf16, bf16>(p, stream);
  if (input == FloatType::kF16) return launch_gated<f16, f16>(p, stream);
  if (output == FloatType::kBF16) return launch_gated<float, bf16>(p, stream);
  if (output == FloatType::kF16) return launch_gated<float, f16>(p, stream);
  launch_gated<float, float>(p, stream);
}

void softcap(const SoftcapParams& p, void* stream) {
  if (p.count == 0) return;
  launch(softcap_kernel, blocks_for(p.count / kVector), kThreads, 0, stream, p);
}

void convert(FloatType from, FloatType to, const ConvertParams& p, void* stream) {
  if (p.count == 0) return;
  if (from == FloatType::kBF16) return launch_convert<bf16, float>(p, stream);
  if (from == FloatType::kF16) return launch_convert<f16, float>(p, stream);
  if (to == FloatType::kBF16) return launch_convert<float, bf16>(p, stream);
  launch_convert<float, f16>(p, stream);
}

}  // namespace sagellm::kernels::cuda
