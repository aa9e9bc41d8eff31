// Attention of one kind of layer on a device: its plan of a step and its launches.
#pragma once

#include <optional>
#include <span>

#include "sagellm/cuda/attention_plan.h"
#include "sagellm/cuda/memory.h"
#include "sagellm/cuda/probe.h"
#include "sagellm/cuda/tensor_map.h"
#include "sagellm/kernels/cuda/attention_launch.h"

namespace sagellm::cuda {

/// Partial results of steps, for all layers of a model: launches on one stream take turns with it.
class AttentionWorkspace {
 public:
  /// Grows to what a plan within `capacity` needs. Waits for `stream`, so not while capturing.
  void reserve(const AttentionPlanner& planner, const AttentionCapacity& capacity, void* stream);

  float* states() const { return states_.as<float>(); }
  float* accumulators() const { return accumulators_.as<float>(); }
  int32_t* arrivals() const { return arrivals_.as<int32_t>(); }
  size_t bytes() const { return states_.size() + accumulators_.size() + arrivals_.size(); }

 private:
  DeviceBuffer states_;
  DeviceBuffer accumulators_;
  DeviceBuffer arrivals_;  // zero between launches
};

struct PagedAttentionOptions {
  AttentionPlanOptions plan;  // narrow_ctas and wide_ctas are found out
  kernels::cuda::FloatType type = kernels::cuda::FloatType::kBF16;
  kernels::cuda::KvType kv_type = kernels::cuda::KvType::kBF16;
  float scale = 1.f;
  float softcap = 0.f;
  /// kWide or kWarpgroup for the wide items, to compare them; by itself the faster that can run.
  std::optional<kernels::cuda::AttentionKernel> prefill;
};

/// One layer of a step.
struct AttentionStep {
  const void* q = nullptr;
  int64_t q_stride = 0;  // in elements
  void* out = nullptr;
  int64_t out_stride = 0;
  std::byte* pool = nullptr;  // the layer's slot of block 0
  int64_t block_stride = 0;   // bytes
  // Device memory, written once a step.
  const int32_t* block_tables = nullptr;
  int64_t block_tables_stride = 0;
  const int32_t* positions = nullptr;
  const int32_t* upload = nullptr;  // what planner().write_upload wrote
};

class PagedAttention {
 public:
  /// Chooses kernels for the current device. Throws InvalidArgument or Unsupported.
  PagedAttention(const PagedAttentionOptions& options, const DeviceInfo& device);

  AttentionPlanner& planner() { return planner_; }
  const AttentionPlanner& planner() const { return planner_; }
  /// What wide items run on.
  kernels::cuda::AttentionKernel prefill_kernel() const { return wide_.kernel; }

  /// Queues the layer on `stream`. Pointers and grids depend on `capacity` alone, so that a
  /// captured call serves every later plan within it; a kernel without capacity for items is not
  /// launched.
  void run(const AttentionStep& step, const AttentionCapacity& capacity,
           const AttentionWorkspace& workspace, void* stream);

 private:
  PagedAttentionOptions options_;
  kernels::cuda::AttentionLaunch narrow_;
  kernels::cuda::AttentionLaunch wide_;
  AttentionPlanner planner_;
  PageMaps page_maps_;  // of kWarpgroup
};

}  // namespace sagellm::cuda
