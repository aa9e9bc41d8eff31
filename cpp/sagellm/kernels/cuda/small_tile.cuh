// Products with at most 8 rows of x: a block has 16 rows of weights, its warps share their columns.
#pragma once

#include "sagellm/kernels/cuda/ptx.cuh"
#include "sagellm/kernels/cuda/quantized.h"

namespace sagellm::kernels::cuda {

inline constexpr int kTileWarps = 8;  // that share the columns of a tile row
inline constexpr int kTileThreads = kTileWarps * kWarpSize;
inline constexpr size_t kTileScratch =
    sizeof(float) * kTileWarps * kTileRows * kQuantColumns;  // shared memory of store_tile

/// Adds the warps' sums in their order and stores the tile.
template <typename Params>
SAGE_DEVICE void store_tile(const float (&sums)[4], float* scratch, const Params& p, int n) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // [warp][row of x][row of weights]
    const int x_row = 2 * (lane % 4) + i % 2;
    scratch[(warp_id() * kQuantColumns + x_row) * kTileRows + lane / 4 + i / 2 * 8] = sums[i];
  }
  sync_block();
  const int thread = static_cast<int>(threadIdx.x);
  const int row = static_cast<int>(blockIdx.x) * kTileRows + thread % kTileRows;
  if (thread >= kTileRows * kQuantColumns || thread / kTileRows >= p.m || row >= n) return;
  float sum = scratch[thread];
#pragma unroll
  for (int warp = 1; warp < kTileWarps; ++warp) {
    sum += scratch[warp * kTileRows * kQuantColumns + thread];
  }
  if (p.bias != nullptr) sum += p.bias[row];
  const int64_t at = thread / kTileRows * p.out_stride + row;
  if (p.out_type == FloatType::kF32) {
    static_cast<float*>(p.out)[at] = sum;
  } else {
    static_cast<uint16_t*>(p.out)[at] =
        p.out_type == FloatType::kBF16 ? float_to_bf16_bits(sum) : float_to_f16_bits(sum);
  }
}

}  // namespace sagellm::kernels::cuda
