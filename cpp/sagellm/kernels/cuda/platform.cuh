// What every kernel of this folder is written in: CUDA C++ where nvcc compiles it, and the same
// text on the CPU where the emulator of tests/cpp/cuda_emulation does.
//
//   template <typename T> __global__ void some_kernel(const __grid_constant__ SomeParams p) {...}
//   launch(some_kernel<bf16>, Grid{blocks}, 128, shared_bytes, stream, params);
//
// Rules that keep both worlds equal: one parameter struct by value; all shared memory through
// shared_memory<T>(); blocks are whole warps; every lane of a warp takes part in warp operations,
// every thread of a block in sync_block(); nothing waits for another block of the same launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "sagellm/kernels/cuda/launch.h"

#if defined(__CUDACC__)
#define SAGE_DEVICE __device__ __forceinline__
#else
#include "cuda_emulator.h"  // IWYU pragma: keep. Found by builds of the emulator only.
#endif

namespace sagellm::kernels::cuda {

inline constexpr int kWarpSize = 32;

#if defined(__CUDACC__)

/// Queues `kernel` on `stream`; see launch_kernel.
template <typename Params>
void launch(void (*kernel)(Params), Grid grid, uint32_t threads, size_t shared_bytes, void* stream,
            const std::type_identity_t<Params>& params) {
  void* arguments[] = {const_cast<Params*>(&params)};
  launch_kernel(reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes, stream,
                arguments);
}

/// Blocks of `kernel` that one multiprocessor of the current device holds at a time.
template <typename Params>
int resident_blocks(void (*kernel)(Params), uint32_t threads, size_t shared_bytes) {
  return resident_blocks_of(reinterpret_cast<const void*>(kernel), threads, shared_bytes);
}

/// The dynamic shared memory of the block, aligned to 1024 bytes.
template <typename T>
SAGE_DEVICE T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char sagellm_shared_memory[];
  return reinterpret_cast<T*>(sagellm_shared_memory);
}

SAGE_DEVICE void sync_block() { __syncthreads(); }
/// Waits for `threads` threads (whole warps) at barrier `id`, 1 to 15.
SAGE_DEVICE void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
SAGE_DEVICE void sync_warp() { __syncwarp(); }

/// Values of the other lanes; T is 4 or 8 bytes.
template <typename T>
SAGE_DEVICE T shfl_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
template <typename T>
SAGE_DEVICE T shfl_down(T value, int delta) {
  return __shfl_down_sync(0xffffffffu, value, delta);
}
template <typename T>
SAGE_DEVICE T shfl_up(T value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, delta);
}
template <typename T>
SAGE_DEVICE T shfl(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
SAGE_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

/// Read-modify-write on memory of the device or the block; each returns the old value.
template <typename T>
SAGE_DEVICE T atomic_add(T* address, std::type_identity_t<T> value) {
  return atomicAdd(address, value);
}
template <typename T>
SAGE_DEVICE T atomic_max(T* address, std::type_identity_t<T> value) {
  return atomicMax(address, value);
}
template <typename T>
SAGE_DEVICE T atomic_min(T* address, std::type_identity_t<T> value) {
  return atomicMin(address, value);
}
template <typename T>
SAGE_DEVICE T atomic_exchange(T* address, std::type_identity_t<T> value) {
  return atomicExch(address, value);
}
/// Counts from 0 to `limit` and starts again at 0.
SAGE_DEVICE uint32_t atomic_inc(uint32_t* address, uint32_t limit) {
  return atomicInc(address, limit);
}
/// Orders this thread's writes before its later ones for the whole device.
SAGE_DEVICE void threadfence() { __threadfence(); }

#else

using cuda_emulation::atomic_add;
using cuda_emulation::atomic_exchange;
using cuda_emulation::atomic_inc;
using cuda_emulation::atomic_max;
using cuda_emulation::atomic_min;
using cuda_emulation::ballot;
using cuda_emulation::shared_memory;
using cuda_emulation::shfl;
using cuda_emulation::shfl_down;
using cuda_emulation::shfl_up;
using cuda_emulation::shfl_xor;
using cuda_emulation::sync_block;
using cuda_emulation::sync_named;
using cuda_emulation::sync_warp;
using cuda_emulation::threadfence;

template <typename Params>
void launch(void (*kernel)(Params), Grid grid, uint32_t threads, size_t shared_bytes, void* stream,
            const std::type_identity_t<Params>& params) {
  cuda_emulation::launch({grid.x, grid.y, grid.z}, threads, shared_bytes, stream,
                         [kernel, params] { kernel(params); });
}

template <typename Params>
int resident_blocks(void (*)(Params), uint32_t threads, size_t shared_bytes) {
  return cuda_emulation::resident_blocks(threads, shared_bytes);
}

#endif

/// Position of this thread in its warp, and of its warp in the (one-dimensional) block.
SAGE_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % kWarpSize); }
SAGE_DEVICE int warp_id() { return static_cast<int>(threadIdx.x / kWarpSize); }

/// Sum and maximum over `Width` neighbouring lanes (a power of two), the same bits in each of them.
template <int Width = kWarpSize>
SAGE_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = Width / 2; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  return value;
}
template <int Width = kWarpSize>
SAGE_DEVICE float warp_max(float value) {
#pragma unroll
  for (int mask = Width / 2; mask > 0; mask /= 2) value = fmaxf(value, shfl_xor(value, mask));
  return value;
}

}  // namespace sagellm::kernels::cuda
