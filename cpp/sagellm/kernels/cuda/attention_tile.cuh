// What one warp does with one tile: fragments out of shared memory, scores, softmax, P times V. The
// layout of K and V in shared memory is that of the pages, with 16 bytes between rows, so that the
// eight rows of a matrix lie in different banks.
//
// 8-bit K and V become f16 in registers. An 8x8 matrix of 16-bit words then holds 16 dimensions,
// and lane 4r + c has dimensions 4c .. 4c + 3 of K: the two words of a B fragment are dimensions
// (4c, 4c
// + 1) and (4c + 2, 4c + 3), an order of the contraction that Q in shared memory shares (see
// store_query). A transposed word of V holds dimensions 2r, 2r + 1 of two tokens: even dimensions
// go to one block of eight columns, odd ones to the next.
#pragma once

#include "sagellm/kernels/cuda/attention_params.h"
#include "sagellm/kernels/cuda/ptx.cuh"

namespace sagellm::kernels::cuda {

template <KvType kType>
struct KvTraits;
template <>
struct KvTraits<KvType::kBF16> {
  using Mma = bf16;
  static constexpr int kBytes = 2;
  static constexpr bool kHasScales = false;
  static constexpr float kPScale = 1.f;
  static constexpr float kKScale = 1.f;
  static constexpr float kOutScale = 1.f;
};
template <>
struct KvTraits<KvType::kF16> : KvTraits<KvType::kBF16> {
  using Mma = f16;
};
// P * scale is kept near the size of the values themselves, within the range of f16.
template <>
struct KvTraits<KvType::kInt8> {
  using Mma = f16;
  static constexpr int kBytes = 1;
  static constexpr bool kHasScales = true;
  static constexpr float kKScale = 1.f;
  static constexpr float kPScale = 128.f;
  static constexpr float kOutScale = 1.f / 128.f;
};
// Bits of e4m3 moved into f16 read as the value / 256.
template <>
struct KvTraits<KvType::kFp8E4M3> {
  using Mma = f16;
  static constexpr int kBytes = 1;
  static constexpr bool kHasScales = true;
  static constexpr float kKScale = 256.f;
  static constexpr float kPScale = 256.f;
  static constexpr float kOutScale = 1.f;
};

/// Bytes `kFirst` and `kSecond` of four codes as two f16 numbers.
template <KvType kType, int kFirst, int kSecond>
SAGE_DEVICE uint32_t expand_codes(uint32_t codes) {
  if constexpr (kType == KvType::kInt8) {  // 1024 + (code + 128), minus 1152
    constexpr uint32_t kSelect = 0x4040u | kFirst | kSecond << 8;
    return sub_f16x2(__byte_perm(codes ^ 0x80808080u, 0x64646464u, kSelect), 0x64806480u);
  } else {
    constexpr uint32_t kSelect = 0x0404u | kFirst << 4 | kSecond << 12;
    const uint32_t high = __byte_perm(codes, 0u, kSelect);
    return ((high >> 1) & 0x3f803f80u) | (high & 0x80008000u);
  }
}

/// Sizes and positions that follow from head_dim (padded to kDim) and the type.
template <int kDim, KvType kType>
struct TileLayout {
  static constexpr int kRowBytes = kDim * KvTraits<kType>::kBytes;
  static constexpr int kRowStride = kRowBytes + 16;
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kQueryStride = kDim * 2 + 16;

