// Two tile shapes, one for many rows and one that spreads the weights over the chip when there are
// few; both add in the same order.
#include "sagellm/kernels/cuda/gemm.h"
#include "sagellm/kernels/cuda/gemm_tile.cuh"

namespace sagellm::kernels::cuda {

namespace {

using ManyRows = Tile<128, 128, 32, 2, 2, 4>;
using FewRows = Tile<16, 32, 128, 1, 4, 4>;

template <typename T>
SAGE_DEVICE float bias_at(const GemmParams& p, int column) {
  if (p.bias == nullptr || column >= p.n) return 0.0f;
  return to_float(static_cast<const T*>(p.bias)[column]);
}

template <typename T, typename Out, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    gemm_kernel(const __grid_constant__ GemmParams p) {
  const int warp_row = first_warp_row<Shape>();
  const int warp_column = first_warp_column<Shape>();
  float sums[Shape::kWarpRows / 16][Shape::kWarpColumns / 8][4] = {};
  run_stages<Shape>(p.x, p.x_stride, p.m, p.weights, p.weights_stride, p.n, p.k,
                    [&](int, const uint16_t* x, const uint16_t* weights) {
                      multiply_stage<T, Shape>(sums, x, weights, warp_row, warp_column);
                    });

  const int lane = lane_id();
#pragma unroll
  for (int j = 0; j < Shape::kWarpColumns / 8; ++j) {
    const int column =
        static_cast<int>(blockIdx.y) * Shape::kColumns + warp_column + j * 8 + lane % 4 * 2;
    const float bias[2] = {bias_at<T>(p, column), bias_at<T>(p, column + 1)};
#pragma unroll
    for (int i = 0; i < Shape::kWarpRows / 16; ++i) {
      const int row = static_cast<int>(blockIdx.x) * Shape::kRows + warp_row + i * 16 + lane / 4;
      const float(&c)[4] = sums[i][j];
      store_pair<Out>(p, row, column, c[0] + bias[0], c[1] + bias[1]);
      store_pair<Out>(p, row + 8, column, c[2] + bias[0], c[3] + bias[1]);
    }
  }
}

template <typename T, typename Out, typename Shape>
void launch_gemm(const GemmParams& p, void* stream) {
  launch(gemm_kernel<T, Out, Shape>, grid_of<Shape>(p.m, p.n), Shape::kThreads, Shape::kSharedBytes,
         stream, p);
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
