// cuBLASLt, opened at run time: the module neither links it nor needs its headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "sagellm/cuda/dynamic_library.h"
#include "sagellm/cuda/memory.h"
#include "sagellm/kernels/cuda/fp8.h"
#include "sagellm/kernels/cuda/gemm.h"

namespace sagellm::cuda {

struct CublasLtFunctions;

/// An opened libcublasLt with a handle for the current device.
class CublasLt {
 public:
  /// Tries libcublasLt.so.13 and .12 in every folder, then where the system looks. Throws
  /// DeviceError saying what was tried and how to get the library, or which version was too old.
  explicit CublasLt(const std::vector<std::string>& folders);
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;
  ~CublasLt();

  const CublasLtFunctions& functions() const { return *functions_; }
  void* handle() const { return handle_; }
  /// 10000 * major + 100 * minor + patch: 130000 for 13.0.0.
  size_t version() const { return version_; }
  const std::string& path() const { return library_.path(); }

 private:
  DynamicLibrary library_;
  std::unique_ptr<CublasLtFunctions> functions_;
  void* handle_ = nullptr;
  size_t version_ = 0;
};

/// Products of a linear layer through cuBLASLt. The algorithm of a shape is asked for once and
/// kept, so that equal calls give equal bits; other values of m may add in another order. Not
/// thread-safe: one owner, one stream at a time.
class CublasLtGemm {
 public:
  explicit CublasLtGemm(std::shared_ptr<const CublasLt> library);
  CublasLtGemm(const CublasLtGemm&) = delete;
  CublasLtGemm& operator=(const CublasLtGemm&) = delete;
  ~CublasLtGemm();

  /// What kernels::cuda::gemm computes. Throws DeviceError when the library refuses.
  void operator()(kernels::cuda::FloatType input, kernels::cuda::FloatType output,
                  const kernels::cuda::GemmParams& params, void* stream);
  /// What kernels::cuda::fp8_gemm computes, with one scale per row of weights; false, and nothing
  /// queued, where the weights have groups or the library has no algorithm for it: version 12.9 and
  /// compute capability 9.0 have them, for whole 16s of n and k. Throws DeviceError when it fails.
  bool fp8(kernels::cuda::FloatType output, const kernels::cuda::Fp8GemmParams& params,
           void* stream);
  /// Shapes whose algorithm is known, or known not to be.
  size_t plans() const { return plans_.size(); }

 private:
  struct Key {
    int32_t m, n, k;
    int64_t x_stride, weights_stride, out_stride;
    kernels::cuda::FloatType input, output;
    bool bias;
    bool fp8 = false;
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    size_t operator()(const Key& key) const;
  };
  struct Plan;

  Plan* plan_for(const Key& key);
  std::unique_ptr<Plan> make_plan(const Key& key) const;  // null: no algorithm for FP8

  std::shared_ptr<const CublasLt> library_;
  DeviceBuffer workspace_;
  std::unordered_map<Key, std::unique_ptr<Plan>, KeyHash> plans_;
};

}  // namespace sagellm::cuda
