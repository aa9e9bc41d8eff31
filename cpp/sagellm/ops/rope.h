// Rotary position embedding.
#pragma once

#include "sagellm/tensor/view.h"

namespace sagellm::ops {

/// Rotates x [tokens, heads, head_dim] in place, NeoX pairs (i, i + half); cos and sin [tokens,
/// half] belong to the tokens' positions, 2 * half <= head_dim, the rest of a head stays; float32.
/// Throws InvalidArgument naming the tensor and axis that do not fit.
void rope(const TensorView& x, const ConstTensorView& cos, const ConstTensorView& sin);

}  // namespace sagellm::ops
