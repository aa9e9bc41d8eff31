// A block's tile of a matrix product: a ring of stages in shared memory, filled by cp.async, read
// by ldmatrix, multiplied by mma. Elements are 16 bits wide, or pairs of FP8 codes, of which
// ldmatrix and mma make the same fragments.
#pragma once

#include "sagellm/kernels/cuda/ptx.cuh"

namespace sagellm::kernels::cuda {

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

/// Element offset of 16-byte piece `piece` of row `row` in a stage of `Depth`: rows that ldmatrix
/// reads together lie in different banks.
template <int Depth>
SAGE_DEVICE int swizzled(int row, int piece) {
  constexpr int kPieces = Depth / 8;
  const int turn = kPieces >= 8 ? row & 7 : (row >> 1) & 3;
  return row * Depth + (piece ^ turn) * 8;
}

/// Starts copying `Rows` rows of a matrix, from column `begin` on; what lies outside becomes zeros.
template <int Rows, int Depth, int Threads>
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

template <typename T>
SAGE_DEVICE void multiply_tile(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, fp8>) {
    mma_m16n8k32_fp8(c, a, b);
  } else {
    mma_m16n8k16<T>(c, a, b);
  }
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
          multiply_tile<T>(sums[i][j], a, pair);
        }
      }
    }
  }
}

/// The ring: calls consume(step, stage of x, stage of weights) for every `Depth` columns of the
/// block's tile, while the following stages are on their way. `k` and the strides count 16-bit
/// elements, or pairs of 8-bit ones.
template <typename Shape, typename Consume>
SAGE_DEVICE void run_stages(const void* x, int64_t x_stride, int m, const void* weights,
                            int64_t weights_stride, int n, int k, const Consume& consume) {
  constexpr int kDepth = Shape::kDepth;
  auto* stages = shared_memory<uint16_t>();
  const int first_row = static_cast<int>(blockIdx.x) * Shape::kRows;
  const int first_column = static_cast<int>(blockIdx.y) * Shape::kColumns;
  const int num_steps = (k + kDepth - 1) / kDepth;

  const auto fill = [&](int step) {
    if (step < num_steps) {
      uint16_t* stage = stages + step % Shape::kStages * Shape::kStageElements;
      copy_rows<Shape::kRows, kDepth, Shape::kThreads>(stage, x, x_stride, first_row, m,
                                                       step * kDepth, k);
      copy_rows<Shape::kColumns, kDepth, Shape::kThreads>(stage + Shape::kRows * kDepth, weights,
                                                          weights_stride, first_column, n,
                                                          step * kDepth, k);
    }
    cp_async_commit();  // empty groups keep the count
  };
  for (int step = 0; step < Shape::kStages - 1; ++step) fill(step);

  for (int step = 0; step < num_steps; ++step) {
    cp_async_wait<Shape::kStages - 2>();
    sync_block();  // the stage is complete, and everybody has left the one that is filled next
    fill(step + Shape::kStages - 1);
    const uint16_t* stage = stages + step % Shape::kStages * Shape::kStageElements;
    consume(step, stage, stage + Shape::kRows * kDepth);
  }
  cp_async_wait<0>();
}

template <typename Shape>
SAGE_DEVICE int first_warp_row() {
  return warp_id() / Shape::kColumnWarps * Shape::kWarpRows;
}
template <typename Shape>
SAGE_DEVICE int first_warp_column() {
  return warp_id() % Shape::kColumnWarps * Shape::kWarpColumns;
}

/// Two neighbouring elements of the result; Params has out, out_stride, m and n.
template <typename Out, typename Params>
SAGE_DEVICE void store_pair(const Params& p, int row, int column, float first, float second) {
  if (row >= p.m || column >= p.n) return;
  Out* out = static_cast<Out*>(p.out) + row * p.out_stride + column;
  out[0] = from_float<Out>(first);
  if (column + 1 < p.n) out[1] = from_float<Out>(second);
}

template <typename Shape>
Grid grid_of(int32_t m, int32_t n) {
  return {static_cast<uint32_t>((m + Shape::kRows - 1) / Shape::kRows),
          static_cast<uint32_t>((n + Shape::kColumns - 1) / Shape::kColumns)};
}

}  // namespace sagellm::kernels::cuda
