// Paged attention on arrays of a device.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "device_array.h"
#include "sagellm/cuda/attention.h"
#include "sagellm/cuda/stream.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm;  // NOLINT: a binding file of the core
using Indices = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using kernels::cuda::AttentionKernel;
using kernels::cuda::KvType;

KvType kv_type_of(const std::string& name) {
  if (name == "bfloat16") return KvType::kBF16;
  if (name == "float16") return KvType::kF16;
  if (name == "int8") return KvType::kInt8;
  if (name == "fp8_e4m3") return KvType::kFp8E4M3;
  fail<InvalidArgument>("kv_type is '", name, "', must be bfloat16, float16, int8 or fp8_e4m3");
}

std::optional<AttentionKernel> prefill_kernel_of(const std::string& name) {
  if (name == "auto") return std::nullopt;
  if (name == "wide") return AttentionKernel::kWide;
  if (name == "warpgroup") return AttentionKernel::kWarpgroup;
  fail<InvalidArgument>("prefill_kernel is '", name, "', must be auto, wide or warpgroup");
}

std::span<const int32_t> values_of(const Indices& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

/// A layer kind, its workspace and the plan of the present step.
class Attention {
 public:
  explicit Attention(const cuda::PagedAttentionOptions& options)
      : options_(options), attention_(options, cuda::device_info(0)) {}

  void plan(const Indices& query_starts, const Indices& positions, const Indices& block_tables) {
    require<InvalidArgument>(block_tables.ndim() == 2, "block_tables must have 2 axes");
    attention_.planner().plan({values_of(query_starts), values_of(positions),
                               values_of(block_tables), block_tables.shape(1)});
    capacity_ = attention_.planner().required();
    const cuda::AttentionUpload at = attention_.planner().upload_layout(capacity_);
    std::vector<int32_t> words(static_cast<size_t>(at.words));
    attention_.planner().write_upload(capacity_, words);
    const auto upload = [](cuda::DeviceBuffer& buffer, std::span<const int32_t> values) {
      buffer = cuda::DeviceBuffer(values.size_bytes());
      cuda::copy_to_device(buffer.data(), values.data(), values.size_bytes(), nullptr);
    };
    upload(upload_, words);
    upload(positions_, values_of(positions));
    upload(block_tables_, values_of(block_tables));
    cuda::synchronize(nullptr);
    block_tables_stride_ = block_tables.shape(1);
    num_blocks_ = 0;
    for (const int32_t block : values_of(block_tables)) {
      num_blocks_ = std::max(num_blocks_, int64_t{block} + 1);
    }
    workspace_.reserve(attention_.planner(), capacity_, nullptr);
  }

  void run(const DeviceArray& q, const DeviceArray& pool, int64_t slot_offset, int64_t block_stride,
           DeviceArray& out) {
    attention_.run(step(q, pool, slot_offset, block_stride, out), capacity_, workspace_, nullptr);
  }

  /// Milliseconds per launch, one value for each replay of a graph of one launch per pool.
  std::vector<float> time(const DeviceArray& q, const std::vector<const DeviceArray*>& pools,
                          int64_t slot_offset, int64_t block_stride, DeviceArray& out,
                          int replays) {
    require<InvalidArgument>(!pools.empty() && replays > 0, "pools and replays must not be empty");
    cuda::synchronize(nullptr);
    const cuda::Stream stream;
    const cuda::Graph graph(stream, [&] {
      for (const DeviceArray* pool : pools) {
        attention_.run(step(q, *pool, slot_offset, block_stride, out), capacity_, workspace_,
                       stream.get());
      }
    });
    graph.launch(stream);  // warms up
    std::vector<float> times;
    for (int i = 0; i < replays; ++i) {
      cuda::Event begin(true);
      cuda::Event end(true);
      begin.record(stream);
      graph.launch(stream);
      end.record(stream);
      end.synchronize();
      times.push_back(cuda::Event::elapsed_ms(begin, end) / static_cast<float>(pools.size()));
    }
    return times;
  }

  py::dict describe() const {
    const cuda::AttentionPlanner& planner = attention_.planner();
    return py::dict(
        "narrow_items"_a = planner.items(AttentionKernel::kNarrow).size(),
        "wide_items"_a = planner.items(AttentionKernel::kWide).size(),
        "narrow_bins"_a = planner.num_bins(AttentionKernel::kNarrow),
        "wide_bins"_a = planner.num_bins(AttentionKernel::kWide), "states"_a = planner.num_states(),
        "prefill_kernel"_a =
            attention_.prefill_kernel() == AttentionKernel::kWarpgroup ? "warpgroup" : "wide");
  }

 private:
  cuda::AttentionStep step(const DeviceArray& q, const DeviceArray& pool, int64_t slot_offset,
                           int64_t block_stride, DeviceArray& out) const {
    const auto& plan = options_.plan;
    const int64_t count = capacity_.tokens * plan.num_heads * plan.head_dim;
    const int64_t slot = kernels::cuda::kv_slot_bytes(options_.kv_type, plan.page_size,
                                                      plan.num_kv_heads, plan.head_dim);
    require<InvalidArgument>(slot_offset >= 0 && slot_offset + slot <= block_stride, "a slot of ",
                             slot, " bytes at ", slot_offset, " does not fit in a block of ",
                             block_stride);
    cuda::AttentionStep step;
    step.q = q.elements<uint16_t>("q", count);
    step.out = out.elements<uint16_t>("out", count);
    step.q_stride = step.out_stride = int64_t{plan.num_heads} * plan.head_dim;
    step.pool = pool.elements<std::byte>("pool", num_blocks_ * block_stride) + slot_offset;
    step.block_stride = block_stride;
    step.block_tables = block_tables_.as<int32_t>();
    step.block_tables_stride = block_tables_stride_;
    step.positions = positions_.as<int32_t>();
    step.upload = upload_.as<int32_t>();
    return step;
  }

  cuda::PagedAttentionOptions options_;
  cuda::PagedAttention attention_;
  cuda::AttentionWorkspace workspace_;
  cuda::AttentionCapacity capacity_;
  cuda::DeviceBuffer upload_;
  cuda::DeviceBuffer positions_;
  cuda::DeviceBuffer block_tables_;
  int64_t block_tables_stride_ = 0;
  int64_t num_blocks_ = 0;
};

std::unique_ptr<Attention> make_attention(int num_heads, int num_kv_heads, int head_dim,
                                          int page_size, const std::string& type,
                                          const std::string& kv_type, float scale, int window,
                                          float softcap, bool deterministic, int cascade_tokens,
                                          int cascade_sequences,
                                          const std::string& prefill_kernel) {
  cuda::PagedAttentionOptions options;
  options.plan.num_heads = num_heads;
  options.plan.num_kv_heads = num_kv_heads;
  options.plan.head_dim = head_dim;
  options.plan.page_size = page_size;
  options.plan.window = window;
  options.plan.deterministic = deterministic;
  options.plan.cascade_tokens = cascade_tokens;
  options.plan.cascade_sequences = cascade_sequences;
  options.type = float_type_of(type);
  options.kv_type = kv_type_of(kv_type);
  options.scale = scale;
  options.softcap = softcap;
  options.prefill = prefill_kernel_of(prefill_kernel);
  return std::make_unique<Attention>(options);
}

}  // namespace

