#include "sagellm/cuda/attention.h"

#include <algorithm>

#include "sagellm/base/error.h"
#include "sagellm/cuda/stream.h"

namespace sagellm::cuda {
namespace {

using kernels::cuda::AttentionItem;
using kernels::cuda::AttentionKernel;
using kernels::cuda::AttentionLaunch;

AttentionLaunch choose(AttentionKernel kernel, const PagedAttentionOptions& options,
                       const DeviceInfo& device) {
  return kernels::cuda::choose_attention(kernel, options.kv_type, options.plan.head_dim,
                                         device.shared_bytes);
}

AttentionKernel choose_prefill(const PagedAttentionOptions& options, const DeviceInfo& device) {
  const bool able = kernels::cuda::has_warpgroup_attention(options.kv_type, options.plan.head_dim,
                                                           device.major, device.minor);
  if (!options.prefill) return able ? AttentionKernel::kWarpgroup : AttentionKernel::kWide;
  require<InvalidArgument>(*options.prefill != AttentionKernel::kNarrow,
                           "wide items run on the wide or the warpgroup kernel");
  require<Unsupported>(*options.prefill != AttentionKernel::kWarpgroup || able,
                       "the warpgroup kernel needs compute capability 9.0, code for 9.0a in the "
                       "build, 16-bit pages and head_dim of at most ",
                       kernels::cuda::kMaxWarpgroupHeadDim, "; choose the wide kernel");
  return *options.prefill;
}

AttentionPlanOptions on_device(AttentionPlanOptions options, const DeviceInfo& device,
                               const AttentionLaunch& narrow, const AttentionLaunch& wide) {
  const auto blocks = [&](const AttentionLaunch& how) {
    return std::max(1, device.multiprocessors * how.instance.resident(how.shared_bytes));
  };
  options.narrow_ctas = blocks(narrow);
  options.wide_ctas = blocks(wide);
  return options;
}

void grow(DeviceBuffer& buffer, int64_t bytes) {
  if (static_cast<int64_t>(buffer.size()) >= bytes) return;
  buffer = DeviceBuffer();  // the old one goes first
  buffer = DeviceBuffer(static_cast<size_t>(bytes));
}

}  // namespace

void AttentionWorkspace::reserve(const AttentionPlanner& planner, const AttentionCapacity& capacity,
                                 void* stream) {
  const int64_t arrival_bytes = planner.arrival_bytes(capacity.tokens);
  const bool arrivals_grow = static_cast<int64_t>(arrivals_.size()) < arrival_bytes;
  if (arrivals_grow ||
      static_cast<int64_t>(states_.size()) < planner.state_bytes(capacity.states) ||
      static_cast<int64_t>(accumulators_.size()) < planner.accumulator_bytes(capacity.states)) {
    synchronize(stream);
  }
  grow(states_, planner.state_bytes(capacity.states));
  grow(accumulators_, planner.accumulator_bytes(capacity.states));
  grow(arrivals_, arrival_bytes);
  if (arrivals_grow) fill(arrivals_.data(), 0, arrivals_.size(), stream);
}

PagedAttention::PagedAttention(const PagedAttentionOptions& options, const DeviceInfo& device)
    : options_(options),
      narrow_(choose(AttentionKernel::kNarrow, options, device)),
      wide_(choose(choose_prefill(options, device), options, device)),
      planner_(on_device(options.plan, device, narrow_, wide_)) {}

void PagedAttention::run(const AttentionStep& step, const AttentionCapacity& capacity,
                         const AttentionWorkspace& workspace, void* stream) {
  kernels::cuda::AttentionParams p;
  p.q = step.q;
  p.out = step.out;
  p.q_stride = step.q_stride;
  p.out_stride = step.out_stride;
  p.type = options_.type;
  p.group = options_.plan.num_heads / options_.plan.num_kv_heads;
  p.kv.pool = step.pool;
  p.kv.block_stride = step.block_stride;
  p.kv.page_size = options_.plan.page_size;
  p.kv.num_kv_heads = options_.plan.num_kv_heads;
  p.kv.head_dim = options_.plan.head_dim;
  p.kv.type = options_.kv_type;
  p.block_tables = step.block_tables;
  p.block_tables_stride = step.block_tables_stride;
  p.positions = step.positions;
  p.states = workspace.states();
  p.accumulators = workspace.accumulators();
  p.arrivals = workspace.arrivals();
  p.window = options_.plan.window;
  p.scale = options_.scale;
  p.softcap = options_.softcap;

  const AttentionUpload at = planner_.upload_layout(capacity);
  p.work.state_begin = step.upload + at.state_begin;
  p.work.tokens = step.upload + at.tokens;
  const auto start = [&](AttentionKernel kernel, const AttentionLaunch& how, int64_t items,
                         int64_t bins) {
    p.work.items = reinterpret_cast<const AttentionItem*>(step.upload + items);
    p.work.bin_begin = step.upload + bins;
    const bool maps = how.kernel == AttentionKernel::kWarpgroup;
    launch_attention(how, p, maps ? &page_maps_.of(p.kv) : nullptr, planner_.num_bins(kernel),
                     stream);
  };
  if (capacity.wide_items > 0) {
    start(AttentionKernel::kWide, wide_, at.wide_items, at.wide_bins);
  }
  if (capacity.narrow_items > 0) {
    start(AttentionKernel::kNarrow, narrow_, at.narrow_items, at.narrow_bins);
  }
}

}  // namespace sagellm::cuda
