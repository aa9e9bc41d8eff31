// Small products with quantized weights, and their values. A step of 16 rows and 128 columns is
// what a warp holds at a time; its codes are int8 operands of mma after a shift and a mask, so that
// up to 8 rows of x cost about as many instructions as one, and none of them limits the memory.
#include "sagellm/kernels/cuda/quantized.h"
#include "sagellm/kernels/cuda/small_tile.cuh"
#include "sagellm/kernels/cuda/vector.cuh"

namespace sagellm::kernels::cuda {

namespace {

/// What is compiled for a format. value = d * (code - kOffset) + m.
template <int Bits, int Offset, bool Minima, int Supers>
struct Traits {
  static constexpr int kBits = Bits;
  static constexpr int kOffset = Offset;
  static constexpr bool kMinima = Minima;  // m of its own
  static constexpr bool kHasSupers = Supers > 0;
  static constexpr bool kHalfScales = Supers == 2;  // one scale per 16 columns, no minima
};
using TraitsQ4_0 = Traits<4, 8, false, 0>;
using TraitsQ4_1 = Traits<4, 0, true, 0>;
using TraitsQ5_0 = Traits<5, 16, false, 0>;
using TraitsQ5_1 = Traits<5, 0, true, 0>;
using TraitsQ8_0 = Traits<8, 0, false, 0>;
using TraitsQ4_K = Traits<4, 0, false, 1>;
using TraitsQ5_K = Traits<5, 0, false, 1>;
using TraitsQ6_K = Traits<6, 32, false, 2>;

/// A lane's share of a step, as it lies in memory.
template <typename F>
struct Step {
  uint4 codes[F::kBits == 8 ? 4 : 2];
  uint4 high;  // x, y for 5 bits
  uint4 scales;
  uint4 minima;
  uint2 super;
};

SAGE_DEVICE uint32_t word_of(const uint4& words, int index) {
  return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
}

template <typename F>
SAGE_DEVICE Step<F> load_step(const uint8_t* tile_row, const QuantLayout& layout, int step) {
  const uint8_t* from = tile_row + int64_t{step} * layout.step_bytes;
  const int lane = lane_id();
  const int row = lane / 4;
  Step<F> out;
#pragma unroll
  for (int i = 0; i < (F::kBits == 8 ? 4 : 2); ++i) {
    out.codes[i] = load_stream(from + i * 512 + lane * 16);
  }
  if constexpr (F::kBits == 5) {
    const uint2 pair = *reinterpret_cast<const uint2*>(from + 1024 + lane * 8);
    out.high.x = pair.x;
    out.high.y = pair.y;
  } else if constexpr (F::kBits == 6) {
    out.high = load_stream(from + 1024 + lane * 16);
  }
  constexpr int kScaleOffset = F::kBits == 8 ? 2048
                                             : 1024 + (F::kBits == 5   ? 256
                                                       : F::kBits == 6 ? 512
                                                                       : 0);
  out.scales = load_stream(from + kScaleOffset + row * 16);
  if constexpr (F::kMinima) out.minima = load_stream(from + kScaleOffset + 128 + row * 16);
  if constexpr (F::kHasSupers) {
    out.super = *reinterpret_cast<const uint2*>(tile_row + layout.super_offset() +
                                                int64_t{step / 2} * 64 + row * 8);
  }
  return out;
}

/// The four codes of row i, unit u, half h as bytes.
template <typename F>
SAGE_DEVICE uint32_t codes_of(const Step<F>& step, int i, int u, int h) {
  if constexpr (F::kBits == 8) {
    return word_of(step.codes[2 * i + h], u);
  } else {
    uint32_t codes = (word_of(step.codes[i], u) >> (4 * h)) & 0x0f0f0f0fu;
    if constexpr (F::kBits == 5) {
      const uint32_t high = i == 0 ? step.high.x : step.high.y;
      codes |= (high >> (2 * u + h) & 0x01010101u) << 4;
    } else if constexpr (F::kBits == 6) {
      const uint32_t high = word_of(step.high, 2 * i + u / 2);
      codes |= (high >> (4 * (u % 2) + 2 * h) & 0x03030303u) << 4;
    }
    return codes;
  }
}

SAGE_DEVICE uint32_t half_word(const uint4& words, int index) {
  return word_of(words, index / 2) >> (index % 2 * 16) & 0xffffu;
}

/// The scale of row i, unit u, half h.
template <typename F>
SAGE_DEVICE float scale_of(const Step<F>& step, int i, int u, int h) {
  const uint32_t bits = half_word(step.scales, 4 * i + u);
  if constexpr (!F::kHasSupers) return f16_bits_to_float(static_cast<uint16_t>(bits));
  const float d = f16_bits_to_float(static_cast<uint16_t>(i == 0 ? step.super.x : step.super.y));
  if constexpr (F::kHalfScales) {
    return d * static_cast<float>(static_cast<int8_t>(bits >> (8 * h)));
  }
  return d * static_cast<float>(bits & 0xffu);
}

/// What is added to each column of row i, unit u.
template <typename F>
SAGE_DEVICE float minimum_of(const Step<F>& step, int i, int u) {
  if constexpr (F::kMinima) {
    return f16_bits_to_float(static_cast<uint16_t>(half_word(step.minima, 4 * i + u)));
  } else {
    static_assert(F::kHasSupers && !F::kHalfScales);
    const uint32_t super = i == 0 ? step.super.x : step.super.y;
    const float dmin = f16_bits_to_float(static_cast<uint16_t>(super >> 16));
    return -(dmin * static_cast<float>(half_word(step.scales, 4 * i + u) >> 8));
  }
}
template <typename F>
inline constexpr bool kAddsMinimum = F::kMinima || (F::kHasSupers && !F::kHalfScales);

// ------------------------------------------------------------------------------------ activations
// A step of quantized x: 2 pieces per lane of codes, [pair of units][lane 4 n + c][unit][half] of
// words with columns 4 c .. 4 c + 3 of row n; then [unit][n] of d and the two halves' sums as
// int16.
constexpr int kActivationStepBytes = (kStepColumns + kStepColumns / 4) * kQuantColumns;
constexpr int kActivationMetaOffset = kStepColumns * kQuantColumns;

template <typename T>
__global__ void __launch_bounds__(128)
    quantize_rows_kernel(const __grid_constant__ QuantizeRowsParams p) {
  // A warp does one unit of one row, a lane one column.
  const int unit = static_cast<int>(blockIdx.x);
  const int n = static_cast<int>(blockIdx.y) * 4 + warp_id();
  const int lane = lane_id();
  const int column = unit * kUnitColumns + lane;
  float x = 0.f;
  if (n < p.m && column < p.k) x = to_float(static_cast<const T*>(p.x)[n * p.x_stride + column]);
  const float largest = warp_max(fabsf(x));
  const float d = __fdiv_rn(largest, 127.f);
  const float inverse = d > 1e-36f ? __fdiv_rn(127.f, largest) : 0.f;
  const int code = __float2int_rn(x * inverse);
  int sum = code;  // over 16 lanes
#pragma unroll
  for (int mask = 8; mask > 0; mask /= 2) sum += shfl_xor(sum, mask);
  const int other = shfl_xor(sum, 16);
  uint8_t* step = p.data + int64_t{unit / 4} * kActivationStepBytes;
  const int u = unit % 4;
  step[u / 2 * 512 + (4 * n + lane % 16 / 4) * 16 + u % 2 * 8 + lane / 16 * 4 + lane % 4] =
      static_cast<uint8_t>(code);
  if (lane == 0) {
    const auto sums = static_cast<uint32_t>(sum & 0xffff) | static_cast<uint32_t>(other) << 16;
    *reinterpret_cast<uint2*>(step + kActivationMetaOffset + (u * kQuantColumns + n) * 8) =
        make_uint2(float_to_bits(inverse == 0.f ? 0.f : d), sums);
  }
}

// ----------------------------------------------------------------------------------------- product
/// Adds a step to the sums: sums[2 i + j] belongs to row r + 8 i and row 2 c + j of x.
template <typename F>
SAGE_DEVICE void multiply_step(float (&sums)[4], const Step<F>& step, const uint8_t* x) {
  const int lane = lane_id();
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const uint4 words = *reinterpret_cast<const uint4*>(x + pair * 512 + lane * 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int u = 2 * pair + half;
      const uint32_t b[2] = {half == 0 ? words.x : words.z, half == 0 ? words.y : words.w};
      const uint32_t a[4] = {codes_of(step, 0, u, 0), codes_of(step, 1, u, 0),
                             codes_of(step, 0, u, 1), codes_of(step, 1, u, 1)};
      // d and sums of rows 2 c and 2 c + 1 of x.
      const uint4 meta = *reinterpret_cast<const uint4*>(x + kActivationMetaOffset +
                                                         (u * kQuantColumns + 2 * (lane % 4)) * 8);
      const float d[2] = {bits_to_float(meta.x), bits_to_float(meta.z)};
      const int low[2] = {static_cast<int16_t>(meta.y), static_cast<int16_t>(meta.w)};
      const int high[2] = {static_cast<int32_t>(meta.y) >> 16, static_cast<int32_t>(meta.w) >> 16};
      if constexpr (F::kHalfScales) {
        int32_t first[4] = {}, second[4] = {};
        const uint32_t a_first[4] = {a[0], a[1], 0, 0}, b_first[2] = {b[0], 0};
        const uint32_t a_second[4] = {a[2], a[3], 0, 0}, b_second[2] = {b[1], 0};
        mma_m16n8k32_s8(first, a_first, b_first);
        mma_m16n8k32_s8(second, a_second, b_second);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float dots =
              scale_of(step, i / 2, u, 0) * static_cast<float>(first[i] - F::kOffset * low[i % 2]) +
              scale_of(step, i / 2, u, 1) *
                  static_cast<float>(second[i] - F::kOffset * high[i % 2]);
          sums[i] = fmaf(d[i % 2], dots, sums[i]);
        }
      } else {
        int32_t dots[4] = {};
        mma_m16n8k32_s8(dots, a, b);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int total = low[i % 2] + high[i % 2];
          float value =
              scale_of(step, i / 2, u, 0) * static_cast<float>(dots[i] - F::kOffset * total);
          if constexpr (kAddsMinimum<F>) {
            value = fmaf(minimum_of(step, i / 2, u), static_cast<float>(total), value);
          }
          sums[i] = fmaf(d[i % 2], value, sums[i]);
        }
      }
    }
  }
}

