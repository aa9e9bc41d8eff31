# The Python module _cuda: kernels for NVIDIA devices. Needs nvcc; the CUDA runtime is linked statically and the driver
# found at run time, so that the module loads on machines without either and says what is missing.
#
#   SAGELLM_CUDA        AUTO (built when a usable nvcc is found), ON (its absence is an error), OFF
#   SAGELLM_CUDA_ARCHS  machine code to include, in CMake's spelling: "90a-real" while developing
set(SAGELLM_CUDA AUTO CACHE STRING "Build the module _cuda: AUTO, ON or OFF")
set_property(CACHE SAGELLM_CUDA PROPERTY STRINGS AUTO ON OFF)
set(SAGELLM_CUDA_ARCHS "" CACHE STRING "CUDA architectures of _cuda (empty: 8.0, 8.6, 8.9, 9.0a, 10.0 and PTX)")
set(_oldest_nvcc 12.4)

# Sets SAGELLM_CUDA_MISSING to what keeps _cuda from being built, or to nothing.
function(_sagellm_find_nvcc)
  set(SAGELLM_CUDA_MISSING "" PARENT_SCOPE)
  if(NOT CMAKE_CUDA_COMPILER)
    find_program(_sagellm_nvcc nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
    mark_as_advanced(_sagellm_nvcc)
    if(NOT _sagellm_nvcc)
      set(SAGELLM_CUDA_MISSING "nvcc was not found; install the CUDA toolkit ${_oldest_nvcc} or newer, or name its \
compiler with -DCMAKE_CUDA_COMPILER=<nvcc>" PARENT_SCOPE)
      return()
    endif()
    set(CMAKE_CUDA_COMPILER "${_sagellm_nvcc}")
  endif()
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE text ERROR_VARIABLE text
                  RESULT_VARIABLE status)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${text}")
  if(NOT status EQUAL 0 OR NOT CMAKE_MATCH_1)
    set(SAGELLM_CUDA_MISSING "${CMAKE_CUDA_COMPILER} --version failed; name a working nvcc with \
-DCMAKE_CUDA_COMPILER=<nvcc>" PARENT_SCOPE)
  elseif(CMAKE_MATCH_1 VERSION_LESS _oldest_nvcc)
    set(SAGELLM_CUDA_MISSING "${CMAKE_CUDA_COMPILER} is CUDA ${CMAKE_MATCH_1}; install ${_oldest_nvcc} or newer, or \
name a newer nvcc with -DCMAKE_CUDA_COMPILER=<nvcc>" PARENT_SCOPE)
  else()
    set(ENV{CUDACXX} "${CMAKE_CUDA_COMPILER}")
    if(NOT DEFINED CMAKE_CUDA_HOST_COMPILER AND NOT DEFINED ENV{CUDAHOSTCXX})
      set(ENV{CUDAHOSTCXX} "${CMAKE_CXX_COMPILER}")
    endif()
    include(CheckLanguage)
    check_language(CUDA)  # compiles a small program with the host compiler
    if(NOT CMAKE_CUDA_COMPILER)
      set(SAGELLM_CUDA_MISSING "nvcc does not work with ${CMAKE_CXX_COMPILER}; name another host compiler with \
-DCMAKE_CUDA_HOST_COMPILER=<g++>" PARENT_SCOPE)
    endif()
  endif()
endfunction()

set(SAGELLM_BUILD_CUDA OFF)
if(NOT SAGELLM_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "SAGELLM_CUDA=${SAGELLM_CUDA}; possible are AUTO, ON and OFF.")
endif()
if(SAGELLM_CUDA STREQUAL "ON" AND NOT SAGELLM_BUILD_PYTHON)
  message(FATAL_ERROR "SAGELLM_CUDA=ON needs SAGELLM_BUILD_PYTHON=ON: _cuda is a Python module.")
endif()
if(NOT SAGELLM_CUDA STREQUAL "OFF" AND SAGELLM_BUILD_PYTHON)
  _sagellm_find_nvcc()
  if(NOT SAGELLM_CUDA_MISSING)
    set(SAGELLM_BUILD_CUDA ON)
  elseif(SAGELLM_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SAGELLM_CUDA=ON, but ${SAGELLM_CUDA_MISSING}.")
  else()
    message(STATUS "sagellm: no module _cuda: ${SAGELLM_CUDA_MISSING}")
  endif()
endif()
if(NOT SAGELLM_BUILD_CUDA)
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # each target names its own
endif()
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc has it
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
find_path(SAGELLM_CUDA_INCLUDE cuda_runtime_api.h HINTS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} REQUIRED)

set(_archs "${SAGELLM_CUDA_ARCHS}")
if(NOT _archs)
  set(_archs 80-real 86-real 89-real 90a-real)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    list(APPEND _archs 100-real 100-virtual)
  else()
    list(APPEND _archs 90-virtual)
  endif()
endif()
message(STATUS "sagellm: module _cuda with CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${_archs}")
# The kernels ask 8.6 for nothing that 8.0 lacks: its machine code comes from the same PTX, which saves a run of the
# compiler's front end.
set(_more_code "")
if("80-real" IN_LIST _archs AND "86-real" IN_LIST _archs)
  list(REMOVE_ITEM _archs 86-real)
  set(_more_code "--generate-code=arch=compute_80,code=[sm_86]")
endif()

file(GLOB _kernels CONFIGURE_DEPENDS cpp/sagellm/kernels/cuda/*.cu)
file(GLOB _runtime CONFIGURE_DEPENDS cpp/sagellm/cuda/*.cc cpp/sagellm/kernels/cuda/*.cc)
add_library(sagellm_cuda STATIC ${_kernels} ${_runtime})
target_include_directories(sagellm_cuda PUBLIC cpp)
target_include_directories(sagellm_cuda SYSTEM PRIVATE "${SAGELLM_CUDA_INCLUDE}")
target_link_libraries(sagellm_cuda PUBLIC sagellm_core ${CMAKE_DL_LIBS})
set_target_properties(sagellm_cuda PROPERTIES CUDA_ARCHITECTURES "${_archs}" CUDA_RUNTIME_LIBRARY Static)
# As on the CPU, a fused multiply-add happens where the source says so: fmaf, and what tensor cores do.
target_compile_options(sagellm_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false --expt-relaxed-constexpr -Xfatbin=-compress-all ${_more_code}>
  $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor>)
if("${_archs}" MATCHES "90a")  # kernels on wgmma; without their code the host must not choose them
  target_compile_definitions(sagellm_cuda PRIVATE SAGELLM_CUDA_SM90A)
endif()
if(SAGELLM_WERROR)
  target_compile_options(sagellm_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>
                                              $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()

include(cuda_bindings)
sagellm_cuda_binding_sources(_cuda_bindings)
python_add_library(_cuda MODULE WITH_SOABI ${_cuda_bindings})
target_compile_definitions(_cuda PRIVATE SAGELLM_VERSION="${PROJECT_VERSION}" SAGELLM_CUDA_MODULE=_cuda)
target_include_directories(_cuda PRIVATE "${PROJECT_BINARY_DIR}/generated")
target_link_libraries(_cuda PRIVATE sagellm_cuda pybind11::module)
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static LINKER_LANGUAGE CUDA)
sagellm_enable_warnings(_cuda)
install(TARGETS _cuda DESTINATION sagellm)
