#include "sagellm/quant/pack.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/base/math.h"
#include "sagellm/quant/formats.h"
#include "sagellm/quant/packed_unit.h"

namespace sagellm::quant {

using kernels::PackedFormat;

namespace {

/// Source bytes of the 16 rows of one row block.
using Rows = std::array<const uint8_t*, kRows>;

template <typename Block>
const Block& block_of(const Rows& rows, int r, int64_t index) {
  return reinterpret_cast<const Block*>(rows[static_cast<size_t>(r)])[index];
}

inline uint32_t load32(const void* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}
inline void store32(uint8_t* p, uint32_t v) { std::memcpy(p, &v, 4); }
inline void store16(uint8_t* p, uint16_t v) { std::memcpy(p, &v, 2); }

/// Bits 0..3, each in bit 0 of a byte of its own.
inline uint32_t spread_bits(uint32_t bits) { return (bits * 0x00204081u) & 0x01010101u; }

// ---- plain formats ------------------------------------------------------------------------------

void pack_f32(const Rows& rows, int64_t k, uint8_t* out) {
  for (int64_t i = 0; i < k; ++i, out += 4 * kRows) {
    for (size_t r = 0; r < kRows; ++r) store32(out + 4 * r, load32(rows[r] + 4 * i));
  }
}

void pack_f16(const Rows& rows, int64_t k, uint8_t* out) {
  for (int64_t i = 0; i < k; ++i, out += 2 * kRows) {
    for (size_t r = 0; r < kRows; ++r) store16(out + 2 * r, load16(rows[r] + 2 * i));
  }
}

void pack_bf16(const Rows& rows, int64_t k, uint8_t* out) {
  for (int64_t i = 0; i + 1 < k; i += 2, out += 4 * kRows) {
    for (size_t r = 0; r < kRows; ++r) store32(out + 4 * r, load32(rows[r] + 2 * i));
  }
  if (k % 2 != 0) {
    for (size_t r = 0; r < kRows; ++r) store32(out + 4 * r, load16(rows[r] + 2 * (k - 1)));
  }
}

/// Codes, and the scales of source row source_rows[r]; -1 stands for a row that does not exist.
void pack_f8(const Rows& rows, const std::array<int64_t, kRows>& source_rows,
             const ScaleGrid* scales, int64_t k, uint8_t* out) {
  for (int64_t begin = 0; begin < k; begin += kernels::kF8Group) {
    for (size_t r = 0; r < kRows; ++r) {
      const int64_t row = source_rows[r];
      const float scale = row < 0 ? 0.f : scales == nullptr ? 1.f : scales->at(row, begin);
      std::memcpy(out + 4 * r, &scale, 4);
    }
    out += 4 * kRows;
    const int64_t end = std::min(begin + kernels::kF8Group, k);
    for (int64_t i = begin; i < end; ++i, out += kRows) {
      for (size_t r = 0; r < kRows; ++r) out[r] = rows[r][i];
    }
  }
}

// ---- blocks of 32 -------------------------------------------------------------------------------

/// GGUF's nibble order is that of the packed unit, so a row's 16 bytes are 4 dwords to scatter.
template <typename Block>
uint8_t* put_block_nibbles(const Rows& rows, int64_t b, uint8_t* out) {
  for (int r = 0; r < kRows; ++r) {
    const uint8_t* qs = block_of<Block>(rows, r, b).qs;
    for (int j = 0; j < 4; ++j) store32(out + 64 * j + 4 * r, load32(qs + 4 * j));
  }
  return out + kNibbleBytes;
}

template <typename Block>
uint8_t* put_block_high(const Rows& rows, int64_t b, uint8_t* out) {
  for (int r = 0; r < kRows; ++r) {
    const uint32_t qh = block_of<Block>(rows, r, b).qh;
    uint32_t bits = 0;
    for (int j = 0; j < kUnitDwords; ++j) bits |= spread_bits((qh >> (4 * j)) & 15) << j;
    store32(out + 4 * r, bits);
  }
  return out + kHighBytes;
}

template <typename Block>
uint8_t* put_d(const Rows& rows, int64_t b, uint8_t* out) {
  for (int r = 0; r < kRows; ++r) store16(out + 2 * r, block_of<Block>(rows, r, b).d);
  return out + 2 * kRows;
}

template <typename Block>
uint8_t* put_m(const Rows& rows, int64_t b, uint8_t* out) {
  for (int r = 0; r < kRows; ++r) store16(out + 2 * r, block_of<Block>(rows, r, b).m);
  return out + 2 * kRows;
}

/// Q4_0, Q4_1, Q5_0, Q5_1.
template <typename Block, bool kHigh, bool kMin>
void pack_small(const Rows& rows, int64_t k, uint8_t* out) {
  for (int64_t b = 0; b < k / kBlock; ++b) {
    out = put_block_nibbles<Block>(rows, b, out);
    if constexpr (kHigh) out = put_block_high<Block>(rows, b, out);
    out = put_d<Block>(rows, b, out);
    if constexpr (kMin) out = put_m<Block>(rows, b, out);
  }
}

void pack_q8_0(const Rows& rows, int64_t k, uint8_t* out) {
  for (int64_t b = 0; b < k / kBlock; ++b) {
    for (int r = 0; r < kRows; ++r) {
      const int8_t* qs = block_of<BlockQ8_0>(rows, r, b).qs;
      for (int j = 0; j < kUnitDwords; ++j)
        store32(out + 64 * j + 4 * r, load32(qs + 4 * j) ^ 0x80808080u);
    }
    out = put_d<BlockQ8_0>(rows, b, out + 64 * kUnitDwords);
  }
}

void pack_iq4_nl(const Rows& rows, int64_t k, uint8_t* out) {
  uint8_t codes[16];
  for (int i = 0; i < 16; ++i) codes[i] = static_cast<uint8_t>(kIq4NlCodebook[i] + 128);
  for (int64_t b = 0; b < k / kBlock; ++b) {
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* qs = block_of<BlockIQ4_NL>(rows, r, b).qs;
      for (int i = 0; i < 16; ++i) {
        uint8_t* to = out + i / 4 * 64 + 4 * r + i % 4;
        to[0] = codes[qs[i] & 15];
        to[256] = codes[qs[i] >> 4];
      }
    }
    out = put_d<BlockIQ4_NL>(rows, b, out + 64 * kUnitDwords);
  }
}

// ---- K-quants: a row's unit becomes 8 dwords of codes, one byte each, then bit planes -----------

using Codes = std::array<uint32_t, kUnitDwords>;

inline Codes unit_codes(const BlockQ4_K& b, int u) {
  Codes q;
  const uint8_t* qs = b.qs + u / 2 * 32;
  for (size_t j = 0; j < kUnitDwords; ++j)
    q[j] = (load32(qs + 4 * j) >> (4 * (u & 1))) & 0x0f0f0f0fu;
  return q;
}

inline Codes unit_codes(const BlockQ5_K& b, int u) {
  Codes q;
  const uint8_t* qs = b.qs + u / 2 * 32;
  for (size_t j = 0; j < kUnitDwords; ++j) {
    q[j] = ((load32(qs + 4 * j) >> (4 * (u & 1))) & 0x0f0f0f0fu) |
           (((load32(b.qh + 4 * j) >> u) & 0x01010101u) << 4);
  }
  return q;
}

inline Codes unit_codes(const BlockQ6_K& b, int u) {
  Codes q;
  const int s = u % 4;
  const uint8_t* ql = b.ql + u / 4 * 64 + (s & 1) * 32;
  const uint8_t* qh = b.qh + u / 4 * 32;
  for (size_t j = 0; j < kUnitDwords; ++j) {
    q[j] = ((load32(ql + 4 * j) >> (4 * (s >> 1))) & 0x0f0f0f0fu) |
           (((load32(qh + 4 * j) >> (2 * s)) & 0x03030303u) << 4);
  }
  return q;
}

/// As Q6_K codes: q - 4 = (q + 28) - 32 with the high bit counting 4.
inline Codes unit_codes(const BlockQ3_K& b, int u) {
  Codes q;
  const uint8_t* qs = b.qs + u / 4 * 32;
  for (size_t j = 0; j < kUnitDwords; ++j) {
    const uint32_t low = (load32(qs + 4 * j) >> (2 * (u % 4))) & 0x03030303u;
    const uint32_t high = ((load32(b.hmask + 4 * j) >> u) & 0x01010101u) << 2;
    q[j] = 0x1c1c1c1cu + low + high;  // at most 35 in a byte: no carries
  }
  return q;
}

inline void put_nibbles(const Codes& q, int r, uint8_t* out) {
  for (size_t j = 0; j < 4; ++j) {
    store32(out + 64 * j + 4 * static_cast<size_t>(r),
            (q[j] & 0x0f0f0f0fu) | ((q[j + 4] & 0x0f0f0f0fu) << 4));
  }
}

/// Q4_K and Q5_K.
template <typename Block, bool kHigh>
void pack_scaled_min(const Rows& rows, int64_t k, uint8_t* out) {
  for (int64_t b = 0; b < k / kSuperblock; ++b) {
    for (int u = 0; u < kUnits; ++u) {
      for (int r = 0; r < kRows; ++r) {
        const Codes q = unit_codes(block_of<Block>(rows, r, b), u);
        put_nibbles(q, r, out);
        if constexpr (kHigh) {
          uint32_t bits = 0;
          for (size_t j = 0; j < kUnitDwords; ++j) bits |= ((q[j] >> 4) & 0x01010101u) << j;
          store32(out + kNibbleBytes + 4 * r, bits);
        }
      }
      out += kNibbleBytes + (kHigh ? kHighBytes : 0);
    }
    for (int r = 0; r < kRows; ++r) {
      const Block& block = block_of<Block>(rows, r, b);
      uint8_t sc[kUnits];
      uint8_t mn[kUnits];
      unpack_scales_k4(block.scales, sc, mn);
      for (int u = 0; u < kUnits; ++u) {
        out[u * kRows + r] = sc[u];
        out[(kUnits + u) * kRows + r] = mn[u];
      }
      store16(out + 2 * kUnits * kRows + 2 * r, block.d);
      store16(out + 2 * kUnits * kRows + 2 * kRows + 2 * r, block.dmin);
    }
    out += 2 * kUnits * kRows + 4 * kRows;
  }
}

inline void unit_scales(const BlockQ6_K& b, int8_t sc[16]) { std::memcpy(sc, b.scales, 16); }
inline void unit_scales(const BlockQ3_K& b, int8_t sc[16]) { unpack_scales_q3(b.scales, sc); }

/// Q6_K, and Q3_K into it.
template <typename Block>
void pack_six_bit(const Rows& rows, int64_t k, uint8_t* out) {
  for (int64_t b = 0; b < k / kSuperblock; ++b) {
    for (int u = 0; u < kUnits; ++u) {
      for (int r = 0; r < kRows; ++r) {
        const Codes q = unit_codes(block_of<Block>(rows, r, b), u);
        put_nibbles(q, r, out);
        for (size_t plane = 0; plane < 2; ++plane) {
          uint32_t two = 0;
          for (size_t t = 0; t < 4; ++t) two |= ((q[2 * t + plane] >> 4) & 0x03030303u) << (2 * t);
          store32(out + kNibbleBytes + 64 * plane + 4 * static_cast<size_t>(r), two);
        }
      }
      out += kNibbleBytes + kTwoBytes;
    }
    for (int r = 0; r < kRows; ++r) {
      const Block& block = block_of<Block>(rows, r, b);
      int8_t sc[16];
      unit_scales(block, sc);
      for (int i = 0; i < 16; ++i) out[i * kRows + r] = static_cast<uint8_t>(sc[i]);
      store16(out + 16 * kRows + 2 * r, block.d);
    }
    out += 16 * kRows + 2 * kRows;
  }
}

void pack_block(Format source, const Rows& rows, int64_t k, uint8_t* out) {
  switch (source) {
    case Format::kF32:
      return pack_f32(rows, k, out);
    case Format::kF16:
      return pack_f16(rows, k, out);
    case Format::kBF16:
      return pack_bf16(rows, k, out);
    case Format::kF8_E4M3:
      break;  // pack_f8
    case Format::kQ4_0:
      return pack_small<BlockQ4_0, false, false>(rows, k, out);
    case Format::kQ4_1:
      return pack_small<BlockQ4_1, false, true>(rows, k, out);
    case Format::kQ5_0:
      return pack_small<BlockQ5_0, true, false>(rows, k, out);
    case Format::kQ5_1:
      return pack_small<BlockQ5_1, true, true>(rows, k, out);
    case Format::kQ8_0:
      return pack_q8_0(rows, k, out);
    case Format::kIQ4_NL:
      return pack_iq4_nl(rows, k, out);
    case Format::kQ4_K:
      return pack_scaled_min<BlockQ4_K, false>(rows, k, out);
    case Format::kQ5_K:
      return pack_scaled_min<BlockQ5_K, true>(rows, k, out);
    case Format::kQ6_K:
      return pack_six_bit<BlockQ6_K>(rows, k, out);
    case Format::kQ3_K:
      return pack_six_bit<BlockQ3_K>(rows, k, out);
    case Format::kQ2_K:
      break;  // packed_format_of refuses it
  }
}

}  // namespace