template <typename F>
__global__ void __launch_bounds__(kTileThreads, 2)
    quantized_linear_kernel(const __grid_constant__ QuantizedLinearParams p) {
  const QuantLayout& layout = p.weights.layout;
  const uint8_t* tile_row = p.weights.data + blockIdx.x * layout.tile_row_bytes;
  float sums[4] = {};
  int step = warp_id();
  if (step < layout.steps) {
    Step<F> present = load_step<F>(tile_row, layout, step);
    for (; step < layout.steps; step += kTileWarps) {
      // The next step is on its way while this one is multiplied.
      Step<F> following = present;
      if (step + kTileWarps < layout.steps)
        following = load_step<F>(tile_row, layout, step + kTileWarps);
      multiply_step<F>(sums, present, p.x + int64_t{step} * kActivationStepBytes);
      present = following;
    }
  }
  store_tile(sums, shared_memory<float>(), p, p.weights.n);
}

// ------------------------------------------------------------------------------------------ values
/// The values of columns 32 u + 16 h + 4 c .. + 3 of row i.
template <typename F>
SAGE_DEVICE float4 values_of(const Step<F>& step, int i, int u, int h) {
  const uint32_t codes = codes_of(step, i, u, h);
  const float scale = scale_of(step, i, u, h);
  float minimum = 0.f;
  if constexpr (kAddsMinimum<F>) minimum = minimum_of(step, i, u);
  const auto value = [&](int j) {
    const uint32_t byte = codes >> (8 * j) & 0xffu;
    const int code = F::kBits == 8 ? static_cast<int8_t>(byte) : static_cast<int>(byte);
    const float product = scale * static_cast<float>(code - F::kOffset);
    return kAddsMinimum<F> ? product + minimum : product;
  };
  return make_float4(value(0), value(1), value(2), value(3));
}

