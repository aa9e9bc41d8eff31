#include "sagellm/tensor/device.h"

#include <charconv>

#include "sagellm/base/error.h"

namespace sagellm {

namespace {

constexpr std::string_view kKindNames[kNumDeviceKinds] = {"cpu", "cuda"};

}  // namespace

std::string_view device_kind_name(Device::Kind kind) {
  return kKindNames[static_cast<size_t>(kind)];
}

std::string to_string(Device device) {
  std::string name(device_kind_name(device.kind));
  if (device.kind != Device::Kind::kCpu) name.append(":").append(std::to_string(device.index));
  return name;
}

Device parse_device(std::string_view text) {
  const size_t colon = text.find(':');
  for (int i = 0; i < kNumDeviceKinds; ++i) {
    if (text.substr(0, colon) != kKindNames[i]) continue;
    Device device{.kind = static_cast<Device::Kind>(i)};
    if (colon == std::string_view::npos) return device;
    if (device.kind == Device::Kind::kCpu) break;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data() + colon + 1, end, device.index);
    if (error == std::errc() && stop == end && device.index >= 0) return device;
    break;
  }
  fail<InvalidArgument>("device is '", text, "', must be \"cpu\", \"cuda\" or \"cuda:<index>\"");
}

}  // namespace sagellm
