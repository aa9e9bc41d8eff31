// Runs CUDA kernels on the CPU, one fiber per CUDA thread, to test their logic without a GPU.
//
// Blocks run one after another; the threads of a block take turns between barriers and warp
// operations, in an order that a seed changes. What the emulator finds, it throws as an
// EmulationError that names block, thread and place:
//   - barriers or warp operations that not all threads reach, or reach at different places;
//   - access outside an allocation or outside shared memory (guard pages; canaries behind the end);
//   - misaligned 16-byte accesses and matrix rows;
//   - misuse of mbarriers, boxes of the copy engine and products of warpgroups.
// Memory that nobody wrote reads as 0xff bytes, which are NaN in every float format. So does the
// target of cp.async until its thread has waited for it, that of a box until it has landed, and
// accumulators of wgmma until their wait.
//
// Matrix instructions exchange registers between the lanes as the PTX ISA lays them out; products
// are exact and their sums rounded once, so results may differ from hardware in the last bits.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

// ------------------------------------------------------------------------------ CUDA's own names
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define SAGE_DEVICE inline

// NOLINTBEGIN: these are CUDA's own names
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Set for the thread that runs.
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};

template <typename T>
constexpr T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
int __dp4a(int a, int b, int c);
unsigned __byte_perm(unsigned a, unsigned b, unsigned selector);
template <typename T>
T __ldg(const T* address) {
  return *address;
}
// NOLINTEND

namespace cuda_emulation {

/// A mistake of a kernel, or of the code that launches it.
class EmulationError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// What the kernels since the last reset did.
struct Statistics {
  int64_t launches = 0;
  int64_t matrix_products = 0;     // mma instructions, per warp
  int64_t matrix_loads = 0;        // ldmatrix instructions, per warp
  int64_t matrix_load_phases = 0;  // shared-memory wavefronts they took: four each at best
  int64_t warpgroup_products = 0;  // wgmma instructions, per warp
  int64_t async_copies = 0;        // 16-byte cp.async, per thread
  int64_t box_copies = 0;
  int64_t global_bytes_streamed = 0;  // through load_stream, store_stream and cp.async
};
Statistics& statistics();

/// Threads take turns in ascending order for seed 0, in a random order for any other seed.
void set_order(uint64_t seed);

/// Memory of the emulated device: `bytes` that end at a guard page, filled with 0xff.
void* allocate(size_t bytes);
/// Throws EmulationError when `pointer` is no allocation or bytes behind its end were written.
void release(void* pointer);
/// Bytes and number of allocations alive.
size_t allocated_bytes();
size_t allocation_count();

struct GridSize {
  uint32_t x, y, z;
};
/// Work on streams happens when it is waited for, as late as a device may take: what the host
/// changes too early shows. Otherwise (from the start) it happens at once.
void set_deferred(bool deferred);

/// Queues `kernel` on a stream, see set_deferred; on the default stream it runs at once.
void launch(GridSize grid, uint32_t threads, size_t shared_bytes, void* stream,
            std::function<void()> kernel);
/// Runs all blocks of `kernel` now.
void run_grid(GridSize grid, uint32_t threads, size_t shared_bytes,
              const std::function<void()>& kernel);
int resident_blocks(uint32_t threads, size_t shared_bytes);

// ------------------------------------------------------------------- what kernels call
// (platform.cuh)
/// A place in a kernel's source.
struct Place {
  const char* file;
  int line;
};
#define SAGE_HERE \
  { __builtin_FILE(), __builtin_LINE() }

unsigned char* shared_memory_begin();
template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(shared_memory_begin());
}

void sync_named(int id, int threads, Place place = SAGE_HERE);
void arrive_named(int id, int threads, Place place = SAGE_HERE);
void sync_all(Place place);
inline void sync_block(Place place = SAGE_HERE) { sync_all(place); }

/// Every lane brings `argument`; the last to arrive calls `combine` with those of all 32.
using Combine = void (*)(void* const* lane_arguments);
void warp_operation(Combine combine, void* argument, Place place);
inline void sync_warp(Place place = SAGE_HERE) { warp_operation(nullptr, nullptr, place); }

template <typename T>
struct Shuffle {
  T value;
  int source;  // lane
  T result;
};
template <typename T>
T shuffle(T value, int source, Place place) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  Shuffle<T> mine{value, source, {}};
  warp_operation(
      [](void* const* lanes) {
        for (int lane = 0; lane < 32; ++lane) {
          auto* to = static_cast<Shuffle<T>*>(lanes[lane]);
          const bool inside = to->source >= 0 && to->source < 32;
          to->result = static_cast<Shuffle<T>*>(lanes[inside ? to->source : lane])->value;
        }
      },
      &mine, place);
  return mine.result;
}
inline int this_lane() { return static_cast<int>(threadIdx.x % 32); }
template <typename T>
T shfl_xor(T value, int mask, Place place = SAGE_HERE) {
  return shuffle(value, this_lane() ^ mask, place);
}
template <typename T>
T shfl_down(T value, int delta, Place place = SAGE_HERE) {
  return shuffle(value, this_lane() + delta, place);
}
template <typename T>
T shfl_up(T value, int delta, Place place = SAGE_HERE) {
  return shuffle(value, this_lane() - delta, place);
}
template <typename T>
T shfl(T value, int lane, Place place = SAGE_HERE) {
  return shuffle(value, lane % 32, place);
}
uint32_t ballot(bool predicate, Place place = SAGE_HERE);

