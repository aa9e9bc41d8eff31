// The host's side of kernels/cuda/quantized.h: it knows the blocks of files, which kernels do not.
#include <algorithm>
#include <cstring>

#include "sagellm/base/error.h"
#include "sagellm/kernels/cuda/quantized.h"
#include "sagellm/quant/formats.h"

namespace sagellm::kernels::cuda {

namespace {

/// 32 columns of a row: codes without their sign or offset, and what the scale section holds.
struct Unit {
  uint8_t codes[kUnitColumns];
  uint16_t scale = 0;
  uint16_t minimum = 0;
};

uint16_t byte_pair(uint8_t low, uint8_t high) { return static_cast<uint16_t>(low | high << 8); }

template <typename Block>
Block load_block(const uint8_t* row, int64_t index) {
  Block block;
  std::memcpy(&block, row + index * static_cast<int64_t>(sizeof(Block)), sizeof(Block));
  return block;
}

void split_nibbles(const uint8_t* qs, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = qs[i] & 15;
    codes[16 + i] = qs[i] >> 4;
  }
}

void add_fifth_bits(uint32_t qh, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] |= static_cast<uint8_t>((qh >> i & 1u) << 4);
}

template <typename Block>
void read_unit_k4(const Block& block, int unit, Unit& out) {
  uint8_t scales[8], minima[8];
  quant::unpack_scales_k4(block.scales, scales, minima);
  out.scale = byte_pair(scales[unit], minima[unit]);
  for (int l = 0; l < 32; ++l) {
    out.codes[l] = (block.qs[unit / 2 * 32 + l] >> (4 * (unit & 1))) & 15;
  }
}

Unit read_unit(Format format, const uint8_t* row, int64_t unit) {
  Unit out;
  const auto of_super = static_cast<int>(unit % 8);
  switch (format) {
    case Format::kQ4_0: {
      const auto block = load_block<quant::BlockQ4_0>(row, unit);
      out.scale = block.d;
      split_nibbles(block.qs, out.codes);
      return out;
    }
    case Format::kQ4_1: {
      const auto block = load_block<quant::BlockQ4_1>(row, unit);
      out.scale = block.d;
      out.minimum = block.m;
      split_nibbles(block.qs, out.codes);
      return out;
    }
    case Format::kQ5_0: {
      const auto block = load_block<quant::BlockQ5_0>(row, unit);
      out.scale = block.d;
      split_nibbles(block.qs, out.codes);
      add_fifth_bits(block.qh, out.codes);
      return out;
    }
    case Format::kQ5_1: {
      const auto block = load_block<quant::BlockQ5_1>(row, unit);
      out.scale = block.d;
      out.minimum = block.m;
      split_nibbles(block.qs, out.codes);
      add_fifth_bits(block.qh, out.codes);
      return out;
    }
    case Format::kQ8_0: {
      const auto block = load_block<quant::BlockQ8_0>(row, unit);
      out.scale = block.d;
      std::memcpy(out.codes, block.qs, sizeof(out.codes));
      return out;
    }
    case Format::kQ4_K:
      read_unit_k4(load_block<quant::BlockQ4_K>(row, unit / 8), of_super, out);
      return out;
    case Format::kQ5_K: {
      const auto block = load_block<quant::BlockQ5_K>(row, unit / 8);
      read_unit_k4(block, of_super, out);
      for (int l = 0; l < 32; ++l) {
        out.codes[l] |= static_cast<uint8_t>((block.qh[l] >> of_super & 1) << 4);
      }
      return out;
    }
    default: {  // Q6_K
      const auto block = load_block<quant::BlockQ6_K>(row, unit / 8);
      const int s = of_super % 4;
      const uint8_t* ql = block.ql + of_super / 4 * 64 + (s & 1) * 32;
      const uint8_t* qh = block.qh + of_super / 4 * 32;
      for (int l = 0; l < 32; ++l) {
        const int low = (ql[l] >> (4 * (s >> 1))) & 15;
        out.codes[l] = static_cast<uint8_t>(low | ((qh[l] >> (2 * s) & 3) << 4));
      }
      out.scale = byte_pair(static_cast<uint8_t>(block.scales[2 * of_super]),
                            static_cast<uint8_t>(block.scales[2 * of_super + 1]));
      return out;
    }
  }
}

/// d and dmin of a superblock.
void read_super(Format format, const uint8_t* row, int64_t index, uint16_t (&out)[2]) {
  if (format == Format::kQ6_K) {
    out[0] = load_block<quant::BlockQ6_K>(row, index).d;
  } else if (format == Format::kQ4_K) {
    const auto block = load_block<quant::BlockQ4_K>(row, index);
    out[0] = block.d;
    out[1] = block.dmin;
  } else {
    const auto block = load_block<quant::BlockQ5_K>(row, index);
    out[0] = block.d;
    out[1] = block.dmin;
  }
}

