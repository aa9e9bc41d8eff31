# sagellm_cuda_binding_sources(out): the sources of the module _cuda, which the emulator's module shares. Each
# cpp/bindings/cuda/bind_<area>.cc has a `void register_<area>(pybind11::module_&)`; the type of arrays comes first.
function(sagellm_cuda_binding_sources out)
  set(folder "${PROJECT_SOURCE_DIR}/cpp/bindings/cuda")
  file(GLOB sources CONFIGURE_DEPENDS "${folder}/bind_*.cc")
  list(REMOVE_ITEM sources "${folder}/bind_device.cc")
  list(PREPEND sources "${folder}/bind_device.cc")
  set(SAGELLM_CUDA_BINDING_AREAS "")
  foreach(source IN LISTS sources)
    string(REGEX REPLACE ".*/bind_(.*)\\.cc$" "\\1" area "${source}")
    string(APPEND SAGELLM_CUDA_BINDING_AREAS " X(${area})")
  endforeach()
  file(CONFIGURE OUTPUT "${PROJECT_BINARY_DIR}/generated/cuda_binding_areas.inc"
       CONTENT "#define SAGELLM_CUDA_BINDING_AREAS(X)@SAGELLM_CUDA_BINDING_AREAS@\n" @ONLY)
  set(${out} "${folder}/module.cc" ${sources} PARENT_SCOPE)
endfunction()
