// Any bytes are either refused with an error of ours or give tensors that can be read.
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/checkpoint/safetensors.h"
#include "sagellm/quant/codec.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sagellm;
  try {
    const checkpoint::SafetensorsFile file(std::span<const uint8_t>(data, size),
                                           "fuzz.safetensors");
    for (const auto& [name, info] : file.tensors()) {
      if (!info.unreadable.empty()) continue;
      const int64_t n = static_cast<int64_t>(info.nbytes) / format_info(info.format).block_bytes;
      std::vector<float> values(static_cast<size_t>(n));
      quant::dequantize_row(info.format, info.data, values.data(), n);
    }
  } catch (const Error&) {
  }
  return 0;
}
