#include "sagellm/cuda/cublas_lt.h"

#include <array>
#include <string_view>
#include <utility>

#include "sagellm/base/error.h"

namespace sagellm::cuda {

namespace {

using kernels::cuda::FloatType;
using kernels::cuda::GemmParams;

// The numbers of cuBLASLt's enumerations, the same in versions 12 and 13.
enum Status : int { kSuccess = 0, kNotSupported = 15 };
enum DataType : int { kReal32 = 0, kReal16 = 2, kRealB16 = 14, kRealE4M3 = 28 };
enum ComputeType : int { kCompute32 = 68 };
enum DescriptorAttribute : int {
  kTransposeA = 3,
  kTransposeB = 4,
  kEpilogue = 7,
  kBiasPointer = 8,
  kScalePointerA = 17,
  kScalePointerB = 18,
  kBiasType = 26,
  kScaleModeA = 31,
  kScaleModeB = 32
};
enum ScaleMode : int32_t { kOuterVector = 3 };  // one float per row of the result, or column
enum Operation : int32_t { kNone = 0, kTranspose = 1 };
enum Epilogue : uint32_t { kBiasEpilogue = 4 };
enum PreferenceAttribute : int { kMaxWorkspaceBytes = 1 };

struct Algorithm {
  std::array<uint64_t, 8> data;
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  int state;
  float waves;
  std::array<int, 4> reserved;
};

constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what its documentation advises for 9.0
constexpr size_t kOldest = 120000;
constexpr size_t kOldestForFp8 = 120900;  // with vectors of scales
constexpr size_t kMostPlans = 4096;
constexpr std::array<const char*, 2> kNames{"libcublasLt.so.13", "libcublasLt.so.12"};

DataType data_type(FloatType type) {
  switch (type) {
    case FloatType::kBF16:
      return kRealB16;
    case FloatType::kF16:
      return kReal16;
    case FloatType::kF32:
      break;
  }
  return kReal32;
}

}  // namespace

struct CublasLtFunctions {
  size_t (*get_version)();
  const char* (*status_string)(int);
  int (*create)(void** handle);
  int (*destroy)(void* handle);
  int (*descriptor_create)(void** descriptor, int compute_type, int scale_type);
  int (*descriptor_destroy)(void* descriptor);
  int (*descriptor_set)(void* descriptor, int attribute, const void* value, size_t bytes);
  int (*layout_create)(void** layout, int type, uint64_t rows, uint64_t columns, int64_t stride);
  int (*layout_destroy)(void* layout);
  int (*preference_create)(void** preference);
  int (*preference_destroy)(void* preference);
  int (*preference_set)(void* preference, int attribute, const void* value, size_t bytes);
  int (*heuristic)(void* handle, void* descriptor, void* a, void* b, void* c, void* d,
                   void* preference, int requested, Heuristic* results, int* returned);
  int (*matmul)(void* handle, void* descriptor, const void* alpha, const void* a, void* a_layout,
                const void* b, void* b_layout, const void* beta, const void* c, void* c_layout,
                void* d, void* d_layout, const Algorithm* algorithm, void* workspace,
                size_t workspace_bytes, void* stream);

