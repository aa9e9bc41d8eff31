// _core.profiler: the gperftools CPU profiler, present when the build linked it
// (ENABLE_GPERFTOOLS).
#include <pybind11/pybind11.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>

#include "sagellm/base/error.h"

namespace py = pybind11;

#ifdef SAGELLM_HAVE_GPERFTOOLS
// The two entry points of <gperftools/profiler.h>; declared here because shared scripts may bring
// libraries alone.
extern "C" int ProfilerStart(const char* path);
extern "C" void ProfilerStop();
#endif

namespace {

#ifdef SAGELLM_HAVE_GPERFTOOLS
constexpr bool kAvailable = true;

void start(const std::filesystem::path& path) {
  sagellm::require<sagellm::InvalidArgument>(
      ProfilerStart(path.c_str()) != 0, "cannot write a CPU profile to '", path.string(),
      "': stop a profile that is running, and name a file in a folder that can be written");
}

void stop() { ProfilerStop(); }
#else
constexpr bool kAvailable = false;

[[noreturn]] void refuse() {
  sagellm::fail<sagellm::Unsupported>(
      "this build has no CPU profiler: install gperftools (Debian: libgoogle-perftools-dev) and "
      "reinstall sagellm with SAGE_ENABLE_GPERFTOOLS=1");
}

void start(const std::filesystem::path&) { refuse(); }
void stop() { refuse(); }
#endif

}  // namespace

void register_profiler(py::module_& m) {
  py::module_ profiler = m.def_submodule("profiler", "CPU profiles with gperftools.");
  profiler.attr("available") = kAvailable;
  profiler.def("start", &start, py::arg("path"),
               "Starts writing a CPU profile of the whole process to `path`.");
  profiler.def("stop", &stop, "Ends the profile and flushes it.");
}
