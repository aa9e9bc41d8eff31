// Chooses the kernels of this machine.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "sagellm/kernels/cpu/cpu_info.h"
#include "sagellm/kernels/cpu/probe_loops.h"
#include "sagellm/kernels/params.h"

namespace sagellm::kernels {

/// Names of the tables that this build contains and this machine runs, plainest first: "generic",
/// "avx2", "avx512", "avx512_bf16".
std::vector<std::string> available_isas();

/// The table named by the environment variable SAGELLM_CPU_ISA, or the best available one when it
/// is unset or empty. The choice is made at the first call. Throws Unsupported (at every call) when
/// the variable names a table that this machine does not run.
const KernelTable& kernel_table();

/// The table `isa`; throws Unsupported with the available names when this machine does not run it.
const KernelTable& kernel_table(std::string_view isa);

/// What a core can do at most with the instruction set `isa`; throws as `kernel_table(isa)`.
ProbeLoops probe_loops(std::string_view isa);

}  // namespace sagellm::kernels
