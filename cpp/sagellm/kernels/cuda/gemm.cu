// A block computes a tile of the output: a ring of stages in shared memory, filled by cp.async,
// read by ldmatrix, multiplied by mma. Two tile shapes, one for many rows and one that spreads the
// weights over the chip when there are few; both add in the same order.
#include "sagellm/kernels/cuda/gemm.h"
#include "sagellm/kernels/cuda/ptx.cuh"

namespace sagellm::kernels::cuda {

namespace {

/// Rows x columns of the block's tile, depth of a stage, warps along rows and columns, stages.
template <int Rows, int Columns, int Depth, int RowWarps, int ColumnWarps, int Stages>
struct Tile {
  static constexpr int kRows = Rows, kColumns = Columns, kDepth = Depth, kStages = Stages;
  static constexpr int kColumnWarps = ColumnWarps;
  static constexpr int kThreads = RowWarps * ColumnWarps * kWarpSize;
  static constexpr int kWarpRows = Rows / RowWarps, kWarpColumns = Columns / ColumnWarps;
  static constexpr int kStageElements = (Rows + Columns) * Depth;
  static constexpr size_t kSharedBytes = size_t{2} * kStageElements * Stages;
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 8 == 0 && Depth % 32 == 0);
};
using ManyRows = Tile<128, 128, 32, 2, 2, 4>;
using FewRows = Tile<16, 32, 128, 1, 4, 4>;

/// Element offset of 16-byte piece `piece` of row `row` in a stage of `Depth`: rows that ldmatrix
/// reads together lie in different banks.
template <int Depth>
SAGE_DEVICE int swizzled(int row, int piece) {
  constexpr int kPieces = Depth / 8;
  const int turn = kPieces >= 8 ? row & 7 : (row >> 1) & 3;
  return row * Depth + (piece ^ turn) * 8;
}

/// Starts copying `Rows` rows of a matrix, from column `begin` on; what lies outside becomes zeros.
template <typename T, int Rows, int Depth, int Threads>
SAGE_DEVICE void copy_rows(uint16_t* stage, const void* matrix, int64_t stride, int first_row,
                           int num_rows, int begin, int k) {
  constexpr int kPieces = Depth / 8;
  const auto* source = static_cast<const uint16_t*>(matrix);
#pragma unroll
  for (int i = 0; i < Rows * kPieces / Threads; ++i) {
    const int index = i * Threads + static_cast<int>(threadIdx.x);
    const int row = index / kPieces;
    const int piece = index % kPieces;
    const int column = begin + piece * 8;
    const bool inside = first_row + row < num_rows && column < k;
    const int64_t offset = inside ? (first_row + row) * stride + column : 0;
    cp_async_16(stage + swizzled<Depth>(row, piece), source + offset, inside);
  }
}

template <typename Out>
SAGE_DEVICE void store_pair(const GemmParams& p, int row, int column, float first, float second) {
  if (row >= p.m || column >= p.n) return;
  Out* out = static_cast<Out*>(p.out) + row * p.out_stride + column;
  out[0] = from_float<Out>(first);
  if (column + 1 < p.n) out[1] = from_float<Out>(second);
}

template <typename T>
SAGE_DEVICE float bias_at(const GemmParams& p, int column) {
  if (p.bias == nullptr || column >= p.n) return 0.0f;
  return to_float(static_cast<const T*>(p.bias)[column]);
}

/// One stage: every 32 of its depth are two mma steps, for which one ldmatrix brings B.
template <typename T, typename Shape>
SAGE_DEVICE void multiply_stage(float (&sums)[Shape::kWarpRows / 16][Shape::kWarpColumns / 8][4],
                                const uint16_t* x, const uint16_t* weights, int warp_row,
                                int warp_column) {
  constexpr int kDepth = Shape::kDepth;
  const int lane = lane_id();
#pragma unroll
  for (int begin = 0; begin < kDepth / 8; begin += 4) {
    uint32_t b[Shape::kWarpColumns / 8][4];
#pragma unroll
    for (int j = 0; j < Shape::kWarpColumns / 8; ++j) {
      const int row = warp_column + j * 8 + lane % 8;
      ldmatrix_x4(b[j], weights + swizzled<kDepth>(row, begin + lane / 8));
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int i = 0; i < Shape::kWarpRows / 16; ++i) {
        uint32_t a[4];
        const int row = warp_row + i * 16 + lane % 16;
        ldmatrix_x4(a, x + swizzled<kDepth>(row, begin + step * 2 + lane / 16));
#pragma unroll
        for (int j = 0; j < Shape::kWarpColumns / 8; ++j) {
          const uint32_t pair[2] = {b[j][step * 2], b[j][step * 2 + 1]};
          mma_m16n8k16<T>(sums[i][j], a, pair);
        }
      }
    }
  }
}

