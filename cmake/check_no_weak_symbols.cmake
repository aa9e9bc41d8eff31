# cmake -DNM=nm "-DOBJECTS=a.o;b.o" [-DSTAMP=file] -P check_no_weak_symbols.cmake
#
# The linker keeps one copy of a weak symbol (inline function, template, vague-linkage object). If an object compiled
# for AVX-512 defines one, that copy may serve the whole program and crash older machines. Fails when an object defines
# a weak (W, V) or unique (u) symbol, or runs a static constructor.
if(NOT NM OR NOT OBJECTS)
  message(FATAL_ERROR "check_no_weak_symbols: pass -DNM=<nm> and -DOBJECTS=<object;object;...>")
endif()
set(bad "")
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND "${NM}" --defined-only "${object}"
                  OUTPUT_VARIABLE symbols RESULT_VARIABLE status ERROR_VARIABLE errors)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "check_no_weak_symbols: ${NM} failed on ${object}: ${errors}")
  endif()
  string(REGEX MATCHALL "[^\n]+ ([WVu] [^\n]+|[tT] _GLOBAL__sub_I_[^\n]*)" found "${symbols}")
  foreach(line IN LISTS found)
    string(APPEND bad "\n  ${object}: ${line}")
  endforeach()
endforeach()
if(bad)
  message(FATAL_ERROR "ISA objects define code that the linker may share with other machines:${bad}\n"
                      "Put functions in an anonymous namespace, use no std templates and no static constructors.")
endif()
if(STAMP)
  file(TOUCH "${STAMP}")
endif()
