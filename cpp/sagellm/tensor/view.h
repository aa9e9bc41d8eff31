// Non-owning views of tensors: what an operation reads and writes.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "sagellm/base/error.h"
#include "sagellm/tensor/device.h"

namespace sagellm {

/// Element types of activations and index arrays. (Formats of stored weights: base/dtype.h.)
enum class ElementType : uint8_t { kF32, kF16, kBF16, kI32 };

/// "float32", "float16", "bfloat16", "int32".
constexpr const char* element_type_name(ElementType type) {
  constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "int32"};
  return kNames[static_cast<int>(type)];
}

inline constexpr int kMaxRank = 4;

/// Up to four axes over memory that somebody else owns; `Void` is void or const void.
template <typename Void>
struct BasicTensorView {
  Void* data = nullptr;
  ElementType type = ElementType::kF32;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};
  std::array<int64_t, kMaxRank> strides{};  // in elements
  Device device;

  /// The first element, as T.
  template <typename T>
  auto* as() const {
    return static_cast<std::conditional_t<std::is_const_v<Void>, const T, T>*>(data);
  }

  int64_t num_elements() const {
    int64_t count = 1;
    for (int i = 0; i < rank; ++i) count *= shape[static_cast<size_t>(i)];
    return count;
  }

  operator BasicTensorView<const void>() const requires(!std::is_const_v<Void>) {
    return {data, type, rank, shape, strides, device};
  }
};

using TensorView = BasicTensorView<void>;
using ConstTensorView = BasicTensorView<const void>;

/// A dense view of float or int32_t memory; throws InvalidArgument for more than four axes.
template <typename T>
auto dense_view(T* data, std::initializer_list<int64_t> shape, Device device = {}) {
  using Element = std::remove_const_t<T>;
  static_assert(std::is_same_v<Element, float> || std::is_same_v<Element, int32_t>);
  require<InvalidArgument>(shape.size() <= kMaxRank, "a tensor of ", shape.size(),
                           " axes; at most ", kMaxRank, " are supported");
  BasicTensorView<std::conditional_t<std::is_const_v<T>, const void, void>> view;
  view.data = data;
  view.type = std::is_same_v<Element, float> ? ElementType::kF32 : ElementType::kI32;
  view.rank = static_cast<int>(shape.size());
  view.device = device;
  size_t axis = 0;
  for (const int64_t extent : shape) view.shape[axis++] = extent;
  for (int64_t stride = 1; axis-- > 0; stride *= view.shape[axis]) view.strides[axis] = stride;
  return view;
}

}  // namespace sagellm