void register_attention(py::module_& m) {
  m.def(
      "kv_slot_bytes",
      [](const std::string& kv_type, int page_size, int num_kv_heads, int head_dim) {
        return kernels::cuda::kv_slot_bytes(kv_type_of(kv_type), page_size, num_kv_heads, head_dim);
      },
      "kv_type"_a, "page_size"_a, "num_kv_heads"_a, "head_dim"_a,
      "Bytes of one layer in one block.");
  py::class_<Attention>(m, "PagedAttention", py::module_local(),
                        "Attention of one kind of layer over pages in device memory.")
      .def(
          py::init(&make_attention), py::kw_only(), "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
          "page_size"_a, "type"_a = "bfloat16", "kv_type"_a = "bfloat16", "scale"_a = 1.0f,
          "window"_a = 0, "softcap"_a = 0.0f, "deterministic"_a = false, "cascade_tokens"_a = 1024,
          "cascade_sequences"_a = 8, "prefill_kernel"_a = "auto",
          "prefill_kernel: 'wide' or 'warpgroup' to compare them, 'auto' for the faster that runs.")
      .def("plan", &Attention::plan, "query_starts"_a, "positions"_a, "block_tables"_a,
           "Plans a step: query_starts [sequences + 1], positions [tokens], block_tables "
           "[sequences, blocks].")
      .def("run", &Attention::run, "q"_a, "pool"_a, "slot_offset"_a, "block_stride"_a, "out"_a,
           "Queues the planned step: q and out [tokens, heads * head_dim], 16 bits; pool is bytes, "
           "block b's slot at b * block_stride + slot_offset.")
      .def("time", &Attention::time, "q"_a, "pools"_a, "slot_offset"_a, "block_stride"_a, "out"_a,
           "replays"_a,
           "Milliseconds per launch, for each replay of a graph that runs once with every pool.")
      .def_property_readonly("described", &Attention::describe,
                             "Sizes of the present plan, for tests and benchmarks.");
}
