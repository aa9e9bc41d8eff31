// Declarative shape checks for the tensors of one call.
#pragma once

#include <concepts>
#include <string>
#include <string_view>
#include <vector>

#include "sagellm/tensor/view.h"

namespace sagellm {

/// Expected length of an axis: a number, or a name that the first tensor using it binds.
struct Extent {
  // NOLINTNEXTLINE(google-explicit-constructor): written in shape lists
  constexpr Extent(const char* extent_name) : name(extent_name) {}
  // NOLINTNEXTLINE(google-explicit-constructor): written in shape lists
  constexpr Extent(std::integral auto extent_value) : value(extent_value) {}

  const char* name = nullptr;
  int64_t value = 0;
};

/// Checks tensors one by one and remembers named extents:
///
///     Matcher match("rms_norm", x.device);
///     match.tensor("x", x, ElementType::kF32, {"rows", "n"});
///     match.tensor("weight", weight, ElementType::kF32, {"n"});
///
/// Every mismatch throws InvalidArgument naming operation, tensor, axis, expected and found. Axis 0
/// may be empty and may be strided; the other axes are dense and not empty.
class Matcher {
 public:
  /// `operation` starts every message; all tensors must live on `device`.
  Matcher(std::string_view operation, Device device) : operation_(operation), device_(device) {}

  void tensor(const char* name, const ConstTensorView& view, ElementType type,
              std::initializer_list<Extent> shape) {
    check(name, view, type, shape, device_);
  }

  /// Like `tensor`, for arrays that stay in host memory whatever the device.
  void host_tensor(const char* name, const ConstTensorView& view, ElementType type,
                   std::initializer_list<Extent> shape) {
    check(name, view, type, shape, Device{});
  }

  /// Binds a name that no tensor brings: a property of packed weights or of KV pages.
  void bind(const char* name, int64_t value, const char* source);

  const std::string& operation() const { return operation_; }

  /// The value of a bound name; throws InvalidArgument for an unbound one.
  int64_t operator[](std::string_view name) const;

 private:
  struct Binding {
    std::string_view name;
    int64_t value;
    std::string source;
  };

  void check(const char* name, const ConstTensorView& view, ElementType type,
             std::initializer_list<Extent> shape, Device device);
  void check_axis(const char* name, int axis, int64_t found, const Extent& expected);
  const Binding* find(std::string_view name) const;

  std::string operation_;
  Device device_;
  std::vector<Binding> bindings_;
};

}  // namespace sagellm
