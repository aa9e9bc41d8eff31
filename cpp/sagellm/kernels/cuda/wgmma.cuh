// Instructions of compute capability 9.0a: products of four warps (wgmma), barriers in shared
// memory (mbarrier) and copies of boxes by the copy engine (TMA). What they do and where their
// operands lie follows the PTX ISA:
//
//   "Register Fragments and Shared Memory Matrix Layouts" of wgmma.mma_async: fragments of A and D,
//   the strides of K-major and MN-major matrices, the matrix descriptor "mbarrier": phases and
//   their parity, pending arrivals, tx-count "cp.async.bulk.tensor" and "Tensors": boxes,
//   coordinates, zero fill, swizzling modes
//
// Of D (64 x N), warp w of the four has rows 16 w .. 16 w + 15 in the layout of mma.m16n8k16 (see
// ptx.cuh), block of eight columns after block: element 4 n + i of a lane is c[i] of columns 8 n ..
// A in registers (64 x 16) is split in the same way.
#pragma once

#include "sagellm/kernels/cuda/ptx.cuh"
#include "sagellm/kernels/cuda/tensor_map.h"

// The one pass of nvcc that may use them; kernels are empty in the others and never launched there.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SAGE_WARPGROUP_CODE 1
#else
#define SAGE_WARPGROUP_CODE 0
#endif

