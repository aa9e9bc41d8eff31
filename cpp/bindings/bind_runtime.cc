#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/runtime/bandwidth.h"
#include "sagellm/runtime/op_table.h"

namespace py = pybind11;

void register_runtime(py::module_& m) {
  py::module_ runtime = m.def_submodule("runtime", "Threads, memory and what the machine gives.");
  runtime.def(
      "read_bandwidth", &sagellm::runtime::read_bandwidth, py::arg("threads"), py::arg("bytes"),
      py::arg("repeat") = 5, py::call_guard<py::gil_scoped_release>(),
      "Median bytes per second of reading `bytes` of huge-page memory with `threads` threads.");
  runtime.def("peak_resident_bytes", &sagellm::runtime::peak_resident_bytes,
              "Peak resident memory of this process in bytes (VmHWM).");
  runtime.def(
      "register_op_table",
      [](const py::object& capsule) {
        namespace rt = sagellm::runtime;
        sagellm::require<sagellm::InvalidArgument>(
            PyCapsule_IsValid(capsule.ptr(), rt::kOpTableCapsule) != 0, "a capsule named ",
            rt::kOpTableCapsule, " is needed");
        rt::register_op_table(*static_cast<const rt::OpTableHandover*>(
            PyCapsule_GetPointer(capsule.ptr(), rt::kOpTableCapsule)));
      },
      py::arg("capsule"),
      "Gives a device kind the operations that another module brings, for the life of the "
      "process.");
  runtime.def(
      "device_kinds",
      [] {
        std::vector<std::string> names;
        for (const auto kind : sagellm::runtime::device_kinds()) {
          names.emplace_back(sagellm::device_kind_name(kind));
        }
        return names;
      },
      "Device kinds that have operations in this process.");
  runtime.def("resident_bytes", &sagellm::runtime::resident_bytes,
              "Resident memory of this process in bytes (VmRSS).");
}
