// Element types of activations and dense weights on a CUDA device.
#pragma once

#include <cstdint>

namespace sagellm::kernels::cuda {

enum class FloatType : int32_t { kBF16, kF16, kF32 };

constexpr int64_t float_type_bytes(FloatType type) { return type == FloatType::kF32 ? 4 : 2; }

}  // namespace sagellm::kernels::cuda
