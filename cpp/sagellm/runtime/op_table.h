// The operations of every device of this process.
//
// Why this exists beside KernelTable: operations are the whole-tensor door, for tests and Python,
// whereas the CPU decoder fuses phases below it and so calls the kernel table itself. The module
// _cuda brings no table: its kernels take activations and weights that these parameters cannot say.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "sagellm/kernels/op_params.h"
#include "sagellm/tensor/device.h"

namespace sagellm::runtime {

/// One device kind's operations on checked parameters. When a call returns its work is done, or
/// queued on the device in call order; it throws DeviceError when the device fails.
struct OpTable {
  void (*linear)(Device, const kernels::LinearParams&) = nullptr;
  void (*rms_norm)(Device, const kernels::RmsNormParams&) = nullptr;
  void (*rope)(Device, const kernels::RopeParams&) = nullptr;
  void (*gated_activation)(Device, const kernels::GatedActivationParams&) = nullptr;
  void (*kv_write)(Device, const kernels::KvWriteBatchParams&) = nullptr;
  void (*paged_attention)(Device, const kernels::PagedAttentionParams&) = nullptr;
};

/// The table of `device`; throws Unsupported naming what is present when there is none.
const OpTable& op_table(Device device);

/// Device kinds that have a table: the CPU always, others once registered.
std::vector<Device::Kind> device_kinds();

/// Gives `kind` its operations, for the life of the process. May race with lookups and with other
/// registrations; repeating the same registration does nothing. Throws InvalidArgument when an
/// entry is missing or `kind` has another table. A shared object that links its own copy of this
/// library has its own registry: such a module hands its table to `_core`, which registers it.
void register_op_table(Device::Kind kind, const OpTable* table);

/// Tells builds of OpTable and its parameters apart.
constexpr uint64_t op_table_layout() {
  uint64_t layout = 0;
  for (const size_t bytes :
       {sizeof(OpTable), sizeof(kernels::LinearParams), sizeof(kernels::RmsNormParams),
        sizeof(kernels::RopeParams), sizeof(kernels::GatedActivationParams),
        sizeof(kernels::KvWriteBatchParams), sizeof(kernels::PagedAttentionParams)}) {
    layout = layout * 1021 + bytes;
  }
  return layout;
}

/// A table on its way from one module to another: the content of a capsule named
/// kOpTableCapsule.
struct OpTableHandover {
  uint64_t layout = op_table_layout();
  Device::Kind kind = Device::Kind::kCpu;
  const OpTable* table = nullptr;
};
inline constexpr const char* kOpTableCapsule = "sagellm.op_table";

/// Registers what another module hands over; throws InvalidArgument when it was built with other
/// parameters.
void register_op_table(const OpTableHandover& handover);

}  // namespace sagellm::runtime
