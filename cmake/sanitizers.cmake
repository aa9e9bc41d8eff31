# SAGELLM_SANITIZE=address,undefined | thread: instruments every target of this build. Such a build is for the C++
# tests (SAGELLM_BUILD_PYTHON=OFF): a Python interpreter cannot load an instrumented module without preloading.
if(SAGELLM_SANITIZE)
  if(SAGELLM_BUILD_PYTHON)
    message(FATAL_ERROR "SAGELLM_SANITIZE=${SAGELLM_SANITIZE} needs -DSAGELLM_BUILD_PYTHON=OFF: "
                        "Python cannot load a sanitized module.")
  endif()
  set(_known address undefined leak thread)
  string(REPLACE "," ";" _requested "${SAGELLM_SANITIZE}")
  foreach(_sanitizer IN LISTS _requested)
    if(NOT _sanitizer IN_LIST _known)
      message(FATAL_ERROR "SAGELLM_SANITIZE: unknown sanitizer '${_sanitizer}'; known: ${_known}")
    endif()
  endforeach()
  add_compile_options(-fsanitize=${SAGELLM_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${SAGELLM_SANITIZE})
endif()
if(SAGELLM_BUILD_FUZZERS)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "SAGELLM_BUILD_FUZZERS needs clang (libFuzzer); configure with CXX=clang++ "
                        "(Debian: apt-get install clang libclang-rt-14-dev).")
  endif()
  add_compile_options(-fsanitize=fuzzer-no-link)  # coverage in the library; the targets link the driver
endif()
