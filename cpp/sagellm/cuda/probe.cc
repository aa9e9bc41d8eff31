#include "sagellm/cuda/probe.h"

#include "sagellm/cuda/check.h"

namespace sagellm::cuda {

namespace {

constexpr int kOldestMajor = 8;  // compute capability: bfloat16 on tensor cores, cp.async

std::string version_text(int version) {
  return detail::concat(version / 1000, ".", version % 1000 / 10);
}

}  // namespace

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

DeviceCount count_devices() {
  const int driver = driver_version();
  if (driver == 0) {
    return {0,
            "no NVIDIA driver is loaded (libcuda.so.1 is missing); install it, or give the "
            "container access to it"};
  }
  DeviceCount devices;
  const cudaError_t error = cudaGetDeviceCount(&devices.count);
  if (error != cudaSuccess) (void)cudaGetLastError();
  if (error == cudaErrorInsufficientDriver) {
    return {0, detail::concat("the NVIDIA driver serves CUDA ", version_text(driver),
                              ", this build needs ", version_text(runtime_version() / 1000 * 1000),
                              "; update the driver, or build with an older toolkit")};
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && devices.count == 0)) {
    return {0, "the NVIDIA driver shows no device; check nvidia-smi and CUDA_VISIBLE_DEVICES"};
  }
  if (error != cudaSuccess) {
    return {0, detail::concat("cudaGetDeviceCount: ", cudaGetErrorString(error), " (",
                              cudaGetErrorName(error), "); check nvidia-smi")};
  }
  return devices;
}

DeviceInfo device_info(int index) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  return {
      .name = properties.name,
      .major = properties.major,
      .minor = properties.minor,
      .multiprocessors = properties.multiProcessorCount,
      .l2_bytes = static_cast<size_t>(properties.l2CacheSize),
      .shared_bytes = properties.sharedMemPerBlockOptin,
      .total_bytes = properties.totalGlobalMem,
  };
}

DeviceMemory device_memory() {
  DeviceMemory memory;
  check(cudaMemGetInfo(&memory.free_bytes, &memory.total_bytes), "cudaMemGetInfo");
  return memory;
}

void use_device(int index) {
  const DeviceCount devices = count_devices();
  require<DeviceError>(devices.count > 0, devices.reason);
  require<DeviceError>(index >= 0 && index < devices.count, "the NVIDIA driver shows ",
                       devices.count, " devices, so there is no cuda:", index,
                       "; check nvidia-smi and CUDA_VISIBLE_DEVICES");
  const DeviceInfo info = device_info(index);
  require<DeviceError>(info.major >= kOldestMajor, "cuda:", index, " (", info.name,
                       ") has compute capability ", info.major, ".", info.minor,
                       "; 8.0 or newer is needed");
  select_device(index);
}

void select_device(int index) { check(cudaSetDevice(index), "cudaSetDevice"); }

}  // namespace sagellm::cuda