  void check(int status, std::string_view call) const {
    if (status == kSuccess) [[likely]] {
      return;
    }
    fail<DeviceError>(call, ": ", status_string(status), " (cuBLAS status ", status, ")");
  }
};

CublasLt::CublasLt(const std::vector<std::string>& folders)
    : library_(folders, kNames, "cuBLASLt",
               "pip install nvidia-cublas, or install the CUDA toolkit's libcublas 12 or 13"),
      functions_(std::make_unique<CublasLtFunctions>()) {
  CublasLtFunctions& f = *functions_;
  library_.find("cublasLtGetVersion", f.get_version);
  library_.find("cublasLtGetStatusString", f.status_string);
  library_.find("cublasLtCreate", f.create);
  library_.find("cublasLtDestroy", f.destroy);
  library_.find("cublasLtMatmulDescCreate", f.descriptor_create);
  library_.find("cublasLtMatmulDescDestroy", f.descriptor_destroy);
  library_.find("cublasLtMatmulDescSetAttribute", f.descriptor_set);
  library_.find("cublasLtMatrixLayoutCreate", f.layout_create);
  library_.find("cublasLtMatrixLayoutDestroy", f.layout_destroy);
  library_.find("cublasLtMatmulPreferenceCreate", f.preference_create);
  library_.find("cublasLtMatmulPreferenceDestroy", f.preference_destroy);
  library_.find("cublasLtMatmulPreferenceSetAttribute", f.preference_set);
  library_.find("cublasLtMatmulAlgoGetHeuristic", f.heuristic);
  library_.find("cublasLtMatmul", f.matmul);
  version_ = f.get_version();
  const int status = version_ >= kOldest ? f.create(&handle_) : kSuccess;
  require<DeviceError>(version_ >= kOldest && status == kSuccess, path(), ", version ", version_,
                       ": ", status != kSuccess ? f.status_string(status) : "too old",
                       "; nvidia-cublas 12 or 13 and a driver that serves it are needed");
}

CublasLt::~CublasLt() { (void)functions_->destroy(handle_); }

/// What the library needs to know of one shape.
struct CublasLtGemm::Plan {
  explicit Plan(const CublasLtFunctions& library) : functions(library) {}
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    for (void* layout : {weights, x, out}) {
      if (layout != nullptr) (void)functions.layout_destroy(layout);
    }
    if (descriptor != nullptr) (void)functions.descriptor_destroy(descriptor);
  }

  const CublasLtFunctions& functions;
  void* descriptor = nullptr;
  void* weights = nullptr;
  void* x = nullptr;
  void* out = nullptr;
  Algorithm algorithm{};
};

CublasLtGemm::CublasLtGemm(std::shared_ptr<const CublasLt> library)
    : library_(std::move(library)), workspace_(kWorkspaceBytes) {}

CublasLtGemm::~CublasLtGemm() = default;

size_t CublasLtGemm::KeyHash::operator()(const Key& key) const {
  size_t hash = 0;
  for (const int64_t part :
       {int64_t{key.m}, int64_t{key.n}, int64_t{key.k}, key.x_stride, key.weights_stride,
        key.out_stride,
        static_cast<int64_t>(key.input) * 8 + static_cast<int64_t>(key.output) * 2 +
            static_cast<int64_t>(key.bias) + static_cast<int64_t>(key.fp8) * 32}) {
    hash = (hash ^ static_cast<size_t>(part)) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  }
  return hash;
}

/// The library counts in columns: out^T [n, m] = (weights^T)^T [n, k] * x^T [k, m], each of them
/// the row-major matrix read as its column-major transpose.
std::unique_ptr<CublasLtGemm::Plan> CublasLtGemm::make_plan(const Key& key) const {
  const CublasLtFunctions& f = library_->functions();
  auto plan = std::make_unique<Plan>(f);
  const auto n = static_cast<uint64_t>(key.n), k = static_cast<uint64_t>(key.k),
             m = static_cast<uint64_t>(key.m);
  f.check(f.descriptor_create(&plan->descriptor, kCompute32, kReal32), "cublasLtMatmulDescCreate");
  const auto set = [&](DescriptorAttribute attribute, auto value) {
    f.check(f.descriptor_set(plan->descriptor, attribute, &value, sizeof value),
            "cublasLtMatmulDescSetAttribute");
  };
  set(kTransposeA, int32_t{kTranspose});
  set(kTransposeB, int32_t{kNone});
  if (key.bias) {
    set(kEpilogue, uint32_t{kBiasEpilogue});
    set(kBiasType, int32_t{data_type(key.input)});
  }
  if (key.fp8) {
    set(kScaleModeA, int32_t{kOuterVector});
    set(kScaleModeB, int32_t{kOuterVector});
    const void* present = workspace_.data();  // what is there decides; calls set the scales
    set(kScalePointerA, present);
    set(kScalePointerB, present);
  }
  const DataType input = key.fp8 ? kRealE4M3 : data_type(key.input);
  f.check(f.layout_create(&plan->weights, input, k, n, key.weights_stride), "cublasLtMatrixLayout");
  f.check(f.layout_create(&plan->x, input, k, m, key.x_stride), "cublasLtMatrixLayout");
  f.check(f.layout_create(&plan->out, data_type(key.output), n, m, key.out_stride),
          "cublasLtMatrixLayout");

  void* preference = nullptr;
  f.check(f.preference_create(&preference), "cublasLtMatmulPreferenceCreate");
  const std::unique_ptr<void, int (*)(void*)> owner(preference, f.preference_destroy);
  const uint64_t workspace_bytes = kWorkspaceBytes;
  f.check(
      f.preference_set(preference, kMaxWorkspaceBytes, &workspace_bytes, sizeof workspace_bytes),
      "cublasLtMatmulPreferenceSetAttribute");
  Heuristic best{};
  int found = 0;
  const int status = f.heuristic(library_->handle(), plan->descriptor, plan->weights, plan->x,
                                 plan->out, plan->out, preference, 1, &best, &found);
  const bool none = status == kNotSupported || (status == kSuccess && found == 0);
  if (key.fp8 && none) return nullptr;
  f.check(status, "cublasLtMatmulAlgoGetHeuristic");
  require<DeviceError>(found > 0 && best.state == kSuccess,
                       "cuBLASLt has no algorithm for m=", key.m, " n=", key.n, " k=", key.k);
  plan->algorithm = best.algorithm;
  return plan;
}

