// Where memory lives and code runs: "cpu", "cuda:1".
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace sagellm {

/// One device of this process. `index` counts devices of a kind; the CPU has index 0 only.
struct Device {
  enum class Kind : uint8_t { kCpu, kCuda };

  Kind kind = Kind::kCpu;
  int32_t index = 0;

  bool operator==(const Device&) const = default;
};
inline constexpr int kNumDeviceKinds = 2;

/// "cpu", "cuda".
std::string_view device_kind_name(Device::Kind kind);

/// "cpu", "cuda:0".
std::string to_string(Device device);

/// Reads "cpu", "cuda" (index 0) or "cuda:<index>"; throws InvalidArgument with the known forms.
/// Whether the device is present is not asked here.
Device parse_device(std::string_view text);

}  // namespace sagellm
