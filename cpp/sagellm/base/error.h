// The error tree of the C++ core. Bindings map each class to a Python exception of the same name.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace sagellm {

/// Root of every error that the core throws on purpose.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A value that the caller may correct (also `ValueError` in Python).
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// A valid request that this build, machine or model cannot serve.
class Unsupported : public Error {
 public:
  using Error::Error;
};

/// A device, driver or operating-system resource failed (memory, threads, files).
class DeviceError : public Error {
 public:
  using Error::Error;
};

/// A peer or a transport failed.
class CommError : public Error {
 public:
  using Error::Error;
};

/// A file that is truncated, inconsistent or hostile.
class CorruptFile : public Error {
 public:
  using Error::Error;
};

namespace detail {
template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}
}  // namespace detail

/// Throws `E` with the concatenated message: fail<InvalidArgument>("k is ", k, ", must be > 0").
template <typename E, typename... Args>
[[noreturn]] void fail(const Args&... args) {
  throw E(detail::concat(args...));
}

/// Throws `E` unless `condition` holds.
template <typename E, typename... Args>
void require(bool condition, const Args&... args) {
  if (!condition) [[unlikely]] {
    fail<E>(args...);
  }
}

}  // namespace sagellm