constexpr int kDequantizeThreads = 128;

template <typename F>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_kernel(const __grid_constant__ DequantizeParams p) {
  const QuantLayout& layout = p.weights.layout;
  const int first_step = p.first_column / kStepColumns;
  const int step =
      first_step + static_cast<int>(blockIdx.x) * (kDequantizeThreads / kWarpSize) + warp_id();
  const int last_column = p.first_column + p.num_columns;
  if (step * kStepColumns >= last_column) return;
  const int tile = p.first_row / kTileRows + static_cast<int>(blockIdx.y);
  const auto share = load_step<F>(p.weights.data + tile * layout.tile_row_bytes, layout, step);
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = static_cast<int>(blockIdx.y) * kTileRows + lane / 4 + 8 * i;
    if (row >= p.num_rows) continue;
    auto* out = static_cast<uint16_t*>(p.out) + row * p.out_stride - p.first_column;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int unit_column = step * kStepColumns + u * kUnitColumns;
      if (unit_column < p.first_column || unit_column >= last_column) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 v = values_of(share, i, u, h);
        *reinterpret_cast<uint2*>(out + unit_column + 16 * h + lane % 4 * 4) =
            p.out_type == FloatType::kBF16 ? make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w))
                                           : make_uint2(pack_f16(v.x, v.y), pack_f16(v.z, v.w));
      }
    }
  }
}

