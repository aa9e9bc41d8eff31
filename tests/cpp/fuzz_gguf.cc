// Any bytes are either refused with an error of ours or give tensors that can be read and packed.
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/checkpoint/gguf.h"
#include "sagellm/quant/codec.h"
#include "sagellm/quant/pack.h"
#include "sagellm/quant/unpack.h"

namespace {

using namespace sagellm;

/// Reads every byte of a tensor through the code that loads models.
void read(const checkpoint::TensorInfo& info) {
  const int64_t k = info.shape.back();
  const int64_t row = row_bytes(info.format, k);
  const int64_t n = static_cast<int64_t>(info.nbytes) / row;
  std::vector<float> values(static_cast<size_t>(n * k));
  quant::dequantize_row(info.format, info.data, values.data(), n * k);
  if (info.format == Format::kQ2_K) return;
  quant::PackedMatrix packed = quant::make_packed(info.format, n, k);
  quant::pack_row_blocks(info.format, info.data, static_cast<size_t>(row), {}, packed, 0,
                         packed.num_row_blocks());
  quant::unpack_row(packed, n - 1, values.data());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const checkpoint::GgufFile file(std::span<const uint8_t>(data, size), "fuzz.gguf");
    for (const auto& [name, info] : file.tensors()) read(info);
  } catch (const Error&) {
  }
  return 0;
}
