// Numbers narrower than float, and the instructions that CUDA C++ has no name for. Fragment layouts
// are those of the PTX ISA ("Matrix fragments for mma.m16n8k16"); with lane = 4 * row + column:
//
//   A 16x16  a[0] = (row, 2c..)  a[1] = (row + 8, 2c..)  a[2] = (row, 2c + 8..)  a[3] = (row + 8,
//   2c + 8..) B 16x8   b[0] = (k = 2c.., n = row)  b[1] = (k = 2c + 8.., n = row) C 16x8   c[0],
//   c[1] = (row, 2c), (row, 2c + 1)  c[2], c[3] = the same of row + 8
//
// For 8-bit elements the words hold four consecutive k, at 4c and 4c + 16. A is row-major, B
// column-major: both have consecutive k in a word.
#pragma once

#include "sagellm/kernels/cuda/platform.cuh"

namespace sagellm::kernels::cuda {

/// Stored numbers; arithmetic happens in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct fp8 {  // e4m3: 1 sign, 4 exponent, 3 fraction bits; largest value 448
  uint8_t bits;
};

#if defined(__CUDACC__)

SAGE_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
SAGE_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }

// ------------------------------------------------------------------------------------ conversion
SAGE_DEVICE float f16_bits_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
SAGE_DEVICE uint16_t float_to_f16_bits(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
SAGE_DEVICE uint16_t float_to_bf16_bits(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
SAGE_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
SAGE_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// ----------------------------------------------------------------------------------- packed words
/// a - b of two f16 numbers each.
SAGE_DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  uint32_t word;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}
/// a * b of two bf16 numbers each, subnormal ones included.
SAGE_DEVICE uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t word;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(0x80008000u));
  return word;
}

// -------------------------------------------------------------------------------- approximations
/// 2^x and log2(x) with about 22 correct bits; subnormals are flushed.
SAGE_DEVICE float ex2(float x) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}
SAGE_DEVICE float lg2(float x) {
  float value;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}
SAGE_DEVICE float reciprocal(float x) {
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

// --------------------------------------------------------------------------------- global memory
/// Reads 16 aligned bytes that no thread of this launch writes, once: they pass by the L1 cache.
SAGE_DEVICE uint4 load_stream(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}
/// Writes 16 aligned bytes that this launch does not read again.
SAGE_DEVICE void store_stream(void* address, uint4 value) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}
/// A value that another block published before its release, and such a publication.
SAGE_DEVICE uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
SAGE_DEVICE void store_release(uint32_t* address, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// ------------------------------------------------------------------------- copies into shared
// memory
SAGE_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
/// Starts copying 16 aligned bytes; without `valid` 16 zeros are written and `source`, which must
/// still be an address of the device, is not read.
SAGE_DEVICE void cp_async_16(void* shared, const void* source, bool valid = true) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(source), "r"(valid ? 16 : 0)
      : "memory");
}
/// Closes the group of copies started since the last commit (it may be empty).
SAGE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `Pending` of this thread's groups are unfinished. Other threads see the
/// copied bytes after a barrier.
template <int Pending>
SAGE_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ------------------------------------------------------------------------------------ tensor cores
/// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8. Of
/// matrix j, lane 4r + c receives elements (r, 2c), (r, 2c + 1) in word j.
SAGE_DEVICE void ldmatrix_x4(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}
/// The same with each matrix transposed: lane 4r + c receives elements (2c, r), (2c + 1, r).
SAGE_DEVICE void ldmatrix_x4_trans(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

/// c += a * b on 16x8x16; T is bf16 or f16.
template <typename T>
SAGE_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}
/// c += a * b on 16x8x32 of int8.
SAGE_DEVICE void mma_m16n8k32_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// c += a * b on 16x8x32 of fp8, for compute capability 8.9 and newer; older devices trap.
SAGE_DEVICE void mma_m16n8k32_fp8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

#else

