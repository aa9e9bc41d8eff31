// Element-wise operations of a decoder on arrays of a device.
#include <pybind11/pybind11.h>

#include <string>

#include "device_array.h"
#include "sagellm/kernels/cuda/elementwise.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm;                 // NOLINT: a binding file of the core
using namespace sagellm::kernels::cuda;  // NOLINT

/// A matrix of `type`, its rows dense.
struct Rows {
  void* data;
  int64_t rows, columns;
};

Rows rows_of(const DeviceArray& array, FloatType type, const char* name) {
  require<InvalidArgument>(array.shape().size() == 2, name, " has ", array.shape().size(),
                           " axes, must have 2");
  require<InvalidArgument>(array.shape()[1] % 8 == 0, name, " has rows of ", array.shape()[1],
                           " elements, must be a multiple of 8");
  void* data = type == FloatType::kF32
                   ? static_cast<void*>(array.elements<float>(name, array.size()))
                   : array.elements<uint16_t>(name, array.size());
  return {data, array.shape()[0], array.shape()[1]};
}

template <typename T>
T* optional(const DeviceArray* array, const char* name, int64_t count) {
  return array == nullptr ? nullptr : array->elements<T>(name, count);
}

void embed(const DeviceArray& table, const DeviceArray& token_ids, const DeviceArray& out,
           float scale, const std::string& type) {
  const FloatType element = float_type_of(type);
  const Rows from = rows_of(table, element, "table");
  EmbeddingParams p;
  p.table = from.data;
  p.table_stride = p.out_stride = from.columns;
  p.n = static_cast<int32_t>(from.columns);
  p.num_tokens = static_cast<int32_t>(token_ids.size());
  p.token_ids = token_ids.elements<int32_t>("token_ids", p.num_tokens);
  p.out = out.elements<float>("out", from.columns * p.num_tokens);
  p.scale = scale;
  const py::gil_scoped_release release;
  embedding(element, p, nullptr);
}

void add_norm(const DeviceArray& residual, const DeviceArray* delta, const DeviceArray* post_norm,
              const DeviceArray* weight, const DeviceArray* out, const DeviceArray* rows, float eps,
              const std::string& delta_type, const std::string& out_type) {
  const FloatType delta_element = float_type_of(delta_type), out_element = float_type_of(out_type);
  const Rows x = rows_of(residual, FloatType::kF32, "residual");
  require<InvalidArgument>(x.columns <= kMaxNormLength, "rows of ", x.columns,
                           " elements; the kernel takes ", kMaxNormLength);
  require<InvalidArgument>(delta_element == FloatType::kF32 || delta_element == out_element,
                           "delta must be float32 or of the type of out");
  require<InvalidArgument>((out == nullptr) == (weight == nullptr), "weight and out come together");
  AddRmsNormParams p;
  p.residual = static_cast<float*>(x.data);
  p.residual_stride = p.delta_stride = p.out_stride = x.columns;
  p.num_rows = static_cast<int32_t>(rows == nullptr ? x.rows : rows->size());
  p.n = static_cast<int32_t>(x.columns);
  p.eps = eps;
  if (delta != nullptr) {
    const Rows added = rows_of(*delta, delta_element, "delta");
    require<InvalidArgument>(added.rows == x.rows && added.columns == x.columns,
                             "delta and residual differ in shape");
    p.delta = added.data;
  }
  p.post_norm = optional<float>(post_norm, "post_norm", p.n);
  p.weight = optional<float>(weight, "weight", p.n);
  p.rows = optional<int32_t>(rows, "rows", p.num_rows);
  if (out != nullptr) {
    const Rows to = rows_of(*out, out_element, "out");
    require<InvalidArgument>(to.rows >= p.num_rows && to.columns == x.columns,
                             "out is smaller than what is written");
    p.out = to.data;
  }
  const py::gil_scoped_release release;
  add_rms_norm(delta_element, out_element, p, nullptr);
}