std::string_view packed_format_name(PackedFormat format) {
  switch (format) {
    case PackedFormat::kF32:
      return "F32";
    case PackedFormat::kF16:
      return "F16";
    case PackedFormat::kBF16:
      return "BF16";
    case PackedFormat::kF8:
      return "F8_E4M3";
    case PackedFormat::kQ4_0:
      return "Q4_0";
    case PackedFormat::kQ4_1:
      return "Q4_1";
    case PackedFormat::kQ5_0:
      return "Q5_0";
    case PackedFormat::kQ5_1:
      return "Q5_1";
    case PackedFormat::kQ8_0:
      return "Q8_0";
    case PackedFormat::kQ4_K:
      return "Q4_K";
    case PackedFormat::kQ5_K:
      return "Q5_K";
    case PackedFormat::kQ6_K:
      return "Q6_K";
  }
  return "?";
}

PackedFormat packed_format_of(Format source) {
  switch (source) {
    case Format::kF32:
      return PackedFormat::kF32;
    case Format::kF16:
      return PackedFormat::kF16;
    case Format::kBF16:
      return PackedFormat::kBF16;
    case Format::kF8_E4M3:
      return PackedFormat::kF8;
    case Format::kQ4_0:
      return PackedFormat::kQ4_0;
    case Format::kQ4_1:
      return PackedFormat::kQ4_1;
    case Format::kQ5_0:
      return PackedFormat::kQ5_0;
    case Format::kQ5_1:
      return PackedFormat::kQ5_1;
    case Format::kQ8_0:
      return PackedFormat::kQ8_0;
    case Format::kIQ4_NL:
      return PackedFormat::kQ8_0;
    case Format::kQ4_K:
      return PackedFormat::kQ4_K;
    case Format::kQ5_K:
      return PackedFormat::kQ5_K;
    case Format::kQ6_K:
      return PackedFormat::kQ6_K;
    case Format::kQ3_K:
      return PackedFormat::kQ6_K;
    case Format::kQ2_K:
      break;
  }
  fail<Unsupported>("the native kernels do not run ", format_info(source).name,
                    " weights; use the reference backend, or a file quantized to Q3_K or more");
}

