// What the processor and the operating system offer to the kernels.
#pragma once

#include <string>
#include <vector>

namespace sagellm::kernels {

/// Instruction-set extensions that the kernels are compiled with. A flag is true when the processor
/// has the instructions and the operating system saves the registers they use.
struct CpuInfo {
  std::string brand;  // "AMD EPYC 9R14", empty where the processor does not say
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512dq = false;
  bool avx512vl = false;
  bool avx512vnni = false;
  bool avx512bf16 = false;

  /// Names of the flags that are true, in the order above.
  std::vector<std::string> features() const;
};

/// Asks the processor once; later calls return the same object.
const CpuInfo& cpu_info();

}  // namespace sagellm::kernels
