// A shared library opened at run time, whose functions are found by name.
#pragma once

#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace sagellm::cuda {

class DynamicLibrary {
 public:
  /// Tries every name in every folder, then where the system looks. Throws DeviceError naming
  /// `what`, what was tried, and `remedy`.
  DynamicLibrary(const std::vector<std::string>& folders, std::span<const char* const> names,
                 const char* what, const char* remedy);
  DynamicLibrary(const DynamicLibrary&) = delete;
  DynamicLibrary& operator=(const DynamicLibrary&) = delete;
  ~DynamicLibrary();

  const std::string& path() const { return path_; }

  /// Points `function` at the symbol `name`; throws DeviceError when there is none.
  template <typename Function>
  void find(const char* name, Function*& function) const {
    static_assert(std::is_function_v<Function>);
    function = reinterpret_cast<Function*>(symbol(name));
  }

 private:
  void* symbol(const char* name) const;

  std::string path_;
  std::string remedy_;
  void* handle_ = nullptr;
};

}  // namespace sagellm::cuda
