// Numbers, and the matrix instructions of one warp.
#include <algorithm>
#include <cmath>

#include "emulator_state.h"

namespace cuda_emulation {

// ---------------------------------------------------------------------------------------- numbers
float f16_bits_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

uint16_t float_to_f16_bits(float value) {
  const auto half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

uint16_t float_to_bf16_bits(float value) {
  const uint32_t bits = float_to_bits(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ----------------------------------------------------------------------------------- tensor cores
namespace {

struct Matrices {
  uint32_t* words;
  const unsigned char* row;
};

template <bool Transposed>
void load_matrices(void* const* lanes) {
  Statistics& counts = state().statistics;
  ++counts.matrix_loads;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const unsigned char* rows[8];
    int in_bank[8] = {};  // of 16 bytes; the rows of one matrix are read together
    for (int r = 0; r < 8; ++r) {
      rows[r] = static_cast<Matrices*>(lanes[matrix * 8 + r])->row;
      bool again = false;  // the same address is no conflict
      for (int other = 0; other < r; ++other) again = again || rows[other] == rows[r];
      if (!again) ++in_bank[reinterpret_cast<uintptr_t>(rows[r]) / 16 % 8];
    }
    counts.matrix_load_phases += *std::max_element(std::begin(in_bank), std::end(in_bank));
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane / 4;
      const int c = lane % 4 * 2;
      uint16_t low;
      uint16_t high;
      if constexpr (Transposed) {
        std::memcpy(&low, rows[c] + 2 * r, 2);
        std::memcpy(&high, rows[c + 1] + 2 * r, 2);
      } else {
        std::memcpy(&low, rows[r] + 2 * c, 2);
        std::memcpy(&high, rows[r] + 2 * (c + 1), 2);
      }
      static_cast<Matrices*>(lanes[lane])->words[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

template <typename Accumulator>
struct Product {
  Accumulator* c;
  const uint32_t* a;
  const uint32_t* b;
};

float decode_bf16(uint32_t bits) { return bits_to_float(bits << 16); }
float decode_f16(uint32_t bits) { return f16_bits_to_float(static_cast<uint16_t>(bits)); }
int32_t decode_s8(uint32_t bits) { return static_cast<int8_t>(bits); }
float decode_fp8(uint32_t bits) {
  const auto exponent = static_cast<int>(bits >> 3 & 15);
  const auto fraction = static_cast<float>(bits & 7);
  if ((bits & 0x7f) == 0x7f) return std::nanf("");
  const float value =
      exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8.0f + fraction, exponent - 10);
  return (bits & 0x80) != 0 ? -value : value;
}

/// c += a * b for m = 16, n = 8, k = K elements of `Bits` bits.
template <int K, int Bits, auto Decode, typename Accumulator, typename Sum>
void multiply(void* const* lanes) {
  ++state().statistics.matrix_products;
  constexpr int kPerWord = 32 / Bits;
  using Element = decltype(Decode(0u));
  Element a[16][K];
  Element b[K][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<Product<Accumulator>*>(lanes[lane]);
    const int row = lane / 4;
    const int column = lane % 4 * kPerWord;
    for (int i = 0; i < kPerWord; ++i) {
      const auto decode = [i](uint32_t word) {
        return Decode(word >> (i * Bits) & ((1u << Bits) - 1));
      };
      const int k = column + i;
      a[row][k] = decode(mine->a[0]);
      a[row + 8][k] = decode(mine->a[1]);
      a[row][k + K / 2] = decode(mine->a[2]);
      a[row + 8][k + K / 2] = decode(mine->a[3]);
      b[k][row] = decode(mine->b[0]);
      b[k + K / 2][row] = decode(mine->b[1]);
    }
  }
  Sum sums[16][8] = {};
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < K; ++k) {
      const Sum left = static_cast<Sum>(a[m][k]);
      for (int n = 0; n < 8; ++n) sums[m][n] += left * static_cast<Sum>(b[k][n]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    Accumulator* c = static_cast<Product<Accumulator>*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) {
      const Sum sum = sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      c[i] = static_cast<Accumulator>(static_cast<Sum>(c[i]) + sum);
    }
  }
}

}  // namespace

void ldmatrix(uint32_t (&words)[4], const void* row, bool transposed, Place place) {
  check_aligned(row, 16, "ldmatrix", place);
  check_shared(row, 16, "ldmatrix from", place);
  Matrices mine{words, static_cast<const unsigned char*>(row)};
  warp_operation(transposed ? load_matrices<true> : load_matrices<false>, &mine, place);
}

void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bf16,
                  Place place) {
  Product<float> mine{c, a, b};
  warp_operation(is_bf16 ? multiply<16, 16, decode_bf16, float, double>
                         : multiply<16, 16, decode_f16, float, double>,
                 &mine, place);
}

void mma_m16n8k32_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place) {
  Product<int32_t> mine{c, a, b};
  warp_operation(multiply<32, 8, decode_s8, int32_t, int32_t>, &mine, place);
}

void mma_m16n8k32_fp8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place) {
  Product<float> mine{c, a, b};
  warp_operation(multiply<32, 8, decode_fp8, float, double>, &mine, place);
}

}  // namespace cuda_emulation

int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) {
    c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  }
  return c;
}

unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (choice & 7))) & 0xff;
    if ((choice & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
