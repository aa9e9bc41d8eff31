// How the KV classes report a broken invariant. Only a defect of this library can cause one.
#pragma once

#include <stdexcept>

#include "sagellm/base/error.h"

namespace sagellm::kv {

/// An invariant of the KV cache does not hold; the message names it. RuntimeError in Python.
class IntegrityError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

/// Throws IntegrityError with the concatenated message unless `condition` holds.
template <typename... Args>
void check_invariant(bool condition, const Args&... args) {
  if (!condition) [[unlikely]] {
    throw IntegrityError(sagellm::detail::concat("KV cache invariant broken: ", args...));
  }
}

}  // namespace sagellm::kv
