# sagellm_enable_warnings(target): the project's warnings; errors with SAGELLM_WERROR.
function(sagellm_enable_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor)
  if(SAGELLM_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
endfunction()