template <typename T, typename Out, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    gemm_kernel(const __grid_constant__ GemmParams p) {
  constexpr int kDepth = Shape::kDepth;
  auto* stages = shared_memory<uint16_t>();
  const int first_row = static_cast<int>(blockIdx.x) * Shape::kRows;
  const int first_column = static_cast<int>(blockIdx.y) * Shape::kColumns;
  const int warp_row = warp_id() / Shape::kColumnWarps * Shape::kWarpRows;
  const int warp_column = warp_id() % Shape::kColumnWarps * Shape::kWarpColumns;
  const int num_steps = (p.k + kDepth - 1) / kDepth;

  const auto fill = [&](int step) {
    if (step < num_steps) {
      uint16_t* stage = stages + step % Shape::kStages * Shape::kStageElements;
      copy_rows<T, Shape::kRows, kDepth, Shape::kThreads>(stage, p.x, p.x_stride, first_row, p.m,
                                                          step * kDepth, p.k);
      copy_rows<T, Shape::kColumns, kDepth, Shape::kThreads>(stage + Shape::kRows * kDepth,
                                                             p.weights, p.weights_stride,
                                                             first_column, p.n, step * kDepth, p.k);
    }
    cp_async_commit();  // empty groups keep the count
  };
  for (int step = 0; step < Shape::kStages - 1; ++step) fill(step);

  float sums[Shape::kWarpRows / 16][Shape::kWarpColumns / 8][4] = {};
  for (int step = 0; step < num_steps; ++step) {
    cp_async_wait<Shape::kStages - 2>();
    sync_block();  // the stage is complete, and everybody has left the one that is filled next
    fill(step + Shape::kStages - 1);
    const uint16_t* stage = stages + step % Shape::kStages * Shape::kStageElements;
    multiply_stage<T, Shape>(sums, stage, stage + Shape::kRows * kDepth, warp_row, warp_column);
  }
  cp_async_wait<0>();

  const int lane = lane_id();
#pragma unroll
  for (int j = 0; j < Shape::kWarpColumns / 8; ++j) {
    const int column = first_column + warp_column + j * 8 + lane % 4 * 2;
    const float bias[2] = {bias_at<T>(p, column), bias_at<T>(p, column + 1)};
#pragma unroll
    for (int i = 0; i < Shape::kWarpRows / 16; ++i) {
      const int row = first_row + warp_row + i * 16 + lane / 4;
      const float(&c)[4] = sums[i][j];
      store_pair<Out>(p, row, column, c[0] + bias[0], c[1] + bias[1]);
      store_pair<Out>(p, row + 8, column, c[2] + bias[0], c[3] + bias[1]);
    }
  }
}

template <typename T, typename Out, typename Shape>
void launch_gemm(const GemmParams& p, void* stream) {
  const Grid grid{static_cast<uint32_t>((p.m + Shape::kRows - 1) / Shape::kRows),
                  static_cast<uint32_t>((p.n + Shape::kColumns - 1) / Shape::kColumns)};
  launch(gemm_kernel<T, Out, Shape>, grid, Shape::kThreads, Shape::kSharedBytes, stream, p);
}

template <typename T, typename Out>
void choose_shape(const GemmParams& p, void* stream) {
  if (p.m <= 64) {
    launch_gemm<T, Out, FewRows>(p, stream);
  } else {
    launch_gemm<T, Out, ManyRows>(p, stream);
  }
}

}  // namespace

void gemm(FloatType input, FloatType output, const GemmParams& params, void* stream) {
  if (params.m == 0 || params.n == 0) return;
  if (input == FloatType::kBF16) {
    if (output == FloatType::kF32) return choose_shape<bf16, float>(params, stream);
    return choose_shape<bf16, bf16>(params, stream);
  }
  if (output == FloatType::kF32) return choose_shape<f16, float>(params, stream);
  return choose_shape<f16, f16>(params, stream);
}

}  // namespace sagellm::kernels::cuda
