// FP8 weights without FP8 arithmetic, and rows of activations as FP8.
#include "sagellm/kernels/cuda/fp8.h"
#include "sagellm/kernels/cuda/small_tile.cuh"
#include "sagellm/kernels/cuda/vector.cuh"

namespace sagellm::kernels::cuda {

namespace {

// -------------------------------------------------------------------------------------- few rows
/// The codes in bytes 1 and 3 of `word` as two numbers of T, exactly: kShrunk<T> times too small.
template <typename T>
SAGE_DEVICE uint32_t widen_odd(uint32_t word) {
  if constexpr (std::is_same_v<T, f16>) {
    return (word & 0x80008000u) | (word >> 1 & 0x3f803f80u);
  } else {
    // The fraction's last bit moves to bit 4: the exponent lacks 120, which a product gives back,
    // to subnormal codes too.
    constexpr uint32_t kTwoTo120 = 0x7b807b80u;
    return mul_bf16x2((word & 0x80008000u) | (word >> 4 & 0x07f007f0u), kTwoTo120);
  }
}
template <typename T>
inline constexpr float kShrunk = std::is_same_v<T, f16> ? 256.f : 1.f;

/// A lane's share of 16 rows and 128 columns: of rows r and r + 8 the columns 64 piece + 16 c ..
/// + 15.
struct Step {
  uint4 codes[2][2];  // [row][piece]
  float scales[2];
};

SAGE_DEVICE uint32_t word_of(const uint4& words, int index) {
  return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
}

SAGE_DEVICE Step load_step(const Fp8Matrix& weights, const int (&rows)[2], int begin) {
  const float* scales =
      weights.scales + (weights.groups > 1 ? int64_t{begin / kFp8Group} * weights.n : 0);
  Step step;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint8_t* row = weights.codes + int64_t{rows[i]} * weights.k;
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      const int column = begin + piece * 64 + lane_id() % 4 * 16;
      step.codes[i][piece] =
          column < weights.k ? load_stream(row + column) : make_uint4(0, 0, 0, 0);
    }
    step.scales[i] = scales[rows[i]];
  }
  return step;
}

