// The core's errors as the Python exceptions of sagellm.errors; each module registers it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <exception>

#include "sagellm/base/error.h"

// Messages may quote bytes of a hostile file, so they are not trusted to be UTF-8.
inline void raise_error(const char* type, const std::exception& error) {
  const auto message = pybind11::reinterpret_steal<pybind11::object>(PyUnicode_DecodeUTF8(
      error.what(), static_cast<pybind11::ssize_t>(std::strlen(error.what())), "backslashreplace"));
  PyErr_SetObject(pybind11::module_::import("sagellm.errors").attr(type).ptr(), message.ptr());
}

inline void translate_errors(std::exception_ptr pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const sagellm::InvalidArgument& error) {
    raise_error("InvalidArgumentError", error);
  } catch (const sagellm::Unsupported& error) {
    raise_error("UnsupportedError", error);
  } catch (const sagellm::DeviceError& error) {
    raise_error("DeviceUnavailableError", error);
  } catch (const sagellm::CorruptFile& error) {
    raise_error("CorruptFileError", error);
  } catch (const sagellm::Error& error) {
    raise_error("SagellmError", error);
  }
}
