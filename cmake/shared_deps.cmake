# The one entry for dependencies. A script named by the environment variable SAGE_COMMON_DEPS_FILE may provide
#   pybind11::module, SAGE_COMMON_COMPILE_OPTIONS, SAGE_COMMON_COMPILE_DEFINITIONS, SAGE_GPERFTOOLS_LIBS;
# what it does not provide comes from pybind11_dependency.cmake and gperftools.cmake. Sets SAGELLM_GPERFTOOLS_LIBS.
if(NOT "$ENV{SAGE_COMMON_DEPS_FILE}" STREQUAL "")
  if(EXISTS "$ENV{SAGE_COMMON_DEPS_FILE}" AND NOT IS_DIRECTORY "$ENV{SAGE_COMMON_DEPS_FILE}")
    message(STATUS "sagellm: shared dependencies from SAGE_COMMON_DEPS_FILE=$ENV{SAGE_COMMON_DEPS_FILE}")
    include("$ENV{SAGE_COMMON_DEPS_FILE}")
  else()
    message(WARNING "SAGE_COMMON_DEPS_FILE=$ENV{SAGE_COMMON_DEPS_FILE} is not a file; using the dependencies found "
                    "by sagellm itself. Correct or unset the variable.")
  endif()
endif()

if(SAGELLM_BUILD_PYTHON AND NOT TARGET pybind11::module)
  include(pybind11_dependency)
endif()

# CPU profiling is optional: without the library the build goes on and `_core.profiler.available` is False.
set(_gperftools_default OFF)
if("$ENV{SAGE_ENABLE_GPERFTOOLS}")
  set(_gperftools_default ON)
endif()
option(ENABLE_GPERFTOOLS "Link the gperftools CPU profiler (default: SAGE_ENABLE_GPERFTOOLS)" ${_gperftools_default})
set(SAGELLM_GPERFTOOLS_LIBS "")
if(ENABLE_GPERFTOOLS)
  if(NOT SAGE_GPERFTOOLS_LIBS)
    include(gperftools)
  endif()
  if(SAGE_GPERFTOOLS_LIBS)
    include(CheckCXXSourceCompiles)
    set(CMAKE_REQUIRED_LIBRARIES ${SAGE_GPERFTOOLS_LIBS})
    unset(SAGELLM_GPERFTOOLS_LINKS CACHE)  # the libraries may have changed since the last configure
    check_cxx_source_compiles("
      extern \"C\" int ProfilerStart(const char*);
      extern \"C\" void ProfilerStop();
      int main() { ProfilerStart(\"\"); ProfilerStop(); }" SAGELLM_GPERFTOOLS_LINKS)
    unset(CMAKE_REQUIRED_LIBRARIES)
    if(SAGELLM_GPERFTOOLS_LINKS)
      set(SAGELLM_GPERFTOOLS_LIBS ${SAGE_GPERFTOOLS_LIBS})
    endif()
  endif()
  if(SAGELLM_GPERFTOOLS_LIBS)
    message(STATUS "sagellm: gperftools CPU profiler: ${SAGELLM_GPERFTOOLS_LIBS}")
  else()
    message(STATUS "sagellm: ENABLE_GPERFTOOLS is on, but no usable libprofiler was found; building without it. "
                   "Install it (Debian: libgoogle-perftools-dev) or set SAGE_GPERFTOOLS_LIBS in the shared script.")
  endif()
endif()
