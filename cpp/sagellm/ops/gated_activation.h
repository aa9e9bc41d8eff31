// The gate of a gated feed-forward network.
#pragma once

#include "sagellm/kernels/op_params.h"
#include "sagellm/tensor/view.h"

namespace sagellm::ops {

/// out = activation(gate) * up; all [rows, n], float32; `out` may be `gate` or `up`. Throws
/// InvalidArgument naming the tensor and axis that do not fit.
void gated_activation(kernels::GateActivation activation, const ConstTensorView& gate,
                      const ConstTensorView& up, const TensorView& out);

}  // namespace sagellm::ops
