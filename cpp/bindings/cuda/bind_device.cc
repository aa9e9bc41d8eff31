// Devices, and arrays in their memory.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device_array.h"
#include "sagellm/cuda/probe.h"
#include "sagellm/cuda/stream.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm;  // NOLINT: a binding file of the core

py::dict describe(int index) {
  const cuda::DeviceInfo info = cuda::device_info(index);
  return py::dict("name"_a = info.name,
                  "compute_capability"_a = py::make_tuple(info.major, info.minor),
                  "multiprocessors"_a = info.multiprocessors, "l2_bytes"_a = info.l2_bytes,
                  "shared_bytes"_a = info.shared_bytes, "total_bytes"_a = info.total_bytes);
}

DeviceArray from_numpy(const py::array& source) {
  const py::array dense = py::array::ensure(source, py::array::c_style);
  require<InvalidArgument>(static_cast<bool>(dense), "the array cannot be made contiguous");
  DeviceArray array({dense.shape(), dense.shape() + dense.ndim()}, dense.dtype());
  cuda::copy_to_device(array.data(), dense.data(), array.bytes(), nullptr);
  cuda::synchronize(nullptr);
  return array;
}

DeviceArray empty(std::vector<py::ssize_t> shape, const py::object& dtype) {
  DeviceArray array(std::move(shape), py::dtype::from_args(dtype));
  cuda::fill(array.data(), 0xff, array.bytes(), nullptr);
  return array;
}

py::array to_numpy(const DeviceArray& array) {
  py::array result(array.dtype(), array.shape());
  cuda::copy_to_host(result.mutable_data(), array.data(), array.bytes(), nullptr);
  cuda::synchronize(nullptr);
  return result;
}

}  // namespace

void register_device(py::module_& m) {
  m.def(
      "probe",
      [] {
        const cuda::DeviceCount devices = cuda::count_devices();
        return py::make_tuple(devices.count, devices.reason);
      },
      "The number of devices, and why there are none when it is 0.");
  m.def("runtime_version", &cuda::runtime_version, "CUDA of this build: 13000 for 13.0.");
  m.def("driver_version", &cuda::driver_version,
        "The newest CUDA that the driver serves; 0 without a driver.");
  m.def("use_device", &cuda::use_device, "index"_a,
        "Makes a device the current one of this thread; raises DeviceUnavailableError.");
  m.def("device_info", &describe, "index"_a, "Name and sizes of a device.");
  m.def(
      "device_memory",
      [] {
        const cuda::DeviceMemory memory = cuda::device_memory();
        return py::make_tuple(memory.free_bytes, memory.total_bytes);
      },
      "Free and total bytes of the current device.");
  m.def(
      "synchronize", [] { cuda::synchronize(nullptr); }, "Waits for the default stream.");

  py::class_<DeviceArray>(m, "DeviceArray", py::module_local(),
                          "A dense array in the memory of the current device.")
      .def_property_readonly("shape",
                             [](const DeviceArray& a) { return py::tuple(py::cast(a.shape())); })
      .def_property_readonly("dtype", &DeviceArray::dtype)
      .def_property_readonly("nbytes", &DeviceArray::bytes)
      .def("numpy", &to_numpy, "A copy in host memory, after all work of the default stream.");
  m.def("array", &from_numpy, "source"_a, "Copies a NumPy array to the device.");
  m.def("empty", &empty, "shape"_a, "dtype"_a,
        "An array whose bytes are all 0xff: NaN in every float type.");
}