PackedMatrix make_packed(Format source, int64_t n, int64_t k) {
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  require<InvalidArgument>(n > 0 && n <= kLargest && k > 0 && k <= kLargest, "a weight matrix of ",
                           n, " x ", k, "; both extents must be positive 32-bit integers");
  (void)row_bytes(source, k);  // throws unless k is whole blocks
  PackedMatrix out;
  out.format = packed_format_of(source);
  out.n = n;
  out.k = k;
  out.row_block_stride = kernels::packed_row_block_bytes(out.format, k);
  out.storage =
      Buffer(checked_mul(static_cast<uint64_t>(out.num_row_blocks()), out.row_block_stride));
  return out;
}

void pack_row_blocks(Format source, const uint8_t* src, size_t src_row_bytes,
                     std::span<const int64_t> row_map, PackedMatrix& out, int64_t block_begin,
                     int64_t block_end, const ScaleGrid* scales) {
  require<InvalidArgument>(packed_format_of(source) == out.format, "the matrix was not made for ",
                           format_info(source).name, " rows");
  require<InvalidArgument>(
      0 <= block_begin && block_begin <= block_end && block_end <= out.num_row_blocks(),
      "row blocks ", block_begin, " to ", block_end, " of ", out.num_row_blocks());
  require<InvalidArgument>(row_map.empty() || row_map.size() == static_cast<size_t>(out.n),
                           "a row map of ", row_map.size(), " rows for a matrix of ", out.n);
  const auto least = static_cast<size_t>(row_bytes(source, out.k));
  require<InvalidArgument>(src_row_bytes >= least, "source rows of ", src_row_bytes,
                           " bytes, expected ", least);
  std::vector<uint8_t>
      zeros;  // stands in for the rows from n up; zero bytes mean scale 0 in every format
  for (int64_t block = block_begin; block < block_end; ++block) {
    Rows rows;
    std::array<int64_t, kRows> source_rows;
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = block * kRows + r;
      const uint8_t*& at = rows[static_cast<size_t>(r)];
      if (row < out.n) {
        const int64_t from = row_map.empty() ? row : row_map[static_cast<size_t>(row)];
        at = src + static_cast<size_t>(from) * src_row_bytes;
        source_rows[static_cast<size_t>(r)] = from;
      } else {
        source_rows[static_cast<size_t>(r)] = -1;
        if (zeros.empty()) zeros.resize(least);
        at = zeros.data();
      }
    }
    if (source == Format::kF8_E4M3) {
      pack_f8(rows, source_rows, scales, out.k, out.row_block(block));
    } else {
      pack_block(source, rows, out.k, out.row_block(block));
    }
  }
}

}  // namespace sagellm::quant
