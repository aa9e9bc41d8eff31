#include "sagellm/kernels/cpu/dispatch.h"

#include <cstdlib>

#include "sagellm/base/error.h"
#include "sagellm/kernels/cpu/isa_tables.h"

namespace sagellm::kernels {
namespace {

using Fill = void (*)(KernelTable&);
using FillProbe = void (*)(ProbeLoops&);

/// One instruction set that this build contains. A table inherits the entries of the previous one.
struct Isa {
  const char* name;
  bool (*runs_on)(const CpuInfo&);
  Fill fill_matmul;
  Fill fill_ops;
  FillProbe fill_probe_loops;
};

[[maybe_unused]] bool has_avx2(const CpuInfo& cpu) { return cpu.avx2 && cpu.fma && cpu.f16c; }
[[maybe_unused]] bool has_avx512(const CpuInfo& cpu) {
  return has_avx2(cpu) && cpu.avx512f && cpu.avx512bw && cpu.avx512dq && cpu.avx512vl &&
         cpu.avx512vnni;
}
[[maybe_unused]] bool has_avx512_bf16(const CpuInfo& cpu) {
  return has_avx512(cpu) && cpu.avx512bf16;
}

// SAGELLM_KERNELS_<ISA> comes from the build: the folders that its compiler can translate. The
// conditions above are exactly the flags in cmake/isa_kernels.cmake.
constexpr Isa kIsas[] = {
    {"generic", [](const CpuInfo&) { return true; }, fill_matmul_generic, fill_ops_generic,
     fill_probe_loops_generic},
#if defined(SAGELLM_KERNELS_AVX2)
    {"avx2", has_avx2, fill_matmul_avx2, fill_ops_avx2, fill_probe_loops_avx2},
#endif
#if defined(SAGELLM_KERNELS_AVX512)
    {"avx512", has_avx512, fill_matmul_avx512, fill_ops_avx512, fill_probe_loops_avx512},
#endif
#if defined(SAGELLM_KERNELS_AVX512_BF16)
    {"avx512_bf16", has_avx512_bf16, fill_matmul_avx512_bf16, fill_ops_avx512_bf16,
     fill_probe_loops_avx512_bf16},
#endif
};

/// The tables that run here, plainest first.
std::vector<KernelTable> assemble() {
  std::vector<KernelTable> tables;
  KernelTable table{};
  for (const Isa& isa : kIsas) {
    if (!isa.runs_on(cpu_info())) break;
    table.name = isa.name;
    isa.fill_matmul(table);
    isa.fill_ops(table);
    tables.push_back(table);
  }
  return tables;
}

const std::vector<KernelTable>& tables() {
  static const std::vector<KernelTable> all = assemble();
  return all;
}

const KernelTable& choose() {
  const char* wanted = std::getenv("SAGELLM_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return tables().back();
  try {
    return kernel_table(wanted);
  } catch (const Unsupported& error) {
    fail<Unsupported>("SAGELLM_CPU_ISA: ", error.what());
  }
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable& table : tables()) names.emplace_back(table.name);
  return names;
}

const KernelTable& kernel_table() {
  static const KernelTable& chosen = choose();
  return chosen;
}

const KernelTable& kernel_table(std::string_view isa) {
  std::string names;
  for (const KernelTable& table : tables()) {
    if (isa == table.name) return table;
    names += (names.empty() ? "" : ", ") + std::string(table.name);
  }
  fail<Unsupported>("no CPU kernels named '", isa, "' run on this machine; choose one of: ", names);
}

ProbeLoops probe_loops(std::string_view isa) {
  const char* last = kernel_table(isa).name;  // throws when it does not run here
  ProbeLoops loops{};
  for (const Isa& each : kIsas) {
    each.fill_probe_loops(loops);
    if (last == std::string_view(each.name)) break;
  }
  return loops;
}

}  // namespace sagellm::kernels
