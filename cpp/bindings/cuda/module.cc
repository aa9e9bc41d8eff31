// The Python module sagellm._cuda: what runs on NVIDIA devices. It loads without a driver; `probe`
// tells what is missing. The emulator's test module has the same functions.
#include <pybind11/pybind11.h>

#include "../translate_errors.h"
#include "cuda_binding_areas.inc"  // generated: SAGELLM_CUDA_BINDING_AREAS(X)

namespace py = pybind11;

#define SAGELLM_DECLARE(area) void register_##area(py::module_& m);
#define SAGELLM_REGISTER(area) register_##area(m);
SAGELLM_CUDA_BINDING_AREAS(SAGELLM_DECLARE)

#if defined(SAGELLM_CUDA_EMULATED)
SAGELLM_DECLARE(emulator)
#endif

PYBIND11_MODULE(SAGELLM_CUDA_MODULE, m) {
  m.doc() = "CUDA devices: their memory, their kernels and what runs there.";
  m.attr("__version__") = SAGELLM_VERSION;
  py::register_local_exception_translator(translate_errors);
  SAGELLM_CUDA_BINDING_AREAS(SAGELLM_REGISTER)
#if defined(SAGELLM_CUDA_EMULATED)
  SAGELLM_REGISTER(emulator)
#endif
}
