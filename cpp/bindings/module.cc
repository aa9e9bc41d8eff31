// The Python module sagellm._core: translates the core's errors and registers one submodule per
// area.
#include <pybind11/pybind11.h>

#include <cstring>
#include <exception>

#include "binding_areas.inc"  // generated: SAGELLM_BINDING_AREAS(X), one X(area) per bind_<area>.cc
#include "sagellm/base/error.h"

namespace py = pybind11;

#define SAGELLM_DECLARE(area) void register_##area(py::module_& m);
#define SAGELLM_REGISTER(area) register_##area(m);
SAGELLM_BINDING_AREAS(SAGELLM_DECLARE)

namespace {

// Messages may quote bytes of a hostile file, so they are not trusted to be UTF-8.
void raise(const char* type, const std::exception& error) {
  const py::object message = py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
      error.what(), static_cast<py::ssize_t>(std::strlen(error.what())), "backslashreplace"));
  PyErr_SetObject(py::module_::import("sagellm.errors").attr(type).ptr(), message.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const sagellm::InvalidArgument& error) {
    raise("InvalidArgumentError", error);
  } catch (const sagellm::Unsupported& error) {
    raise("UnsupportedError", error);
  } catch (const sagellm::DeviceError& error) {
    raise("DeviceUnavailableError", error);
  } catch (const sagellm::CorruptFile& error) {
    raise("CorruptFileError", error);
  } catch (const sagellm::Error& error) {
    raise("SagellmError", error);
  }
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native core of sagellm: one submodule per C++ namespace.";
  m.attr("__version__") = SAGELLM_VERSION;
  py::register_local_exception_translator(translate);
  SAGELLM_BINDING_AREAS(SAGELLM_REGISTER)
}