template <typename T>
T atomic_add(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = static_cast<T>(old + value);
  return old;
}
template <typename T>
T atomic_max(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}
template <typename T>
T atomic_min(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = value < old ? value : old;
  return old;
}
template <typename T>
T atomic_exchange(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = value;
  return old;
}
inline uint32_t atomic_inc(uint32_t* address, uint32_t limit) {
  const uint32_t old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}
inline void threadfence() {}

// ----------------------------------------------------------------------- what kernels call
// (ptx.cuh)
inline float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t float_to_bits(float value) { return std::bit_cast<uint32_t>(value); }
float f16_bits_to_float(uint16_t bits);
uint16_t float_to_f16_bits(float value);
uint16_t float_to_bf16_bits(float value);
inline uint32_t pack_bf16(float low, float high) {
  return float_to_bf16_bits(low) | static_cast<uint32_t>(float_to_bf16_bits(high)) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return float_to_f16_bits(low) | static_cast<uint32_t>(float_to_f16_bits(high)) << 16;
}
inline float ex2(float x) { return std::exp2(x); }
inline float lg2(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
uint4 load_stream(const void* address, Place place = SAGE_HERE);
void store_stream(void* address, uint4 value, Place place = SAGE_HERE);
inline uint32_t load_acquire(const uint32_t* address) { return *address; }
inline void store_release(uint32_t* address, uint32_t value) { *address = value; }
void cp_async_16(void* shared, const void* source, bool valid = true, Place place = SAGE_HERE);
void cp_async_commit();
void cp_async_wait_groups(int pending);
template <int Pending>
void cp_async_wait() {
  cp_async_wait_groups(Pending);
}
void ldmatrix(uint32_t (&words)[4], const void* row, bool transposed, Place place);
inline void ldmatrix_x4(uint32_t (&words)[4], const void* row, Place place = SAGE_HERE) {
  ldmatrix(words, row, false, place);
}
inline void ldmatrix_x4_trans(uint32_t (&words)[4], const void* row, Place place = SAGE_HERE) {
  ldmatrix(words, row, true, place);
}
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bf16,
                  Place place = SAGE_HERE);
void mma_m16n8k32_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     Place place = SAGE_HERE);
void mma_m16n8k32_fp8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      Place place = SAGE_HERE);

// ----------------------------------------------------------------------- what kernels call
// (wgmma.cuh)
void mbarrier_init(uint64_t* barrier, int arrivals, Place place = SAGE_HERE);
inline void mbarrier_publish() {}
void mbarrier_arrive(uint64_t* barrier, Place place = SAGE_HERE);
void mbarrier_arrive_expect(uint64_t* barrier, int bytes, Place place = SAGE_HERE);
void mbarrier_wait(uint64_t* barrier, int parity, Place place = SAGE_HERE);

/// A box of an array: its tensor map and where it begins.
struct TensorBox {
  std::array<unsigned char, 128> map;
  int at[3];
};
/// cuTensorMapEncodeTiled of the emulated driver.
int encode_tensor_map(void* map, int type, uint32_t rank, void* address, const uint64_t* dims,
                      const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                      int interleave, int swizzle, int promotion, int fill);
void copy_tensor_box(void* shared, const void* map, uint64_t* barrier, int x, int y, int z,
                     Place place);
template <typename Map>
void copy_box(void* shared, const Map* map, uint64_t* barrier, int x, int y, int z,
              Place place = SAGE_HERE) {
  copy_tensor_box(shared, map, barrier, x, y, z, place);
}
template <typename Map>
void prefetch_tensor_map(const Map*) {}
inline void fence_async_proxy() {}

/// Addresses as descriptors count: bytes of the block's shared memory window.
uint32_t shared_address(const void* pointer);
void wgmma_fence(Place place = SAGE_HERE);
void wgmma_commit(Place place = SAGE_HERE);
/// d [n / 2] is this lane's part; a null: from shared memory. Fragments and accumulators stay where
/// they are until the wait.
void wgmma(float* d, int n, const uint32_t* a, uint64_t descriptor_a, uint64_t descriptor_b,
           bool add, bool transposed_b, bool is_bf16, Place place = SAGE_HERE);
void wgmma_wait_groups(int pending, float* d, Place place);
template <int Pending, int Count>
void wgmma_wait(float (&d)[Count], Place place = SAGE_HERE) {
  wgmma_wait_groups(Pending, d, place);
}
void raise_registers_to(int count, Place place);
void lower_registers_to(int count, Place place);
template <int Count>
void raise_registers(Place place = SAGE_HERE) {
  raise_registers_to(Count, place);
}
template <int Count>
void lower_registers(Place place = SAGE_HERE) {
  lower_registers_to(Count, place);
}

}  // namespace cuda_emulation