template <typename F>
__global__ void __launch_bounds__(kDequantizeThreads)
    quantized_embedding_kernel(const __grid_constant__ QuantizedEmbeddingParams p) {
  // A warp reads a step of the tile row that has the token and keeps its row: 8 times too much, of
  // little.
  const QuantLayout& layout = p.weights.layout;
  const int step = static_cast<int>(blockIdx.y) * (kDequantizeThreads / kWarpSize) + warp_id();
  if (step >= layout.steps) return;
  const int token = p.token_ids[blockIdx.x];
  const auto share =
      load_step<F>(p.weights.data + token / kTileRows * layout.tile_row_bytes, layout, step);
  const int lane = lane_id();
  if (lane / 4 != token % 8) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i != token % kTileRows / 8) continue;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int unit_column = step * kStepColumns + u * kUnitColumns;
      if (unit_column >= p.weights.k) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 v = values_of(share, i, u, h);
        *reinterpret_cast<float4*>(p.out + blockIdx.x * p.out_stride + unit_column + 16 * h +
                                   lane % 4 * 4) =
            make_float4(v.x * p.scale, v.y * p.scale, v.z * p.scale, v.w * p.scale);
      }
    }
  }
}

// ----------------------------------------------------------------------------------- dense weights
constexpr int kDenseColumns = 128;  // of a warp's turn: 4 pieces of 32, lane c has 8 c .. 8 c + 7

template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    small_linear_kernel(const __grid_constant__ SmallLinearParams p) {
  const int lane = lane_id();
  const int first_row = static_cast<int>(blockIdx.x) * kTileRows;
  // Rows beyond the matrix read its last row; their sums are not stored.
  const int rows[2] = {min(first_row + lane / 4, p.n - 1), min(first_row + lane / 4 + 8, p.n - 1)};
  const T* weights = static_cast<const T*>(p.weights);
  const T* x = static_cast<const T*>(p.x) + lane / 4 * p.x_stride;
  const bool x_valid = lane / 4 < p.m;
  float sums[4] = {};
  for (int begin = warp_id() * kDenseColumns; begin < p.k; begin += kTileWarps * kDenseColumns) {
    uint4 a[2][4], b[4];
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
      const int column = begin + piece * 32 + lane % 4 * 8;
      const bool inside = column < p.k;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[i][piece] = inside ? load_stream(weights + rows[i] * p.weights_stride + column)
                             : make_uint4(0, 0, 0, 0);
      }
      b[piece] =
          inside && x_valid ? *reinterpret_cast<const uint4*>(x + column) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
      // The same permutation of columns in both operands leaves the product as it is.
      const uint32_t a_first[4] = {a[0][piece].x, a[1][piece].x, a[0][piece].y, a[1][piece].y};
      const uint32_t b_first[2] = {b[piece].x, b[piece].y};
      mma_m16n8k16<T>(sums, a_first, b_first);
      const uint32_t a_second[4] = {a[0][piece].z, a[1][piece].z, a[0][piece].w, a[1][piece].w};
      const uint32_t b_second[2] = {b[piece].z, b[piece].w};
      mma_m16n8k16<T>(sums, a_second, b_second);
    }
  }
  store_tile(sums, shared_memory<float>(), p, p.n);
}

