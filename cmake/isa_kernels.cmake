# Kernels of one instruction set live in cpp/sagellm/kernels/cpu/<isa>/ and are compiled alone, as an object library
# with exactly the flags that the feature test at run time checks. SAGELLM_KERNELS_<ISA> tells the dispatcher what is in.
include(CheckCXXCompilerFlag)

set(_avx2_flags -mavx2 -mfma -mf16c)
set(_avx512_flags ${_avx2_flags} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni)
set(_avx512_bf16_flags ${_avx512_flags} -mavx512bf16)

# Adds the folder `isa`, compiled with the flags that follow, to `core`, and its objects to SAGELLM_ISA_OBJECTS.
function(_sagellm_add_isa core isa)
  file(GLOB sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/cpp/sagellm/kernels/cpu/${isa}/*.cc")
  if(NOT sources)
    return()
  endif()
  string(TOUPPER ${isa} upper)
  if(ARGN)
    string(REPLACE ";" " " flags "${ARGN}")
    check_cxx_compiler_flag("${flags}" SAGELLM_COMPILER_HAS_${upper})
    if(NOT SAGELLM_COMPILER_HAS_${upper})
      message(STATUS "sagellm: the compiler lacks '${flags}'; the ${isa} kernels are left out")
      return()
    endif()
  endif()
  add_library(sagellm_isa_${isa} OBJECT ${sources})
  target_include_directories(sagellm_isa_${isa} PRIVATE "${PROJECT_SOURCE_DIR}/cpp")
  target_compile_options(sagellm_isa_${isa} PRIVATE -ffp-contract=off -fno-exceptions ${ARGN})
  sagellm_enable_warnings(sagellm_isa_${isa})
  # GCC 12 takes the undefined pass-through operand inside its own intrinsics for a bug of the caller.
  target_compile_options(sagellm_isa_${isa} PRIVATE -Wno-uninitialized)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(sagellm_isa_${isa} PRIVATE -Wno-maybe-uninitialized)
  endif()
  if(SAGELLM_SANITIZE MATCHES "undefined" AND CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    target_compile_options(sagellm_isa_${isa} PRIVATE -fno-sanitize=function)  # emits weak type records
  endif()
  target_sources(${core} PRIVATE $<TARGET_OBJECTS:sagellm_isa_${isa}>)
  target_compile_definitions(${core} PUBLIC SAGELLM_KERNELS_${upper}=1)
  set_property(GLOBAL APPEND PROPERTY SAGELLM_ISA_OBJECTS $<TARGET_OBJECTS:sagellm_isa_${isa}>)
endfunction()

# Adds every ISA that this target machine and compiler know to `core`, behind the weak-symbol gate.
function(sagellm_add_isa_kernels core)
  _sagellm_add_isa(${core} generic)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    _sagellm_add_isa(${core} avx2 ${_avx2_flags})
    _sagellm_add_isa(${core} avx512 ${_avx512_flags})
    _sagellm_add_isa(${core} avx512_bf16 ${_avx512_bf16_flags})
  endif()
  get_property(objects GLOBAL PROPERTY SAGELLM_ISA_OBJECTS)
  if(NOT objects)
    return()
  endif()
  set(stamp "${PROJECT_BINARY_DIR}/isa_symbols.stamp")
  set(gate "${PROJECT_SOURCE_DIR}/cmake/check_no_weak_symbols.cmake")
  add_custom_command(
    OUTPUT "${stamp}"
    COMMAND ${CMAKE_COMMAND} "-DNM=${CMAKE_NM}" "-DOBJECTS=${objects}" "-DSTAMP=${stamp}" -P "${gate}"
    DEPENDS ${objects} "${gate}"
    COMMENT "Checking that ISA objects export no shared code"
    VERBATIM)
  add_custom_target(check_isa_symbols ALL DEPENDS "${stamp}")
  add_dependencies(${core} check_isa_symbols)
endfunction()
