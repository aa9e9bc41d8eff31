# pybind11::module for a standalone build: from the package that pyproject.toml lists as a build requirement.
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 2.12 CONFIG QUIET)
if(NOT pybind11_FOUND)
  execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
                  OUTPUT_VARIABLE _pybind11_dir RESULT_VARIABLE _pybind11_status
                  OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(_pybind11_status EQUAL 0)
    find_package(pybind11 2.12 CONFIG QUIET PATHS "${_pybind11_dir}" NO_DEFAULT_PATH)
  endif()
endif()
if(NOT pybind11_FOUND)
  message(FATAL_ERROR "pybind11 >= 2.12 was not found for ${Python_EXECUTABLE}. Install it with "
                      "'${Python_EXECUTABLE} -m pip install pybind11', point pybind11_DIR at it, or provide "
                      "pybind11::module through SAGE_COMMON_DEPS_FILE.")
endif()