CublasLtGemm::Plan* CublasLtGemm::plan_for(const Key& key) {
  const auto known = plans_.find(key);
  if (known != plans_.end()) return known->second.get();
  if (plans_.size() >= kMostPlans) plans_.clear();
  return plans_.emplace(key, make_plan(key)).first->second.get();
}

void CublasLtGemm::operator()(FloatType input, FloatType output, const GemmParams& p,
                              void* stream) {
  if (p.m == 0 || p.n == 0) return;
  const CublasLtFunctions& f = library_->functions();
  Plan& plan = *plan_for({p.m, p.n, p.k, p.x_stride, p.weights_stride, p.out_stride, input, output,
                          p.bias != nullptr});
  if (p.bias != nullptr) {
    f.check(f.descriptor_set(plan.descriptor, kBiasPointer, &p.bias, sizeof p.bias),
            "cublasLtMatmulDescSetAttribute");
  }
  const float one = 1.0f;
  const float zero = 0.0f;
  f.check(f.matmul(library_->handle(), plan.descriptor, &one, p.weights, plan.weights, p.x, plan.x,
                   &zero, p.out, plan.out, p.out, plan.out, &plan.algorithm, workspace_.data(),
                   workspace_.size(), stream),
          "cublasLtMatmul");
}

bool CublasLtGemm::fp8(FloatType output, const kernels::cuda::Fp8GemmParams& p, void* stream) {
  const kernels::cuda::Fp8Matrix& w = p.weights;
  if (w.groups > 1 || library_->version() < kOldestForFp8) return false;
  if (p.m == 0 || w.n == 0) return true;
  const CublasLtFunctions& f = library_->functions();
  Plan* plan = plan_for({p.m, w.n, w.k, w.k, w.k, p.out_stride, output, output, false, true});
  if (plan == nullptr) return false;
  const auto set = [&](DescriptorAttribute attribute, const float* scales) {
    f.check(f.descriptor_set(plan->descriptor, attribute, &scales, sizeof scales),
            "cublasLtMatmulDescSetAttribute");
  };
  set(kScalePointerA, w.scales);
  set(kScalePointerB, p.x_scales);
  const float one = 1.0f;
  const float zero = 0.0f;
  f.check(f.matmul(library_->handle(), plan->descriptor, &one, w.codes, plan->weights, p.x, plan->x,
                   &zero, p.out, plan->out, p.out, plan->out, &plan->algorithm, workspace_.data(),
                   workspace_.size(), stream),
          "cublasLtMatmul");
  return true;
}

}  // namespace sagellm::cuda
