// Which CUDA devices this process can use, and why it cannot use the others.
#pragma once

#include <cstddef>
#include <string>

namespace sagellm::cuda {

/// Version numbers as CUDA counts: 1000 * major + 10 * minor.
int runtime_version();
/// The newest CUDA that the driver serves; 0 without a driver.
int driver_version();

/// The number of devices, with `reason` empty; or 0 and why.
struct DeviceCount {
  int count = 0;
  std::string reason;
};
DeviceCount count_devices();

struct DeviceInfo {
  std::string name;
  int major = 0;  // compute capability
  int minor = 0;
  int multiprocessors = 0;
  size_t l2_bytes = 0;
  size_t shared_bytes = 0;  // that a block can have
  size_t total_bytes = 0;
};
/// Throws DeviceError when there is no such device.
DeviceInfo device_info(int index);

/// Bytes of the current device, as its driver counts them now.
struct DeviceMemory {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
};
DeviceMemory device_memory();

/// Makes `index` the current device of the calling thread; throws DeviceError with the reason when
/// it cannot run these kernels.
void use_device(int index);
/// The same for a device that use_device accepted before: costs next to nothing.
void select_device(int index);

}  // namespace sagellm::cuda