/// sums += the step's columns times those of row lane / 4 of x.
template <typename T>
SAGE_DEVICE void multiply_step(float (&sums)[4], const Step& step, const T* x, bool x_valid,
                               int begin, int k) {
  float dots[4] = {};
#pragma unroll
  for (int piece = 0; piece < 2; ++piece) {
    const int column = begin + piece * 64 + lane_id() % 4 * 16;
    uint4 values[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
    if (x_valid && column < k) {
      values[0] = *reinterpret_cast<const uint4*>(x + column);
      values[1] = *reinterpret_cast<const uint4*>(x + column + 8);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Four columns: 0 and 2 in the first words of the fragments, 1 and 3 in the second.
      const uint32_t codes[2] = {word_of(step.codes[0][piece], i),
                                 word_of(step.codes[1][piece], i)};
      const uint32_t a[4] = {widen_odd<T>(codes[0] << 8), widen_odd<T>(codes[1] << 8),
                             widen_odd<T>(codes[0]), widen_odd<T>(codes[1])};
      const uint32_t low = word_of(values[i / 2], i % 2 * 2);
      const uint32_t high = word_of(values[i / 2], i % 2 * 2 + 1);
      const uint32_t b[2] = {(low & 0xffffu) | high << 16, low >> 16 | (high & 0xffff0000u)};
      mma_m16n8k16<T>(dots, a, b);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums[i] = fmaf(step.scales[i / 2] * kShrunk<T>, dots[i], sums[i]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    fp8_small_linear_kernel(const __grid_constant__ Fp8SmallLinearParams p) {
  const int lane = lane_id();
  const int first_row = static_cast<int>(blockIdx.x) * kTileRows;
  const Fp8Matrix& w = p.weights;
  // Rows beyond the matrix read its last row; their sums are not stored.
  const int rows[2] = {min(first_row + lane / 4, w.n - 1), min(first_row + lane / 4 + 8, w.n - 1)};
  const T* x = static_cast<const T*>(p.x) + lane / 4 * p.x_stride;
  float sums[4] = {};
  int begin = warp_id() * kFp8Group;
  if (begin < w.k) {
    Step present = load_step(w, rows, begin);
    for (; begin < w.k; begin += kTileWarps * kFp8Group) {
      // The next step is on its way while this one is multiplied.
      const int next = begin + kTileWarps * kFp8Group;
      Step following = present;
      if (next < w.k) following = load_step(w, rows, next);
      multiply_step<T>(sums, present, x, lane / 4 < p.m, begin, w.k);
      present = following;
    }
  }
  store_tile(sums, shared_memory<float>(), p, w.n);
}

// ------------------------------------------------------------------------------------ activations
constexpr int kQuantizeThreads = 256;
constexpr float kLargest = 448.f;  // of e4m3

template <typename T>
__global__ void __launch_bounds__(kQuantizeThreads)
    fp8_quantize_kernel(const __grid_constant__ Fp8QuantizeParams p) {
  const T* x = static_cast<const T*>(p.x) + blockIdx.x * p.x_stride;
  const int first = static_cast<int>(threadIdx.x) * kVector;
  const float infinity = bits_to_float(0x7f800000u);
  float largest = 0.f;
  for (int column = first; column < p.k; column += kQuantizeThreads * kVector) {
    const Vector values = load_vector<T, false>(x + column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float magnitude = fabsf(values.v[i]);
      largest = fmaxf(largest, magnitude < infinity ? magnitude : infinity);  // NaN too
    }
  }
  auto* scratch = shared_memory<float>();
  largest = warp_max(largest);
  if (lane_id() == 0) scratch[warp_id()] = largest;
  sync_block();
  largest = warp_max(lane_id() < kQuantizeThreads / kWarpSize ? scratch[lane_id()] : 0.f);

  const bool usable = largest > 1e-30f && largest < infinity;  // else 448 / largest is not finite
  const float inverse = usable ? __fdiv_rn(kLargest, largest) : 0.f;
  uint8_t* codes = p.codes + int64_t{blockIdx.x} * p.k;
  for (int column = first; column < p.k; column += kQuantizeThreads * kVector) {
    const Vector values = load_vector<T, false>(x + column);
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      words[i / 4] |= static_cast<uint32_t>(from_float<fp8>(values.v[i] * inverse).bits)
                      << (8 * (i % 4));
    }
    *reinterpret_cast<uint2*>(codes + column) = make_uint2(words[0], words[1]);
  }
  if (threadIdx.x == 0) {
    const float scale = usable ? __fdiv_rn(largest, kLargest) : 0.f;
    p.scales[blockIdx.x] = largest < infinity ? scale : bits_to_float(0x7fc00000u);
  }
}

// ----------------------------------------------------------------------------------------- values
constexpr int kDequantizeThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kDequantizeThreads)
    fp8_dequantize_kernel(const __grid_constant__ Fp8DequantizeParams p) {
  const Fp8Matrix& w = p.weights;
  const int column = static_cast<int>(blockIdx.y * kDequantizeThreads + threadIdx.x) * 16;
  if (column >= w.k) return;
  const int row = p.first_row + static_cast<int>(blockIdx.x);
  const int group = w.groups > 1 ? column / kFp8Group : 0;
  const float scale = w.scales[int64_t{group} * w.n + row];
  const uint4 codes = load_stream(w.codes + int64_t{row} * w.k + column);
  T* out = static_cast<T*>(p.out) + int64_t{blockIdx.x} * w.k + column;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vector values;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const uint32_t word = word_of(codes, 2 * half + i / 4);
      values.v[i] = to_float(fp8{static_cast<uint8_t>(word >> (8 * (i % 4)))}) * scale;
    }
    store_vector(out + half * kVector, values);
  }
}

}  // namespace

void fp8_small_linear(const Fp8SmallLinearParams& p, void* stream) {
  if (p.m == 0 || p.weights.n == 0) return;
  const Grid grid{static_cast<uint32_t>((p.weights.n + kTileRows - 1) / kTileRows)};
  const auto kernel =
      p.type == FloatType::kBF16 ? fp8_small_linear_kernel<bf16> : fp8_small_linear_kernel<f16>;
  launch(kernel, grid, kTileThreads, kTileScratch, stream, p);
}

void fp8_quantize(FloatType x, const Fp8QuantizeParams& p, void* stream) {
  if (p.m == 0) return;
  const auto kernel = x == FloatType::kBF16  ? fp8_quantize_kernel<bf16>
                      : x == FloatType::kF16 ? fp8_quantize_kernel<f16>
                                             : fp8_quantize_kernel<float>;
  constexpr size_t kScratch = sizeof(float) * kQuantizeThreads / kWarpSize;
  launch(kernel, Grid{static_cast<uint32_t>(p.m)}, kQuantizeThreads, kScratch, stream, p);
}

void fp8_dequantize(const Fp8DequantizeParams& p, void* stream) {
  if (p.num_rows == 0) return;
  constexpr int kColumns = kDequantizeThreads * 16;
  const Grid grid{static_cast<uint32_t>(p.num_rows),
                  static_cast<uint32_t>((p.weights.k + kColumns - 1) / kColumns)};
  const auto kernel =
      p.out_type == FloatType::kBF16 ? fp8_dequantize_kernel<bf16> : fp8_dequantize_kernel<f16>;
  launch(kernel, grid, kDequantizeThreads, 0, stream, p);
}

}  // namespace sagellm::kernels::cuda
