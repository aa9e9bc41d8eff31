// FP8 rows times FP8 weights. One scale per row of weights waits for the end; where a row has one
// per 128 columns, a stage is that long and its sums are scaled and added to the totals.
#include "sagellm/kernels/cuda/fp8.h"
#include "sagellm/kernels/cuda/gemm_tile.cuh"

namespace sagellm::kernels::cuda {

namespace {

// Elements are pairs of codes. Where the tensor cores take no FP8 from registers (9.0), codes
// become f16 there and need registers, as do totals: warps have fewer results than those of
// gemm.cu.
using ManyRows = Tile<128, 128, 32, 4, 2, 4>;
using FewRows = Tile<16, 32, 128, 1, 4, 4>;
using GroupedManyRows = Tile<128, 64, kFp8Group / 2, 4, 2, 4>;
using GroupedFewRows = Tile<16, 32, kFp8Group / 2, 1, 4, 8>;

SAGE_DEVICE float scale_at(const Fp8GemmParams& p, int group, int column) {
  return column < p.n ? p.weights.scales[int64_t{group} * p.weights.n + column] : 0.f;
}

template <typename Out, typename Shape, bool Grouped>
__global__ void __launch_bounds__(Shape::kThreads)
    fp8_gemm_kernel(const __grid_constant__ Fp8GemmParams p) {
  constexpr int kRowTiles = Shape::kWarpRows / 16, kColumnTiles = Shape::kWarpColumns / 8;
  const int warp_row = first_warp_row<Shape>();
  const int warp_column = first_warp_column<Shape>();
  const int lane = lane_id();
  const int first_column =
      static_cast<int>(blockIdx.y) * Shape::kColumns + warp_column + lane % 4 * 2;
  const int pairs = p.weights.k / 2;
  float totals[kRowTiles][kColumnTiles][4] = {};
  run_stages<Shape>(p.x, pairs, p.m, p.weights.codes, pairs, p.n, pairs,
                    [&](int group, const uint16_t* x, const uint16_t* weights) {
                      if constexpr (!Grouped) {
                        multiply_stage<fp8, Shape>(totals, x, weights, warp_row, warp_column);
                      } else {
                        float sums[kRowTiles][kColumnTiles][4] = {};
                        multiply_stage<fp8, Shape>(sums, x, weights, warp_row, warp_column);
#pragma unroll
                        for (int j = 0; j < kColumnTiles; ++j) {
                          const float scales[2] = {scale_at(p, group, first_column + j * 8),
                                                   scale_at(p, group, first_column + j * 8 + 1)};
#pragma unroll
                          for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
                            for (int c = 0; c < 4; ++c) {
                              totals[i][j][c] = fmaf(sums[i][j][c], scales[c % 2], totals[i][j][c]);
                            }
                          }
                        }
                      }
                    });

#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    const int row = static_cast<int>(blockIdx.x) * Shape::kRows + warp_row + i * 16 + lane / 4;
    const float x_scales[2] = {row < p.m ? p.x_scales[row] : 0.f,
                               row + 8 < p.m ? p.x_scales[row + 8] : 0.f};
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      const int column = first_column + j * 8;
      const float scales[2] = {Grouped ? 1.f : scale_at(p, 0, column),
                               Grouped ? 1.f : scale_at(p, 0, column + 1)};
      const float(&c)[4] = totals[i][j];
      store_pair<Out>(p, row, column, c[0] * scales[0] * x_scales[0],
                      c[1] * scales[1] * x_scales[0]);
      store_pair<Out>(p, row + 8, column, c[2] * scales[0] * x_scales[1],
                      c[3] * scales[1] * x_scales[1]);
    }
  }
}

template <typename Out, typename Shape, bool Grouped>
void launch_gemm(const Fp8GemmParams& p, void* stream) {
  launch(fp8_gemm_kernel<Out, Shape, Grouped>, grid_of<Shape>(p.m, p.n), Shape::kThreads,
         Shape::kSharedBytes, stream, p);
}

template <typename Out>
void choose_shape(const Fp8GemmParams& p, void* stream) {
  const bool few = p.m <= 64;
  if (p.weights.groups > 1) {
    if (few) return launch_gemm<Out, GroupedFewRows, true>(p, stream);
    return launch_gemm<Out, GroupedManyRows, true>(p, stream);
  }
  if (few) return launch_gemm<Out, FewRows, false>(p, stream);
  launch_gemm<Out, ManyRows, false>(p, stream);
}

}  // namespace

void fp8_gemm(FloatType output, const Fp8GemmParams& p, void* stream) {
  if (p.m == 0 || p.n == 0) return;
  switch (output) {
    case FloatType::kBF16:
      return choose_shape<bf16>(p, stream);
    case FloatType::kF16:
      return choose_shape<f16>(p, stream);
    case FloatType::kF32:
      return choose_shape<float>(p, stream);
  }
}

}  // namespace sagellm::kernels::cuda
