// Root-mean-square normalisation.
#pragma once

#include "sagellm/tensor/view.h"

namespace sagellm::ops {

/// out = x / sqrt(mean(x^2) + eps) * weight per row; x and out [rows, n], weight [n], float32;
/// `out` may be `x`. Throws InvalidArgument naming the tensor and axis that do not fit, or a bad
/// eps.
void rms_norm(const ConstTensorView& x, const ConstTensorView& weight, float eps,
              const TensorView& out);

}  // namespace sagellm::ops
