// The Python module sagellm._core: translates the core's errors and registers one submodule per
// area.
#include <pybind11/pybind11.h>

#include "binding_areas.inc"  // generated: SAGELLM_BINDING_AREAS(X), one X(area) per bind_<area>.cc
#include "translate_errors.h"

namespace py = pybind11;

#define SAGELLM_DECLARE(area) void register_##area(py::module_& m);
#define SAGELLM_REGISTER(area) register_##area(m);
SAGELLM_BINDING_AREAS(SAGELLM_DECLARE)

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native core of sagellm: one submodule per C++ namespace.";
  m.attr("__version__") = SAGELLM_VERSION;
  py::register_local_exception_translator(translate_errors);
  SAGELLM_BINDING_AREAS(SAGELLM_REGISTER)
}