void make_rope_table(const DeviceArray& positions, const DeviceArray& frequencies,
                     const DeviceArray& cos, const DeviceArray& sin, float factor) {
  RopeTableParams p;
  p.num_tokens = static_cast<int32_t>(positions.size());
  p.half = static_cast<int32_t>(frequencies.size());
  p.positions = positions.elements<int32_t>("positions", p.num_tokens);
  p.frequencies = frequencies.elements<double>("frequencies", p.half);
  p.cos = cos.elements<float>("cos", int64_t{p.num_tokens} * p.half);
  p.sin = sin.elements<float>("sin", int64_t{p.num_tokens} * p.half);
  p.factor = factor;
  const py::gil_scoped_release release;
  rope_table(p, nullptr);
}

KvType kv_type_of(const std::string& name) {
  if (name == "bfloat16") return KvType::kBF16;
  if (name == "float16") return KvType::kF16;
  if (name == "int8") return KvType::kInt8;
  if (name == "fp8_e4m3") return KvType::kFp8E4M3;
  fail<InvalidArgument>("kv_type is '", name, "', must be bfloat16, float16, int8 or fp8_e4m3");
}

void qkv(const DeviceArray& x, const DeviceArray& cos, const DeviceArray& sin,
         const DeviceArray& slots, const DeviceArray& q, const DeviceArray& pool,
         int64_t slot_offset, int64_t block_stride, int num_heads, int num_kv_heads, int head_dim,
         int page_size, int half, const DeviceArray* bias, const DeviceArray* q_norm,
         const DeviceArray* k_norm, float eps, const std::string& type, const std::string& q_type,
         const std::string& kv_type) {
  const FloatType element = float_type_of(type);
  const Rows from = rows_of(x, element, "qkv");
  QkvParams p;
  const int64_t heads = int64_t{num_heads} + 2 * num_kv_heads;
  require<InvalidArgument>(head_dim % 16 == 0 && head_dim > 0 && head_dim <= 256, "head_dim is ",
                           head_dim, ", must be a multiple of 16 up to 256");
  require<InvalidArgument>(from.columns == heads * head_dim, "qkv has ", from.columns,
                           " columns, must have ", heads * head_dim);
  require<InvalidArgument>(half >= 0 && half % 8 == 0 && 2 * half <= head_dim, "half is ", half,
                           ", must be a multiple of 8 up to head_dim / 2");
  p.qkv = from.data;
  p.stride = from.columns;
  p.num_tokens = static_cast<int32_t>(from.rows);
  p.num_heads = num_heads;
  p.half = half;
  p.eps = eps;
  p.bias = optional<float>(bias, "bias", heads * head_dim);
  p.q_norm = optional<float>(q_norm, "q_norm", head_dim);
  p.k_norm = optional<float>(k_norm, "k_norm", head_dim);
  p.cos = cos.elements<float>("cos", int64_t{half} * from.rows);
  p.sin = sin.elements<float>("sin", int64_t{half} * from.rows);
  p.slots = slots.elements<int32_t>("slots", from.rows);
  p.q_type = float_type_of(q_type);
  p.q_stride = int64_t{num_heads} * head_dim;
  p.q = q.elements<uint16_t>("q", p.q_stride * from.rows);
  p.kv.pool = pool.elements<std::byte>("pool", block_stride) + slot_offset;
  p.kv.block_stride = block_stride;
  p.kv.page_size = page_size;
  p.kv.num_kv_heads = num_kv_heads;
  p.kv.head_dim = head_dim;
  p.kv.type = kv_type_of(kv_type);
  const py::gil_scoped_release release;
  finish_qkv(element, p, nullptr);
}