int bits_of(Format format) {
  switch (format) {
    case Format::kQ4_0:
    case Format::kQ4_1:
    case Format::kQ4_K:
      return 4;
    case Format::kQ5_0:
    case Format::kQ5_1:
    case Format::kQ5_K:
      return 5;
    case Format::kQ6_K:
      return 6;
    default:
      return 8;
  }
}
bool has_minima(Format format) { return format == Format::kQ4_1 || format == Format::kQ5_1; }
bool has_supers(Format format) {
  return format == Format::kQ4_K || format == Format::kQ5_K || format == Format::kQ6_K;
}

/// Writes a unit of row `row` (0 .. 15) as unit `u` (0 .. 3) of a zeroed step.
void write_unit(const QuantLayout& layout, int bits, const Unit& unit, int row, int u,
                uint8_t* step) {
  const int r = row % 8, i = row / 8;
  for (int column = 0; column < kUnitColumns; ++column) {
    const int h = column / 16, c = column % 16 / 4, j = column % 4;
    const int lane = 4 * r + c;
    const uint8_t code = unit.codes[column];
    if (bits == 8) {
      step[(2 * i + h) * 512 + lane * 16 + u * 4 + j] = code;
      continue;
    }
    step[i * 512 + lane * 16 + u * 4 + j] |= static_cast<uint8_t>((code & 15) << (4 * h));
    uint8_t* high = step + layout.high_offset;
    if (bits == 5) {
      high[lane * 8 + i * 4 + j] |= static_cast<uint8_t>(code >> 4 << (2 * u + h));
    } else if (bits == 6) {
      high[lane * 16 + (2 * i + u / 2) * 4 + j] |=
          static_cast<uint8_t>(code >> 4 << (4 * (u % 2) + 2 * h));
    }
  }
  uint8_t* scales = step + layout.scale_offset + r * 16 + (4 * i + u) * 2;
  std::memcpy(scales, &unit.scale, 2);
  if (layout.step_bytes - layout.scale_offset > 128) std::memcpy(scales + 128, &unit.minimum, 2);
}

}  // namespace

bool is_device_format(Format format) { return format == Format::kQ8_0 || bits_of(format) != 8; }

QuantLayout quant_layout(Format format, int64_t n, int64_t k) {
  require<Unsupported>(is_device_format(format), "no CUDA kernel reads ", format_info(format).name,
                       "; supported: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K");
  const int block = format_info(format).block_elements;
  require<InvalidArgument>(n > 0 && k > 0 && k % block == 0, "a matrix of ", n, " rows and ", k,
                           " columns; ", format_info(format).name, " needs whole blocks of ", block,
                           " columns");
  const int bits = bits_of(format);
  QuantLayout layout;
  layout.high_offset = bits == 8 ? 2048 : 1024;
  layout.scale_offset = layout.high_offset + (bits == 5 ? 256 : bits == 6 ? 512 : 0);
  layout.step_bytes = layout.scale_offset + 128 + (has_minima(format) ? 128 : 0);
  layout.steps = static_cast<int32_t>((k + kStepColumns - 1) / kStepColumns);
  layout.tile_rows = static_cast<int32_t>((n + kTileRows - 1) / kTileRows);
  layout.tile_row_bytes =
      int64_t{layout.steps} * layout.step_bytes + (has_supers(format) ? k / 256 * 64 : 0);
  return layout;
}

void repack_tile_row(Format format, int64_t k, const uint8_t* rows, int64_t row_bytes,
                     int32_t num_rows, uint8_t* out) {
  const QuantLayout layout = quant_layout(format, kTileRows, k);
  const int bits = bits_of(format);
  std::fill_n(out, layout.tile_row_bytes, uint8_t{0});
  for (int row = 0; row < num_rows; ++row) {
    const uint8_t* from = rows + row * row_bytes;
    for (int64_t unit = 0; unit < k / kUnitColumns; ++unit) {
      write_unit(layout, bits, read_unit(format, from, unit), row, static_cast<int>(unit % 4),
                 out + unit / 4 * layout.step_bytes);
    }
    if (!has_supers(format)) continue;
    for (int64_t index = 0; index < k / 256; ++index) {
      uint16_t pair[2] = {0, 0};
      read_super(format, from, index, pair);
      std::memcpy(out + layout.super_offset() + index * 64 + (row % 8) * 8 + row / 8 * 4, pair, 4);
    }
  }
}

}  // namespace sagellm::kernels::cuda
