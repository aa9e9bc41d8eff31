// Rearranges stored weight rows into the R16 layout of `kernels/params.h`, without changing a
// value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "sagellm/base/dtype.h"
#include "sagellm/kernels/params.h"
#include "sagellm/quant/scale_grid.h"
#include "sagellm/tensor/buffer.h"

namespace sagellm::quant {

/// A weight matrix [n, k] in blocks of 16 rows.
struct PackedMatrix {
  kernels::PackedFormat format = kernels::PackedFormat::kF32;
  int64_t n = 0;
  int64_t k = 0;
  size_t row_block_stride = 0;  // = packed_row_block_bytes(format, k)
  Buffer storage;

  int64_t num_row_blocks() const { return (n + kernels::kRowBlock - 1) / kernels::kRowBlock; }
  const uint8_t* row_block(int64_t i) const {
    return storage.data() + static_cast<size_t>(i) * row_block_stride;
  }
  uint8_t* row_block(int64_t i) {
    return storage.data() + static_cast<size_t>(i) * row_block_stride;
  }
  size_t bytes() const { return storage.size(); }
};

/// Name of a packed format: "Q4_K".
std::string_view packed_format_name(kernels::PackedFormat format);

/// The packed format that holds every value of `source` exactly: itself, but IQ4_NL goes to Q8_0
/// and Q3_K to Q6_K. Throws Unsupported for Q2_K, whose minima per 16 elements fit none.
kernels::PackedFormat packed_format_of(Format source);

/// Allocates a zero matrix for rows of `source`. Throws InvalidArgument on sizes that are not
/// positive or rows that are not whole blocks, Unsupported as `packed_format_of`, DeviceError when
/// memory is refused.
PackedMatrix make_packed(Format source, int64_t n, int64_t k);

/// Fills the row blocks [block_begin, block_end) of `out`, made for `source`. Packed row i is
/// source row row_map[i] (i when `row_map` is empty) at src + row * src_row_bytes, any alignment;
/// rows from n up become zeros. Calls on disjoint ranges may run at the same time. The rows must
/// exist: they are not checked here. `scales` are those of an F8_E4M3 source, of the same extents;
/// null: all are 1. Throws InvalidArgument when range, map or row size do not fit `out`.
void pack_row_blocks(Format source, const uint8_t* src, size_t src_row_bytes,
                     std::span<const int64_t> row_map, PackedMatrix& out, int64_t block_begin,
                     int64_t block_end, const ScaleGrid* scales = nullptr);

}  // namespace sagellm::quant
