#include "sagellm/cuda/linear.h"

#include <utility>

#include "sagellm/kernels/cuda/gemm.h"

namespace sagellm::cuda {

Linear::Linear(kernels::cuda::FloatType type, std::shared_ptr<const CublasLt> library)
    : type_(type) {
  if (library != nullptr) library_.emplace(std::move(library));
}

void Linear::operator()(const LinearWeights& weights, const Call& call, void* stream) {
  for (const WeightPart& part : weights.parts) {
    kernels::cuda::GemmParams p;
    p.x = call.x;
    p.x_stride = call.x_stride;
    p.weights = part.data;
    p.weights_stride = weights.k;
    p.out = static_cast<std::byte*>(call.out) + part.first * float_type_bytes(call.out_type);
    p.out_stride = call.out_stride;
    p.m = call.rows;
    p.n = static_cast<int32_t>(part.n);
    p.k = static_cast<int32_t>(weights.k);
    if (library_) {
      (*library_)(type_, call.out_type, p, stream);
    } else {
      kernels::cuda::gemm(type_, call.out_type, p, stream);
    }
  }
}

}  // namespace sagellm::cuda