template <typename F>
void launch_dequantize(const DequantizeParams& p, void* stream) {
  constexpr int kWarpsOfBlock = kDequantizeThreads / kWarpSize;
  const int steps = (p.first_column + p.num_columns + kStepColumns - 1) / kStepColumns -
                    p.first_column / kStepColumns;
  const Grid grid{static_cast<uint32_t>((steps + kWarpsOfBlock - 1) / kWarpsOfBlock),
                  static_cast<uint32_t>((p.num_rows + kTileRows - 1) / kTileRows)};
  launch(dequantize_kernel<F>, grid, kDequantizeThreads, 0, stream, p);
}

template <typename F>
void launch_embedding(const QuantizedEmbeddingParams& p, void* stream) {
  constexpr int kWarpsOfBlock = kDequantizeThreads / kWarpSize;
  const int steps = p.weights.layout.steps;
  const Grid grid{static_cast<uint32_t>(p.num_tokens),
                  static_cast<uint32_t>((steps + kWarpsOfBlock - 1) / kWarpsOfBlock)};
  launch(quantized_embedding_kernel<F>, grid, kDequantizeThreads, 0, stream, p);
}

/// Calls `body` with the traits of a format that quant_layout has accepted.
template <typename Body>
void with_traits(Format format, const Body& body) {
  switch (format) {
    case Format::kQ4_0:
      return body(TraitsQ4_0{});
    case Format::kQ4_1:
      return body(TraitsQ4_1{});
    case Format::kQ5_0:
      return body(TraitsQ5_0{});
    case Format::kQ5_1:
      return body(TraitsQ5_1{});
    case Format::kQ4_K:
      return body(TraitsQ4_K{});
    case Format::kQ5_K:
      return body(TraitsQ5_K{});
    case Format::kQ6_K:
      return body(TraitsQ6_K{});
    default:
      return body(TraitsQ8_0{});
  }
}

}  // namespace

void quantize_rows(FloatType x, const QuantizeRowsParams& p, void* stream) {
  const int units = (p.k + kStepColumns - 1) / kStepColumns * (kStepColumns / kUnitColumns);
  const auto kernel = x == FloatType::kBF16  ? quantize_rows_kernel<bf16>
                      : x == FloatType::kF16 ? quantize_rows_kernel<f16>
                                             : quantize_rows_kernel<float>;
  launch(kernel, Grid{static_cast<uint32_t>(units), 2}, 128, 0, stream, p);
}

void quantized_linear(const QuantizedLinearParams& p, void* stream) {
  if (p.m == 0) return;
  const Grid grid{static_cast<uint32_t>(p.weights.layout.tile_rows)};
  with_traits(p.weights.format, [&]<typename F>(F) {
    launch(quantized_linear_kernel<F>, grid, kTileThreads, kTileScratch, stream, p);
  });
}

void dequantize(const DequantizeParams& p, void* stream) {
  if (p.num_rows == 0 || p.num_columns == 0) return;
  with_traits(p.weights.format, [&]<typename F>(F) { launch_dequantize<F>(p, stream); });
}

void quantized_embedding(const QuantizedEmbeddingParams& p, void* stream) {
  if (p.num_tokens == 0) return;
  with_traits(p.weights.format, [&]<typename F>(F) { launch_embedding<F>(p, stream); });
}

void small_linear(const SmallLinearParams& p, void* stream) {
  if (p.m == 0 || p.n == 0) return;
  const Grid grid{static_cast<uint32_t>((p.n + kTileRows - 1) / kTileRows)};
  const auto kernel =
      p.type == FloatType::kBF16 ? small_linear_kernel<bf16> : small_linear_kernel<f16>;
  launch(kernel, grid, kTileThreads, kTileScratch, stream, p);
}

}  // namespace sagellm::kernels::cuda