  /// Of `tokens` rows, and their scales behind them.
  static constexpr int entry_bytes(int tokens) {
    return tokens * kRowStride + (KvTraits<kType>::kHasScales ? tokens * 4 : 0);
  }
};

/// Fragments of 16 rows of Q for dimensions 16 * step ..
template <int kDim, KvType kType>
SAGE_DEVICE void load_query(uint32_t (&a)[4], const std::byte* q, int step) {
  const int lane = lane_id();
  ldmatrix_x4(
      a, q + (lane % 16) * TileLayout<kDim, kType>::kQueryStride + step * 32 + (lane / 16) * 16);
}

/// s += Q * K^T for kTokens tokens, of kTiles tiles of 16 rows. `query(a, tile, step)` gives
/// fragments of Q.
template <int kDim, KvType kType, int kTiles, int kTokens, typename Query>
SAGE_DEVICE void multiply_keys(float (&s)[kTiles][kTokens / 8][4], const std::byte* keys,
                               const Query& query) {
  using Mma = typename KvTraits<kType>::Mma;
  constexpr int kStride = TileLayout<kDim, kType>::kRowStride;
  const int lane = lane_id();
  const std::byte* row = keys + ((lane % 8) + (lane / 16) * 8) * kStride + ((lane / 8) % 2) * 16;
  if constexpr (!KvTraits<kType>::kHasScales) {
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) query(a[i], i, step);
#pragma unroll
      for (int n = 0; n < kTokens / 16; ++n) {
        uint32_t words[4];
        ldmatrix_x4(words, row + n * 16 * kStride + step * 32);
        const uint32_t low[2] = {words[0], words[1]};
        const uint32_t high[2] = {words[2], words[3]};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          mma_m16n8k16<Mma>(s[i][2 * n], a[i], low);
          mma_m16n8k16<Mma>(s[i][2 * n + 1], a[i], high);
        }
      }
    }
  } else {
#pragma unroll
    for (int pair = 0; pair < kDim / 32; ++pair) {
      uint32_t words[kTokens / 16][4];  // two steps of 16 dimensions, of two blocks of 8 tokens
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t a[kTiles][4];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) query(a[i], i, 2 * pair + step);
#pragma unroll
        for (int n = 0; n < kTokens / 16; ++n) {
          // Wide tiles read twice what they have no registers to keep.
          if (step == 0 || kTiles > 1) ldmatrix_x4(words[n], row + n * 16 * kStride + pair * 32);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const uint32_t codes = words[n][2 * j + step];
            const uint32_t b[2] = {expand_codes<kType, 0, 1>(codes),
                                   expand_codes<kType, 2, 3>(codes)};
#pragma unroll
            for (int i = 0; i < kTiles; ++i) mma_m16n8k16<Mma>(s[i][2 * n + j], a[i], b);
          }
        }
      }
    }
  }
}

/// acc += P * V for 16 tokens; p[i] are the fragments of tile i.
template <int kDim, KvType kType, int kTiles>
SAGE_DEVICE void multiply_values(float (&acc)[kTiles][kDim / 8][4], const uint32_t (&p)[kTiles][4],
                                 const std::byte* values) {
  using Mma = typename KvTraits<kType>::Mma;
  constexpr int kStride = TileLayout<kDim, kType>::kRowStride;
  const int lane = lane_id();
  const std::byte* row = values + (lane % 16) * kStride + (lane / 16) * 16;
  if constexpr (!KvTraits<kType>::kHasScales) {
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t words[4];
      ldmatrix_x4_trans(words, row + d * 32);
      const uint32_t low[2] = {words[0], words[1]};
      const uint32_t high[2] = {words[2], words[3]};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        mma_m16n8k16<Mma>(acc[i][2 * d], p[i], low);
        mma_m16n8k16<Mma>(acc[i][2 * d + 1], p[i], high);
      }
    }
  } else {
#pragma unroll
    for (int d = 0; d < kDim / 32; ++d) {
      uint32_t words[4];
      ldmatrix_x4_trans(words, row + d * 32);
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // 16 dimensions each
        const uint32_t even[2] = {expand_codes<kType, 0, 2>(words[2 * j]),
                                  expand_codes<kType, 0, 2>(words[2 * j + 1])};
        const uint32_t odd[2] = {expand_codes<kType, 1, 3>(words[2 * j]),
                                 expand_codes<kType, 1, 3>(words[2 * j + 1])};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          mma_m16n8k16<Mma>(acc[i][4 * d + 2 * j], p[i], even);
          mma_m16n8k16<Mma>(acc[i][4 * d + 2 * j + 1], p[i], odd);
        }
      }
    }
  }
}

/// The four dimensions from 16 * group + 4 * column(lane) or, for 16-bit types, the pairs at 2 *
/// column and 8 + 2 * column: where accumulators of column blocks 2 * group and 2 * group + 1
/// belong.
template <KvType kType>
SAGE_DEVICE int accumulator_dim(int group, int word) {  // word 0: first pair, 1: second pair
  const int column = lane_id() % 4;
  return KvTraits<kType>::kHasScales ? group * 16 + column * 4 + word * 2
                                     : group * 16 + column * 2 + word * 8;
}
/// That pair, of the row of this lane (`upper` 0) or of the row eight below (2).
template <KvType kType>
SAGE_DEVICE float2 accumulator_pair(const float (&even)[4], const float (&odd)[4], int upper,
                                    int word) {
  if constexpr (KvTraits<kType>::kHasScales) return {even[upper + word], odd[upper + word]};
  return word == 0 ? float2{even[upper], even[upper + 1]} : float2{odd[upper], odd[upper + 1]};
}

}  // namespace sagellm::kernels::cuda
