#include "sagellm/kernels/cpu/cpu_info.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sagellm::kernels {
namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

/// One CPUID leaf; zeros where the processor does not have it.
Registers cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool bit(uint32_t value, int index) { return (value >> index & 1) != 0; }

/// Register state that the operating system saves (XCR0). Call only when OSXSAVE is set.
uint64_t saved_state() {
  uint32_t low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

std::string brand_string() {
  if (cpuid(0x80000000u).a < 0x80000004u) return {};
  char text[49] = {};
  for (uint32_t i = 0; i < 3; ++i) {
    const Registers r = cpuid(0x80000002u + i);
    std::memcpy(text + 16 * i, &r, 16);
  }
  std::string brand = text;
  const size_t first = brand.find_first_not_of(' ');
  if (first == std::string::npos) return {};
  return brand.substr(first, brand.find_last_not_of(' ') - first + 1);
}

CpuInfo detect() {
  CpuInfo info;
  info.brand = brand_string();
  const Registers one = cpuid(1);
  if (!bit(one.c, 27) || !bit(one.c, 28)) return info;  // OSXSAVE, AVX
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6;
  const uint64_t saved = saved_state();
  const bool ymm = (saved & kYmm) == kYmm;
  const bool zmm = (saved & kZmm) == kZmm;
  const Registers seven = cpuid(7);
  const Registers seven_one = seven.a >= 1 ? cpuid(7, 1) : Registers{};
  info.avx2 = ymm && bit(seven.b, 5);
  info.fma = ymm && bit(one.c, 12);
  info.f16c = ymm && bit(one.c, 29);
  info.avx512f = zmm && bit(seven.b, 16);
  info.avx512bw = zmm && bit(seven.b, 30);
  info.avx512dq = zmm && bit(seven.b, 17);
  info.avx512vl = zmm && bit(seven.b, 31);
  info.avx512vnni = zmm && bit(seven.c, 11);
  info.avx512bf16 = zmm && bit(seven_one.a, 5);
  return info;
}

#else

CpuInfo detect() { return {}; }

#endif

}  // namespace

std::vector<std::string> CpuInfo::features() const {
  const struct {
    const char* name;
    bool present;
  } flags[] = {{"avx2", avx2},
               {"fma", fma},
               {"f16c", f16c},
               {"avx512f", avx512f},
               {"avx512bw", avx512bw},
               {"avx512dq", avx512dq},
               {"avx512vl", avx512vl},
               {"avx512vnni", avx512vnni},
               {"avx512bf16", avx512bf16}};
  std::vector<std::string> names;
  for (const auto& flag : flags) {
    if (flag.present) names.emplace_back(flag.name);
  }
  return names;
}

const CpuInfo& cpu_info() {
  static const CpuInfo info = detect();
  return info;
}

}  // namespace sagellm::kernels
