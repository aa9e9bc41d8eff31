// A libcublasLt on the CPU for tests of its caller: the functions that sagellm calls, with the
// meaning that cuBLAS documents (column-major, strides in elements), checking what they are given.
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kSuccess = 0, kInvalidValue = 7, kNotSupported = 15;

struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t stride;
};
struct Descriptor {
  int32_t transpose_a = 0, transpose_b = 0;
  uint32_t epilogue = 1;
  int32_t bias_type = -1;
  const void* bias = nullptr;
  int32_t scale_mode_a = 0, scale_mode_b = 0;
  const float* scales_a = nullptr;
  const float* scales_b = nullptr;
};
struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};

size_t alive = 0;

constexpr int kE4M3 = 28, kOuterVector = 3;

float load(const void* memory, int type, uint64_t index) {
  if (type == 0) return static_cast<const float*>(memory)[index];
  if (type == kE4M3) {
    const int code = static_cast<const uint8_t*>(memory)[index];
    const int exponent = code >> 3 & 15, fraction = code & 7;
    const float magnitude = exponent == 0
                                ? std::ldexp(static_cast<float>(fraction), -9)
                                : std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
    return code < 128 ? magnitude : -magnitude;
  }
  const uint16_t bits = static_cast<const uint16_t*>(memory)[index];
  return type == 2 ? static_cast<float>(std::bit_cast<_Float16>(bits))
                   : std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

void store(void* memory, int type, uint64_t index, float value) {
  if (type == 0) {
    static_cast<float*>(memory)[index] = value;
  } else {
    const auto bits = std::bit_cast<uint32_t>(value);
    static_cast<uint16_t*>(memory)[index] =
        type == 2 ? std::bit_cast<uint16_t>(static_cast<_Float16>(value))
                  : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

/// Marks a plan as made for these extents, so that a plan used for others is noticed.
uint64_t mark(const Layout& a, const Layout& b, const Layout& d) {
  return a.rows * 1000003 + a.columns * 10007 + b.columns * 101 + d.rows;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT size_t cublasLtGetVersion() { return 130000; }
EXPORT const char* cublasLtGetStatusString(int status) {
  return status == kInvalidValue ? "invalid value" : "not supported";
}
EXPORT int cublasLtCreate(void** handle) {
  *handle = new int(1);
  return kSuccess;
}
EXPORT int cublasLtDestroy(void* handle) {
  delete static_cast<int*>(handle);
  return kSuccess;
}
/// For tests: descriptors, layouts and preferences not destroyed.
EXPORT size_t fake_cublas_lt_alive() { return alive; }

EXPORT int cublasLtMatmulDescCreate(void** descriptor, int compute_type, int scale_type) {
  if (compute_type != 68 || scale_type != 0) return kNotSupported;
  *descriptor = new Descriptor;
  ++alive;
  return kSuccess;
}
EXPORT int cublasLtMatmulDescDestroy(void* descriptor) {
  delete static_cast<Descriptor*>(descriptor);
  --alive;
  return kSuccess;
}
EXPORT int cublasLtMatmulDescSetAttribute(void* descriptor, int attribute, const void* value,
                                          size_t bytes) {
  auto* to = static_cast<Descriptor*>(descriptor);
  const auto set = [&](auto& field) {
    if (bytes != sizeof field) return kInvalidValue;
    std::memcpy(&field, value, bytes);
    return kSuccess;
  };
  switch (attribute) {
    case 3:
      return set(to->transpose_a);
    case 4:
      return set(to->transpose_b);
    case 7:
      return set(to->epilogue);
    case 8:
      return set(to->bias);
    case 17:
      return set(to->scales_a);
    case 18:
      return set(to->scales_b);
    case 26:
      return set(to->bias_type);
    case 31:
      return set(to->scale_mode_a);
    case 32:
      return set(to->scale_mode_b);
    default:
      return kInvalidValue;
  }
}
EXPORT int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns,
                                      int64_t stride) {
  if (stride < static_cast<int64_t>(rows)) return kInvalidValue;
  *layout = new Layout{type, rows, columns, stride};
  ++alive;
  return kSuccess;
}
EXPORT int cublasLtMatrixLayoutDestroy(void* layout) {
  delete static_cast<Layout*>(layout);
  --alive;
  return kSuccess;
}
EXPORT int cublasLtMatmulPreferenceCreate(void** preference) {
  *preference = new size_t(0);
  ++alive;
  return kSuccess;
}
EXPORT int cublasLtMatmulPreferenceDestroy(void* preference) {
  delete static_cast<size_t*>(preference);
  --alive;
  return kSuccess;
}
EXPORT int cublasLtMatmulPreferenceSetAttribute(void*, int attribute, const void*, size_t bytes) {
  return attribute == 1 && bytes == 8 ? kSuccess : kInvalidValue;
}
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void* descriptor, void* a, void* b, void*, void* d,
                                          void*, int requested, Heuristic* results, int* returned) {
  if (requested < 1) return kInvalidValue;
  const auto& matrix = *static_cast<Layout*>(a);
  if (matrix.type == kE4M3) {
    const auto& how = *static_cast<Descriptor*>(descriptor);
    if (how.transpose_a != 1 || how.scale_mode_a != kOuterVector ||
        how.scale_mode_b != kOuterVector || matrix.rows % 16 != 0 || matrix.columns % 16 != 0) {
      return kNotSupported;
    }
  }
  results[0] = {};
  results[0].algorithm.data[0] =
      mark(*static_cast<Layout*>(a), *static_cast<Layout*>(b), *static_cast<Layout*>(d));
  *returned = 1;
  return kSuccess;
}
EXPORT int cublasLtMatmul(void*, void* descriptor, const void* alpha, const void* a,
                          const Layout* a_layout, const void* b, const Layout* b_layout,
                          const void* beta, const void* c, const Layout* c_layout, void* d,
                          const Layout* d_layout, const Algorithm* algorithm, void* workspace,
                          size_t workspace_bytes, void*) {
  const auto& how = *static_cast<Descriptor*>(descriptor);
  const bool transposed = how.transpose_a == 1;
  const uint64_t m = transposed ? a_layout->columns : a_layout->rows;
  const uint64_t k = transposed ? a_layout->rows : a_layout->columns;
  if (how.transpose_b != 0 || b_layout->rows != k || d_layout->rows != m ||
      d_layout->columns != b_layout->columns || c != d || c_layout != d_layout ||
      a_layout->type != b_layout->type || workspace == nullptr || workspace_bytes == 0 ||
      *static_cast<const float*>(alpha) != 1.0f || *static_cast<const float*>(beta) != 0.0f ||
      algorithm->data[0] != mark(*a_layout, *b_layout, *d_layout)) {
    return kInvalidValue;
  }
  const bool biased = how.epilogue == 4;
  if (biased && (how.bias == nullptr || how.bias_type != a_layout->type)) return kInvalidValue;
  const bool fp8 = a_layout->type == kE4M3;
  if (fp8 && (how.scales_a == nullptr || how.scales_b == nullptr)) return kInvalidValue;
  for (uint64_t column = 0; column < d_layout->columns; ++column) {
    for (uint64_t row = 0; row < m; ++row) {
      double sum = biased ? load(how.bias, how.bias_type, row) : 0.0;
      for (uint64_t i = 0; i < k; ++i) {
        const auto a_stride = static_cast<uint64_t>(a_layout->stride);
        const uint64_t at = transposed ? row * a_stride + i : i * a_stride + row;
        sum += static_cast<double>(load(a, a_layout->type, at)) *
               load(b, b_layout->type, column * static_cast<uint64_t>(b_layout->stride) + i);
      }
      if (fp8) sum *= static_cast<double>(how.scales_a[row]) * how.scales_b[column];
      store(d, d_layout->type, column * static_cast<uint64_t>(d_layout->stride) + row,
            static_cast<float>(sum));
    }
  }
  return kSuccess;
}