namespace sagellm::kernels::cuda {

inline constexpr int kWarpgroupSize = 128;

/// Rows of 128 bytes as the copy engine lays them down with CU_TENSOR_MAP_SWIZZLE_128B, and as
/// wgmma reads them: 16-byte piece c of a row lies at piece c ^ (row % 8). Blocks of eight rows
/// (1024 bytes) repeat, and start at multiples of 1024.
inline constexpr int kSwizzleRowBytes = 128;
inline constexpr int kSwizzleBlockBytes = 1024;
SAGE_DEVICE int swizzled(int row, int piece) {
  return row * kSwizzleRowBytes + ((piece ^ (row & 7)) << 4);
}

#if defined(__CUDACC__)

// -------------------------------------------------------------------------------------- barriers
/// A barrier in shared memory (8 bytes) whose phases end with `arrivals` arrivals and all bytes
/// that were announced. The first phase has parity 0.
SAGE_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
/// Makes barriers that this thread initialised known to the copy engine.
SAGE_DEVICE void mbarrier_publish() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
SAGE_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
/// Announces `bytes` of the present phase and arrives.
SAGE_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
/// Waits for the end of the phase of `parity`. Of a fresh barrier the phase of parity 1 has ended.
SAGE_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni finished;\n"
      "bra.uni again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---------------------------------------------------------------------------------------- copies
SAGE_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
/// Starts copying the box at (x, y, z) of the array to `shared`; bytes beyond the array's ends
/// arrive as zeros. The bytes of the whole box count for the barrier. For one thread.
SAGE_DEVICE void copy_box(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y,
                          int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared)),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
      : "memory");
}
/// Makes this thread's ordinary writes to shared memory known to wgmma and the copy engine; a
/// barrier between the threads comes after it.
SAGE_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ------------------------------------------------------------------------------------ warpgroups
/// Counts this thread in at barrier `id` without waiting there.
SAGE_DEVICE void arrive_named(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/// Registers of the threads of this warpgroup from here on.
template <int kCount>
SAGE_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
SAGE_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// --------------------------------------------------------------------------------------- products
/// Before the first product, and after registers that a product reads or adds to were written.
SAGE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// Closes the group of products started since the last commit.
SAGE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most `kPending` of the groups are unfinished, after which the accumulators `d`
/// hold their sums: no product still in flight may add to them.
template <int kPending, int kCount>
SAGE_DEVICE void wgmma_wait(float (&d)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");  // read no earlier
}
/// Keeps the arithmetic that gives `values` in front of what follows: a compiler that moves it
/// behind the next wait would leave nothing to do while products run.
template <int kCount>
SAGE_DEVICE void compute_here(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

#define SAGE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SAGE_D16(i) SAGE_D4(i), SAGE_D4(i + 4), SAGE_D4(i + 8), SAGE_D4(i + 12)
#define SAGE_D32(i) SAGE_D16(i), SAGE_D16(i + 16)
#define SAGE_WGMMA_SS_128(type)                                                               \
  asm volatile(                                                                               \
      "{\n"                                                                                   \
      ".reg .pred keep;\n"                                                                    \
      "setp.ne.b32 keep, %66, 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                            \
      " {"                                                                                    \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                                 \
      "}, %64, %65, keep, 1, 1, 0, 0;\n"                                                      \
      "}\n"                                                                                   \
      : SAGE_D32(0), SAGE_D32(32)                                                             \
      : "l"(a), "l"(b), "r"(add ? 1 : 0))
#define SAGE_WGMMA_RS_128(type)                                                               \
  asm volatile(                                                                               \
      "{\n"                                                                                   \
      ".reg .pred keep;\n"                                                                    \
      "setp.ne.b32 keep, %69, 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                            \
      " {"                                                                                    \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                                 \
      "}, {%64, %65, %66, %67}, %68, keep, 1, 1, 1;\n"                                        \
      "}\n"                                                                                   \
      : SAGE_D32(0), SAGE_D32(32)                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add ? 1 : 0))
#define SAGE_WGMMA_RS_64(type)                                                                \
  asm volatile(                                                                               \
      "{\n"                                                                                   \
      ".reg .pred keep;\n"                                                                    \
      "setp.ne.b32 keep, %37, 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                             \
      " {"                                                                                    \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                       \
      "}, {%32, %33, %34, %35}, %36, keep, 1, 1, 1;\n"                                        \
      "}\n"                                                                                   \
      : SAGE_D32(0)                                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add ? 1 : 0))

/// Starts d = a * b (+ d with `add`) on 64 x 128 x 16, both from shared memory, K-major; T is bf16
/// or f16.
template <typename T>
SAGE_DEVICE void wgmma_shared(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  if constexpr (std::is_same_v<T, bf16>) {
    SAGE_WGMMA_SS_128("bf16");
  } else {
    SAGE_WGMMA_SS_128("f16");
  }
}
/// Starts d = a * b (+ d with `add`) on 64 x N x 16, a from registers, b from shared memory,
/// N-major: the N elements of one k lie side by side.
template <typename T, int kCount>
SAGE_DEVICE void wgmma_registers(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(kCount == 64 || kCount == 32, "N is 128 or 64");
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (kCount == 64 && kBf16) {
    SAGE_WGMMA_RS_128("bf16");
  } else if constexpr (kCount == 64) {
    SAGE_WGMMA_RS_128("f16");
  } else if constexpr (kBf16) {
    SAGE_WGMMA_RS_64("bf16");
  } else {
    SAGE_WGMMA_RS_64("f16");
  }
}

#else

using cuda_emulation::arrive_named;
using cuda_emulation::copy_box;
using cuda_emulation::fence_async_proxy;
using cuda_emulation::lower_registers;
using cuda_emulation::mbarrier_arrive;
using cuda_emulation::mbarrier_arrive_expect;
using cuda_emulation::mbarrier_init;
using cuda_emulation::mbarrier_publish;
using cuda_emulation::mbarrier_wait;
using cuda_emulation::prefetch_tensor_map;
using cuda_emulation::raise_registers;
using cuda_emulation::shared_address;
using cuda_emulation::wgmma_commit;
using cuda_emulation::wgmma_fence;
using cuda_emulation::wgmma_wait;

template <typename T>
SAGE_DEVICE void wgmma_shared(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  cuda_emulation::wgmma(d, 128, nullptr, a, b, add, false, std::is_same_v<T, bf16>);
}
template <typename T, int kCount>
SAGE_DEVICE void wgmma_registers(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool add) {
  cuda_emulation::wgmma(d, 2 * kCount, a, 0, b, add, true, std::is_same_v<T, bf16>);
}

template <int kCount>
SAGE_DEVICE void compute_here(float (&)[kCount]) {}

#endif

/// The descriptor of a matrix in shared memory whose rows of 128 bytes are swizzled (PTX ISA,
/// "Matrix Descriptor": bits 0-13 start, 16-29 leading stride, 32-45 stride, all in units of 16
/// bytes, 62-63 swizzling mode 1; the matrix base offset is 0, as blocks start at multiples of
/// 1024).
///
/// K-major: rows run along m or n; blocks of eight rows are 1024 bytes apart, the leading stride is
/// not used. A step of 16 in k moves the start by 32 bytes.
/// N-major: rows run along k, 64 elements of n each; blocks of eight rows are 1024 bytes apart, and
/// `column_bytes` separate 64 elements of n from the next 64. A step of 16 in k moves the start by
/// two blocks.
SAGE_DEVICE uint64_t matrix_descriptor(const void* start, int column_bytes) {
  const uint64_t address = (shared_address(start) & 0x3ffff) >> 4;
  const auto leading = static_cast<uint64_t>(column_bytes >> 4);
  return address | leading << 16 | uint64_t{kSwizzleBlockBytes >> 4} << 32 | uint64_t{1} << 62;
}
/// The same matrix `bytes` further on.
SAGE_DEVICE uint64_t moved(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

}  // namespace sagellm::kernels::cuda