using cuda_emulation::bits_to_float;
using cuda_emulation::cp_async_16;
using cuda_emulation::cp_async_commit;
using cuda_emulation::cp_async_wait;
using cuda_emulation::ex2;
using cuda_emulation::f16_bits_to_float;
using cuda_emulation::float_to_bf16_bits;
using cuda_emulation::float_to_bits;
using cuda_emulation::float_to_f16_bits;
using cuda_emulation::ldmatrix_x4;
using cuda_emulation::ldmatrix_x4_trans;
using cuda_emulation::lg2;
using cuda_emulation::load_acquire;
using cuda_emulation::load_stream;
using cuda_emulation::mma_m16n8k32_fp8;
using cuda_emulation::mma_m16n8k32_s8;
using cuda_emulation::pack_bf16;
using cuda_emulation::pack_f16;
using cuda_emulation::reciprocal;
using cuda_emulation::store_release;
using cuda_emulation::store_stream;

SAGE_DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t word, int shift) {
    return f16_bits_to_float(static_cast<uint16_t>(word >> shift));
  };
  return pack_f16(half(a, 0) - half(b, 0), half(a, 16) - half(b, 16));
}

SAGE_DEVICE uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  const auto product = [a, b](uint32_t keep, int shift) {
    return bits_to_float((a & keep) << shift) * bits_to_float((b & keep) << shift);
  };
  return pack_bf16(product(0xffffu, 16), product(0xffff0000u, 0));
}

template <typename T>
SAGE_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  cuda_emulation::mma_m16n8k16(c, a, b, std::is_same_v<T, bf16>);
}

#endif

// ------------------------------------------------------------------------------------ built on
// these
SAGE_DEVICE float to_float(float value) { return value; }
SAGE_DEVICE float to_float(bf16 value) {
  return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}
SAGE_DEVICE float to_float(f16 value) { return f16_bits_to_float(value.bits); }
/// Exact; the two NaN patterns give 480, and no writer here produces them.
SAGE_DEVICE float to_float(fp8 value) {
  const uint32_t bits = value.bits;
  return f16_bits_to_float(static_cast<uint16_t>((bits & 0x80u) << 8 | (bits & 0x7fu) << 7)) *
         256.0f;
}

/// Rounds to nearest even.
template <typename T>
SAGE_DEVICE T from_float(float value) {
  if constexpr (std::is_same_v<T, bf16>) {
    return bf16{float_to_bf16_bits(value)};
  } else if constexpr (std::is_same_v<T, f16>) {
    return f16{float_to_f16_bits(value)};
  } else if constexpr (std::is_same_v<T, fp8>) {
    // Saturates; NaN becomes -448. Adding 2^(e + 20) leaves e4m3's three fraction bits,
    // rounded to nearest even, at the end of the float's fraction.
    const float limited = fminf(fmaxf(value, -448.0f), 448.0f);
    const uint32_t sign = (float_to_bits(limited) >> 24) & 0x80u;
    const float magnitude = fabsf(limited);
    const uint32_t exponent = float_to_bits(fmaxf(magnitude, 0.015625f)) & 0x7f800000u;
    const float scale = bits_to_float(exponent + (20u << 23));
    const float rounded = (magnitude + scale) - scale;
    const uint32_t code = rounded < 0.015625f ? static_cast<uint32_t>(rounded * 512.0f)
                                              : (float_to_bits(rounded) >> 20) - ((127u - 7u) << 3);
    return fp8{static_cast<uint8_t>(sign | code)};
  } else {
    static_assert(std::is_same_v<T, float>);
    return value;
  }
}

/// Two values in one word, the first in the low half; T is bf16 or f16.
template <typename T>
SAGE_DEVICE uint32_t pack2(float low, float high) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  if constexpr (std::is_same_v<T, bf16>) {
    return pack_bf16(low, high);
  } else {
    return pack_f16(low, high);
  }
}
template <typename T>
SAGE_DEVICE float2 unpack2(uint32_t word) {
  const T low{static_cast<uint16_t>(word)};
  const T high{static_cast<uint16_t>(word >> 16)};
  return float2{to_float(low), to_float(high)};
}

}  // namespace sagellm::kernels::cuda
