// Eight neighbouring numbers in registers, and sums over a block: what element-wise kernels share.
#pragma once

#include "sagellm/kernels/cuda/ptx.cuh"

namespace sagellm::kernels::cuda {

inline constexpr int kVector = 8;

struct Vector {
  float v[kVector];
};

SAGE_DEVICE Vector zero_vector() { return Vector{{0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f}}; }

/// Eight elements from an address aligned to 16 bytes. `Stream`: nothing writes them in this
/// launch.
template <typename T, bool Stream = true>
SAGE_DEVICE Vector load_vector(const T* from) {
  const auto read = [](const void* address) {
    if constexpr (Stream) return load_stream(address);
    return *static_cast<const uint4*>(address);
  };
  Vector out;
  if constexpr (std::is_same_v<T, float>) {
    const uint4 words[2] = {read(from), read(from + 4)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      out.v[4 * i] = bits_to_float(words[i].x);
      out.v[4 * i + 1] = bits_to_float(words[i].y);
      out.v[4 * i + 2] = bits_to_float(words[i].z);
      out.v[4 * i + 3] = bits_to_float(words[i].w);
    }
  } else {
    const uint4 words = read(from);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(word[i]);
      out.v[2 * i] = pair.x;
      out.v[2 * i + 1] = pair.y;
    }
  }
  return out;
}

template <typename T>
SAGE_DEVICE void store_vector(T* to, const Vector& values) {
  const float* v = values.v;
  auto* out = reinterpret_cast<uint4*>(to);
  if constexpr (std::is_same_v<T, float>) {
    out[0] = make_uint4(float_to_bits(v[0]), float_to_bits(v[1]), float_to_bits(v[2]),
                        float_to_bits(v[3]));
    out[1] = make_uint4(float_to_bits(v[4]), float_to_bits(v[5]), float_to_bits(v[6]),
                        float_to_bits(v[7]));
  } else {
    out[0] = make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]),
                        pack2<T>(v[6], v[7]));
  }
}

/// The squares' sum, pairwise.
SAGE_DEVICE float sum_of_squares(const Vector& x) {
  const float* v = x.v;
  return ((v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3])) +
         ((v[4] * v[4] + v[5] * v[5]) + (v[6] * v[6] + v[7] * v[7]));
}

/// The sum over all threads of the block, the same bits in each; `scratch` is 32 floats of shared
/// memory that nobody else uses until the next barrier.
SAGE_DEVICE float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  if (lane_id() == 0) scratch[warp_id()] = value;
  sync_block();
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  return warp_sum(lane_id() < warps ? scratch[lane_id()] : 0.f);
}

}  // namespace sagellm::kernels::cuda
