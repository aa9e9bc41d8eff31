#include "sagellm/tensor/matcher.h"

#include <sstream>

namespace sagellm {

namespace {

std::string listed(std::initializer_list<Extent> shape) {
  std::ostringstream out;
  const char* separator = "[";
  for (const Extent& extent : shape) {
    out << separator;
    separator = ", ";
    if (extent.name != nullptr) {
      out << extent.name;
    } else {
      out << extent.value;
    }
  }
  out << "]";
  return out.str();
}

}  // namespace

void Matcher::bind(const char* name, int64_t value, const char* source) {
  require<InvalidArgument>(find(name) == nullptr, operation_, ": ", name, " is bound twice");
  bindings_.push_back({name, value, source});
}

int64_t Matcher::operator[](std::string_view name) const {
  const Binding* binding = find(name);
  require<InvalidArgument>(binding != nullptr, operation_, ": ", name, " is not bound");
  return binding->value;
}

const Matcher::Binding* Matcher::find(std::string_view name) const {
  for (const Binding& binding : bindings_) {
    if (binding.name == name) return &binding;
  }
  return nullptr;
}

void Matcher::check(const char* name, const ConstTensorView& view, ElementType type,
                    std::initializer_list<Extent> shape, Device device) {
  require<InvalidArgument>(view.type == type, operation_, ": ", name, " is ",
                           element_type_name(view.type), ", must be ", element_type_name(type));
  require<InvalidArgument>(view.device == device, operation_, ": ", name, " is on ",
                           to_string(view.device), ", must be on ", to_string(device));
  require<InvalidArgument>(view.rank == static_cast<int>(shape.size()), operation_, ": ", name,
                           " has ", view.rank, " axes, must have shape ", listed(shape));
  int axis = 0;
  for (const Extent& expected : shape) {
    check_axis(name, axis, view.shape[static_cast<size_t>(axis)], expected);
    ++axis;
  }
  if (view.num_elements() == 0) return;
  require<InvalidArgument>(view.data != nullptr, operation_, ": ", name, " has no memory");
  int64_t dense = 1;
  for (axis = view.rank - 1; axis >= 0; --axis) {
    const int64_t extent = view.shape[static_cast<size_t>(axis)];
    const int64_t stride = view.strides[static_cast<size_t>(axis)];
    if (extent == 1) continue;  // its stride is never followed
    const bool strided_rows = axis == 0 && view.rank > 1 && stride > dense;
    require<InvalidArgument>(stride == dense || strided_rows, operation_, ": axis ", axis, " of ",
                             name, " has stride ", stride, ", must be ", dense,
                             axis == 0 && view.rank > 1 ? " or more" : "");
    dense *= extent;
  }
}

void Matcher::check_axis(const char* name, int axis, int64_t found, const Extent& expected) {
  require<InvalidArgument>(found > 0 || (axis == 0 && found == 0), operation_, ": axis ", axis,
                           " of ", name, " is ", found, ", must be positive");
  if (expected.name == nullptr) {
    require<InvalidArgument>(found == expected.value, operation_, ": axis ", axis, " of ", name,
                             " is ", found, ", must be ", expected.value);
    return;
  }
  if (const Binding* binding = find(expected.name)) {
    require<InvalidArgument>(found == binding->value, operation_, ": axis ", axis, " of ", name,
                             " is ", found, ", must be ", binding->value, " (", expected.name,
                             " of ", binding->source, ")");
    return;
  }
  bind(expected.name, found, name);
}

}  // namespace sagellm
