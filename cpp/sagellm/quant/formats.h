// GGUF blocks as they lie in a file. Packed structs: a block may begin at any byte.
#pragma once

#include <cstdint>

namespace sagellm::quant {

inline constexpr int kBlock = 32;        // elements of a simple block
inline constexpr int kSuperblock = 256;  // elements of a K-quant block

#pragma pack(push, 1)

/// w = d * (q - 8). qs[i]: low nibble is element i, high nibble element 16 + i (all 32-blocks).
struct BlockQ4_0 {
  uint16_t d;
  uint8_t qs[16];
};

/// w = d * q + m.
struct BlockQ4_1 {
  uint16_t d;
  uint16_t m;
  uint8_t qs[16];
};

/// w = d * (q - 16). Bit i of qh is bit 4 of element i.
struct BlockQ5_0 {
  uint16_t d;
  uint32_t qh;
  uint8_t qs[16];
};

/// w = d * q + m.
struct BlockQ5_1 {
  uint16_t d;
  uint16_t m;
  uint32_t qh;
  uint8_t qs[16];
};

/// w = d * q.
struct BlockQ8_0 {
  uint16_t d;
  int8_t qs[32];
};

/// w = d * kIq4NlCodebook[q].
struct BlockIQ4_NL {
  uint16_t d;
  uint8_t qs[16];
};

/// w = d * (scales & 15) * q - dmin * (scales >> 4), one scale byte per 16 elements.
/// qs: 128 elements per 32 bytes, element 32 * s + l at bits 2 * s of byte l.
struct BlockQ2_K {
  uint8_t scales[16];
  uint8_t qs[64];
  uint16_t d;
  uint16_t dmin;
};

/// w = d * (sc - 32) * (q - (hmask bit ? 0 : 4)), one 6-bit sc per 16 elements. qs as in Q2_K;
/// element 32 * u + l has bit u of hmask[l].
struct BlockQ3_K {
  uint8_t hmask[32];
  uint8_t qs[64];
  uint8_t scales[12];
  uint16_t d;
};

/// w = d * sc * q - dmin * mn, 6-bit sc and mn per 32 elements. qs: 64 elements per 32 bytes, the
/// low nibbles first.
struct BlockQ4_K {
  uint16_t d;
  uint16_t dmin;
  uint8_t scales[12];
  uint8_t qs[128];
};

/// As Q4_K; element 32 * u + l has its bit 4 in bit u of qh[l].
struct BlockQ5_K {
  uint16_t d;
  uint16_t dmin;
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[128];
};

/// w = d * sc * (q - 32), one sc per 16 elements. Per 128 elements: bits 0..3 in 64 bytes of ql (32
/// * s + l in byte 32 * (s & 1) + l, nibble s >> 1), bits 4..5 in 32 bytes of qh (bits 2 * s of
/// byte l).
struct BlockQ6_K {
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  uint16_t d;
};

#pragma pack(pop)

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20 && sizeof(BlockQ5_0) == 22);
static_assert(sizeof(BlockQ5_1) == 24 && sizeof(BlockQ8_0) == 34 && sizeof(BlockIQ4_NL) == 18);
static_assert(sizeof(BlockQ2_K) == 84 && sizeof(BlockQ3_K) == 110 && sizeof(BlockQ4_K) == 144);
static_assert(sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210);
static_assert(alignof(BlockQ4_K) == 1 && alignof(BlockQ5_0) == 1);

/// The 16 weight levels of IQ4_NL.
inline constexpr int8_t kIq4NlCodebook[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                              1,    13,   25,  38,  53,  69,  89,  113};

/// Unpacks the eight 6-bit scales and minima of Q4_K and Q5_K.
inline void unpack_scales_k4(const uint8_t* packed, uint8_t sc[8], uint8_t mn[8]) {
  for (int i = 0; i < 4; ++i) {
    sc[i] = packed[i] & 63;
    mn[i] = packed[4 + i] & 63;
    sc[4 + i] = static_cast<uint8_t>((packed[8 + i] & 15) | ((packed[i] >> 6) << 4));
    mn[4 + i] = static_cast<uint8_t>((packed[8 + i] >> 4) | ((packed[4 + i] >> 6) << 4));
  }
}

/// Unpacks the sixteen scales of Q3_K to -32..31.
inline void unpack_scales_q3(const uint8_t* packed, int8_t sc[16]) {
  for (int i = 0; i < 16; ++i) {
    const int low = (packed[i & 7] >> (i < 8 ? 0 : 4)) & 15;
    const int high = (packed[8 + (i & 3)] >> (2 * (i >> 2))) & 3;
    sc[i] = static_cast<int8_t>((low | (high << 4)) - 32);
  }
}

}  // namespace sagellm::quant
