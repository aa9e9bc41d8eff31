#include "sagellm/runtime/op_table.h"

#include <array>
#include <atomic>
#include <string>

#include "sagellm/base/error.h"
#include "sagellm/kernels/cpu/dispatch.h"
#include "sagellm/kernels/cpu/ops_cpu.h"

namespace sagellm::runtime {

namespace {

/// An entry that runs `Op` with the kernels chosen for this machine.
template <auto Op, typename Params>
void on_cpu(Device, const Params& params) {
  Op(kernels::kernel_table(), params);
}

constexpr OpTable kCpuTable{
    .linear = on_cpu<kernels::cpu::linear>,
    .rms_norm = on_cpu<kernels::cpu::rms_norm>,
    .rope = on_cpu<kernels::cpu::rope>,
    .gated_activation = on_cpu<kernels::cpu::gated_activation>,
    .kv_write = on_cpu<kernels::cpu::kv_write>,
    .paged_attention = on_cpu<kernels::cpu::paged_attention>,
};

/// One slot per kind, written at most once.
using Registry = std::array<std::atomic<const OpTable*>, kNumDeviceKinds>;

Registry& registry() {
  static Registry slots{&kCpuTable};
  return slots;
}

std::atomic<const OpTable*>& slot(Device::Kind kind) {
  return registry()[static_cast<size_t>(kind)];
}

}  // namespace

const OpTable& op_table(Device device) {
  const OpTable* table = slot(device.kind).load(std::memory_order_acquire);
  if (table == nullptr) {
    std::string present;
    for (const Device::Kind kind : device_kinds()) {
      present += present.empty() ? "" : ", ";
      present += device_kind_name(kind);
    }
    fail<Unsupported>("no operations for device ", to_string(device),
                      " in this process; present: ", present);
  }
  return *table;
}

std::vector<Device::Kind> device_kinds() {
  std::vector<Device::Kind> kinds;
  for (int i = 0; i < kNumDeviceKinds; ++i) {
    const auto kind = static_cast<Device::Kind>(i);
    if (slot(kind).load(std::memory_order_acquire) != nullptr) kinds.push_back(kind);
  }
  return kinds;
}

void register_op_table(Device::Kind kind, const OpTable* table) {
  require<InvalidArgument>(table != nullptr && table->linear != nullptr &&
                               table->rms_norm != nullptr && table->rope != nullptr &&
                               table->gated_activation != nullptr && table->kv_write != nullptr &&
                               table->paged_attention != nullptr,
                           "the operation table for ", device_kind_name(kind), " is incomplete");
  const OpTable* present = nullptr;
  if (slot(kind).compare_exchange_strong(present, table, std::memory_order_acq_rel)) return;
  require<InvalidArgument>(present == table, "device kind ", device_kind_name(kind),
                           " already has an operation table");
}

void register_op_table(const OpTableHandover& handover) {
  require<InvalidArgument>(handover.layout == op_table_layout(),
                           "the operation table comes from another version of sagellm; install "
                           "modules that were built together");
  register_op_table(handover.kind, handover.table);
}

}  // namespace sagellm::runtime
