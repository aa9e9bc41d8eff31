#include <pybind11/pybind11.h>

#include "sagellm/runtime/bandwidth.h"

namespace py = pybind11;

void register_runtime(py::module_& m) {
  py::module_ runtime = m.def_submodule("runtime", "Threads, memory and what the machine gives.");
  runtime.def(
      "read_bandwidth", &sagellm::runtime::read_bandwidth, py::arg("threads"), py::arg("bytes"),
      py::arg("repeat") = 5, py::call_guard<py::gil_scoped_release>(),
      "Median bytes per second of reading `bytes` of huge-page memory with `threads` threads.");
  runtime.def("peak_resident_bytes", &sagellm::runtime::peak_resident_bytes,
              "Peak resident memory of this process in bytes (VmHWM).");
  runtime.def("resident_bytes", &sagellm::runtime::resident_bytes,
              "Resident memory of this process in bytes (VmRSS).");
}