void gate(const DeviceArray& x, const DeviceArray& out, const std::string& function,
          const std::string& type, const std::string& out_type) {
  const FloatType element = float_type_of(type), out_element = float_type_of(out_type);
  require<InvalidArgument>(element == FloatType::kF32 || element == out_element,
                           "x must be float32 or of the type of out");
  require<InvalidArgument>(function == "silu" || function == "gelu_tanh", "function is '", function,
                           "', must be silu or gelu_tanh");
  const Rows from = rows_of(x, element, "x"), to = rows_of(out, out_element, "out");
  require<InvalidArgument>(from.columns == 2 * to.columns && from.rows == to.rows,
                           "x must have the rows of out and twice its columns");
  GatedParams p;
  p.x = from.data;
  p.x_stride = from.columns;
  p.out = to.data;
  p.out_stride = to.columns;
  p.num_rows = static_cast<int32_t>(to.rows);
  p.n = static_cast<int32_t>(to.columns);
  p.function = function == "silu" ? GateFunction::kSilu : GateFunction::kGeluTanh;
  const py::gil_scoped_release release;
  gated_activation(element, out_element, p, nullptr);
}

void cap(const DeviceArray& x, float value) {
  require<InvalidArgument>(x.size() % 8 == 0, "x has ", x.size(), " elements, not a multiple of 8");
  const SoftcapParams p{x.elements<float>("x", x.size()), x.size(), value};
  const py::gil_scoped_release release;
  softcap(p, nullptr);
}

void convert_array(const DeviceArray& from, const DeviceArray& to, const std::string& from_type,
                   const std::string& to_type) {
  const FloatType source = float_type_of(from_type), target = float_type_of(to_type);
  require<InvalidArgument>((source == FloatType::kF32) != (target == FloatType::kF32),
                           "one type must be float32, the other of 16 bits");
  require<InvalidArgument>(from.size() == to.size() && from.size() % 8 == 0,
                           "the arrays must have equal sizes, a multiple of 8");
  const auto data = [](const DeviceArray& array, FloatType type, const char* name) -> void* {
    if (type == FloatType::kF32) return array.elements<float>(name, array.size());
    return array.elements<uint16_t>(name, array.size());
  };
  const ConvertParams p{data(from, source, "from"), data(to, target, "to"), from.size()};
  const py::gil_scoped_release release;
  convert(source, target, p, nullptr);
}

}  // namespace

void register_elementwise(py::module_& m) {
  m.def("embedding", &embed, "table"_a, "token_ids"_a, "out"_a, "scale"_a = 1.0f,
        "type"_a = "bfloat16", "out[t] = table[token_ids[t]] * scale, float32.");
  m.def("add_rms_norm", &add_norm, "residual"_a, py::kw_only(), "delta"_a = py::none(),
        "post_norm"_a = py::none(), "weight"_a = py::none(), "out"_a = py::none(),
        "rows"_a = py::none(), "eps"_a = 1e-5f, "delta_type"_a = "bfloat16",
        "out_type"_a = "bfloat16",
        "Adds delta, normalised when post_norm is given, to the residual, and normalises that "
        "into out.");
  m.def("rope_table", &make_rope_table, "positions"_a, "frequencies"_a, "cos"_a, "sin"_a,
        "factor"_a = 1.0f, "cos and sin [tokens, half] of positions times frequencies (float64).");
  m.def("finish_qkv", &qkv, "qkv"_a, "cos"_a, "sin"_a, "slots"_a, "q"_a, "pool"_a, py::kw_only(),
        "slot_offset"_a, "block_stride"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
        "page_size"_a, "half"_a, "bias"_a = py::none(), "q_norm"_a = py::none(),
        "k_norm"_a = py::none(), "eps"_a = 1e-5f, "type"_a = "bfloat16", "q_type"_a = "bfloat16",
        "kv_type"_a = "bfloat16",
        "Bias, norms and rotation of a fused projection; q to its array, K and V to the slots of "
        "the pages.");
  m.def("gated_activation", &gate, "x"_a, "out"_a, "function"_a = "silu", "type"_a = "bfloat16",
        "out_type"_a = "bfloat16", "out = f(x[:, :n]) * x[:, n:].");
  m.def("softcap", &cap, "x"_a, "cap"_a, "x = cap * tanh(x / cap), in place, float32.");
  m.def("convert", &convert_array, "source"_a, "target"_a, "source_type"_a, "target_type"_a,
        "Between float32 and bfloat16 or float16.");
}
