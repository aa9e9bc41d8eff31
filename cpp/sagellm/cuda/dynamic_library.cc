#include "sagellm/cuda/dynamic_library.h"

#include <dlfcn.h>

#include "sagellm/base/error.h"

namespace sagellm::cuda {

DynamicLibrary::DynamicLibrary(const std::vector<std::string>& folders,
                               std::span<const char* const> names, const char* what,
                               const char* remedy)
    : remedy_(remedy) {
  std::vector<std::string> paths;
  for (const std::string& folder : folders) {
    for (const char* name : names) paths.push_back(folder + "/" + name);
  }
  paths.insert(paths.end(), names.begin(), names.end());
  std::string tried;
  for (const std::string& path : paths) {
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ != nullptr) {
      path_ = path;
      return;
    }
    const char* error = dlerror();
    tried += tried.empty() ? "" : "; ";
    tried += error != nullptr ? error : path;
  }
  fail<DeviceError>(what, " was not found (", tried, "); ", remedy);
}

DynamicLibrary::~DynamicLibrary() { dlclose(handle_); }

void* DynamicLibrary::symbol(const char* name) const {
  void* symbol = dlsym(handle_, name);
  require<DeviceError>(symbol != nullptr, path_, " has no function ", name, "; ", remedy_);
  return symbol;
}

}  // namespace sagellm::cuda
