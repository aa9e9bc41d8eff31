// What only the emulator can tell, for the tests in Python.
#include <pybind11/pybind11.h>

#include "cuda_emulator.h"

namespace py = pybind11;
using namespace py::literals;

void register_emulator(py::module_& m) {
  m.def("set_order", &cuda_emulation::set_order, "seed"_a,
        "Order in which threads take turns: ascending for 0, random for any other seed.");
  m.def("set_deferred", &cuda_emulation::set_deferred, "deferred"_a,
        "Whether work on streams happens when it is waited for, or at once.");
  m.def("allocation_count", &cuda_emulation::allocation_count, "Allocations alive.");
  m.def(
      "statistics",
      [] {
        const cuda_emulation::Statistics s = cuda_emulation::statistics();
        cuda_emulation::statistics() = {};
        return py::dict(
            "launches"_a = s.launches, "matrix_products"_a = s.matrix_products,
            "matrix_loads"_a = s.matrix_loads, "matrix_load_phases"_a = s.matrix_load_phases,
            "warpgroup_products"_a = s.warpgroup_products, "async_copies"_a = s.async_copies,
            "box_copies"_a = s.box_copies, "global_bytes_streamed"_a = s.global_bytes_streamed);
      },
      "Counts of what kernels did since the last call.");
}
