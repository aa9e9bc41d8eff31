// _core.kernels: attention and element-wise kernels of any instruction set this machine runs, for
// tests and benchmarks.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/kernels/cpu/dispatch.h"
#include "sagellm/kernels/params.h"
#include "sagellm/tensor/buffer.h"

namespace py = pybind11;

namespace {

using namespace sagellm;  // NOLINT: a binding file of the core

using FloatArray = py::array_t<float, py::array::c_style>;
using IntArray = py::array_t<int32_t, py::array::c_style>;
using HalfArray = py::array_t<uint16_t, py::array::c_style>;
using CodeArray = py::array_t<int8_t, py::array::c_style>;

void require_same_size(const FloatArray& a, const FloatArray& b, const char* what) {
  require<InvalidArgument>(a.size() == b.size(), what, ": the arrays have ", a.size(), " and ",
                           b.size(), " elements");
}

FloatArray like(const FloatArray& x) {
  return FloatArray(py::array::ShapeContainer(x.shape(), x.shape() + x.ndim()));
}

/// The page geometry of a test pool, checked against the pool's size and a block table. The pool's
/// element type is the KV dtype: uint16 for bf16, int8 for int8; strides count elements.
kernels::KvView make_view(py::array& pool, const IntArray& block_table, int kv_head,
                          int64_t block_stride, int64_t head_stride, int block_size, int head_dim,
                          int64_t num_positions) {
  require<InvalidArgument>(head_dim > 0 && head_dim % 16 == 0 && head_dim <= kernels::kMaxHeadDim,
                           "head_dim is ", head_dim, ", must be a multiple of 16 up to ",
                           kernels::kMaxHeadDim);
  require<InvalidArgument>(block_size > 0 && block_size % kernels::kSubPage == 0, "block_size is ",
                           block_size, ", must be a positive multiple of ", kernels::kSubPage);
  require<InvalidArgument>(kv_head >= 0 && block_stride >= 0 && head_stride >= 0,
                           "kv_head and strides must not be negative");
  require<InvalidArgument>(
      block_table.ndim() == 1 && block_table.size() * block_size >= num_positions,
      "the block table holds ", block_table.size() * block_size, " positions, ", num_positions,
      " are needed");
  const bool bf16 = py::isinstance<HalfArray>(pool);
  require<InvalidArgument>(bf16 || py::isinstance<CodeArray>(pool),
                           "the pool must be an array of uint16 (bf16) or int8");
  kernels::KvView view;
  view.dtype = bf16 ? kernels::KvDtype::kBF16 : kernels::KvDtype::kI8;
  view.sub_page_bytes = static_cast<int32_t>(kernels::kv_sub_page_bytes(view.dtype, head_dim));
  view.block_size = block_size;
  view.head_dim = head_dim;
  const int64_t page = block_size / kernels::kSubPage * view.sub_page_bytes / pool.itemsize();
  for (py::ssize_t i = 0; i < block_table.size(); ++i) {
    const int64_t block = block_table.at(i);
    require<InvalidArgument>(
        block >= 0 && block * block_stride + kv_head * head_stride + page <= pool.size(), "block ",
        block, " of the block table is outside the pool of ", pool.size(), " elements");
  }
  view.pool = static_cast<uint8_t*>(pool.mutable_data());
  view.block_stride = block_stride * pool.itemsize();
  view.head_stride = head_stride * pool.itemsize();
  return view;
}

py::tuple run_attention(const std::string& isa, const FloatArray& q, py::array& pool,
                        const IntArray& block_table, int kv_head, int64_t block_stride,
                        int64_t head_stride, int block_size, int first_position,
                        std::pair<int, int> splits, int window, float scale, float softcap) {
  require<InvalidArgument>(q.ndim() == 3 && q.shape(0) > 0 && q.shape(1) > 0,
                           "q must have shape [tokens, group, head_dim]");
  require<InvalidArgument>(first_position >= 0 && window >= 0,
                           "first_position and window must not be negative");
  require<InvalidArgument>(splits.first >= 0 && splits.first <= splits.second,
                           "splits must be an ascending pair");
  const auto& table = kernels::kernel_table(isa);
  const int64_t rows = q.shape(0) * q.shape(1), head_dim = q.shape(2);
  FloatArray m(rows), l(rows), acc({rows, head_dim});
  kernels::AttentionParams p;
  p.kv = make_view(pool, block_table, kv_head, block_stride, head_stride, block_size,
                   static_cast<int>(head_dim), first_position + q.shape(0));
  p.kv_head = kv_head;
  p.block_table = block_table.data();
  p.q = q.data();
  p.q_stride = q.shape(1) * head_dim;
  p.group = static_cast<int32_t>(q.shape(1));
  p.num_tokens = static_cast<int32_t>(q.shape(0));
  p.first_position = first_position;
  p.split_begin = splits.first;
  p.split_end = splits.second;
  p.window = window;
  p.scale = scale;
  p.softcap = softcap;
  p.m = m.mutable_data();
  p.l = l.mutable_data();
  p.acc = acc.mutable_data();
  Buffer scratch(table.attention_scratch_bytes);
  p.scratch = scratch.data();
  {
    py::gil_scoped_release release;
    table.attention(p);
  }
  return py::make_tuple(m, l, acc);
}

FloatArray run_attention_finish(const std::string& isa, const FloatArray& m, const FloatArray& l,
                                const FloatArray& acc) {
  require<InvalidArgument>(m.ndim() == 2 && l.ndim() == 2 && acc.ndim() == 3 &&
                               l.shape(0) == m.shape(0) && l.shape(1) == m.shape(1) &&
                               acc.shape(0) == m.shape(0) && acc.shape(1) == m.shape(1) &&
                               acc.shape(2) % 16 == 0,
                           "m and l must have shape [states, rows], acc [states, rows, head_dim]");
  FloatArray out({acc.shape(1), acc.shape(2)});
  kernels::AttentionFinishParams p;
  p.m = m.data();
  p.l = l.data();
  p.acc = acc.data();
  p.count = static_cast<int32_t>(m.shape(0));
  p.rows = static_cast<int32_t>(m.shape(1));
  p.head_dim = static_cast<int32_t>(acc.shape(2));
  p.out = out.mutable_data();
  p.out_stride = acc.shape(2);
  kernels::kernel_table(isa).attention_finish(p);
  return out;
}

void run_kv_write(const std::string& isa, py::array& pool, const IntArray& block_table,
                  const FloatArray& k, const FloatArray& v, int kv_head, int64_t block_stride,
                  int64_t head_stride, int block_size, int first_position) {
  require<InvalidArgument>(
      k.ndim() == 2 && v.ndim() == 2 && k.shape(0) == v.shape(0) && k.shape(1) == v.shape(1),
      "k and v must both have shape [tokens, head_dim]");
  require<InvalidArgument>(first_position >= 0, "first_position must not be negative");
  kernels::KvWriteParams p;
  p.kv = make_view(pool, block_table, kv_head, block_stride, head_stride, block_size,
                   static_cast<int>(k.shape(1)), first_position + k.shape(0));
  p.kv_head = kv_head;
  p.block_table = block_table.data();
  p.first_position = first_position;
  p.num_tokens = static_cast<int32_t>(k.shape(0));
  p.k = k.data();
  p.v = v.data();
  p.stride = k.shape(1);
  kernels::kernel_table(isa).kv_write(p);
}

FloatArray run_rms_norm(const std::string& isa, const FloatArray& x, const FloatArray& weight,
                        float eps) {
  require_same_size(x, weight, "rms_norm");
  FloatArray out = like(x);
  kernels::kernel_table(isa).rms_norm(x.data(), weight.data(), eps, x.size(), out.mutable_data());
  return out;
}

FloatArray run_layer_norm(const std::string& isa, const FloatArray& x, const FloatArray& weight,
                          const FloatArray& bias, float eps) {
  require_same_size(x, weight, "layer_norm");
  require_same_size(x, bias, "layer_norm");
  require<InvalidArgument>(x.size() > 0, "layer_norm of no values");
  FloatArray out = like(x);
  kernels::kernel_table(isa).layer_norm(x.data(), weight.data(), bias.data(), eps, x.size(),
                                        out.mutable_data());
  return out;
}

FloatArray run_softmax(const std::string& isa, const FloatArray& x) {
  require<InvalidArgument>(x.size() > 0, "softmax of no values");
  FloatArray out = like(x);
  std::copy_n(x.data(), x.size(), out.mutable_data());
  kernels::kernel_table(isa).softmax(out.mutable_data(), out.size());
  return out;
}

FloatArray run_rope(const std::string& isa, const FloatArray& x, const FloatArray& cos,
                    const FloatArray& sin) {
  require_same_size(cos, sin, "rope");
  require<InvalidArgument>(x.size() == 2 * cos.size(),
                           "rope: x must have twice as many elements as cos");
  FloatArray out = like(x);
  std::copy_n(x.data(), x.size(), out.mutable_data());
  kernels::kernel_table(isa).rope(out.mutable_data(), cos.data(), sin.data(), x.size());
  return out;
}

using BinaryEntry = void (*kernels::KernelTable::*)(const float*, const float*, int64_t, float*);

FloatArray run_binary(BinaryEntry entry, const std::string& isa, const FloatArray& a,
                      const FloatArray& b) {
  require_same_size(a, b, "binary kernel");
  FloatArray out = like(a);
  (kernels::kernel_table(isa).*entry)(a.data(), b.data(), a.size(), out.mutable_data());
  return out;
}

HalfArray run_to_bf16(const std::string& isa, const FloatArray& x) {
  HalfArray out(py::array::ShapeContainer(x.shape(), x.shape() + x.ndim()));
  kernels::kernel_table(isa).to_bf16(x.data(), out.mutable_data(), x.size());
  return out;
}

FloatArray run_scaled(bool softcap, const std::string& isa, const FloatArray& x, float value) {
  FloatArray out = like(x);
  std::copy_n(x.data(), x.size(), out.mutable_data());
  const auto& table = kernels::kernel_table(isa);
  if (softcap) {
    table.softcap(out.mutable_data(), value, x.size());
  } else {
    table.scale(out.mutable_data(), value, x.size());
  }
  return out;
}

py::tuple run_argmax(const std::string& isa, const FloatArray& x) {
  require<InvalidArgument>(x.size() > 0, "argmax of an empty array");
  float value = 0;
  int32_t index = 0;
  kernels::kernel_table(isa).argmax(x.data(), x.size(), &value, &index);
  return py::make_tuple(value, index);
}

py::tuple run_sampling_weights(const std::string& isa, const FloatArray& x, double largest,
                               double rate, float cut) {
  py::array_t<double> weights(x.size());
  const double sum = kernels::kernel_table(isa).sampling_weights(x.data(), x.size(), largest, rate,
                                                                 cut, weights.mutable_data());
  return py::make_tuple(sum, weights);
}

}  // namespace

void register_kernels_ops(py::module_& m) {
  py::module_ k =
      m.def_submodule("kernels", "Kernels by instruction set, for tests and benchmarks.");
  k.def("attention", &run_attention, py::arg("isa"), py::arg("q").noconvert(),
        py::arg("pool").noconvert(), py::arg("block_table").noconvert(), py::kw_only(),
        py::arg("kv_head"), py::arg("block_stride"), py::arg("head_stride"), py::arg("block_size"),
        py::arg("first_position"), py::arg("splits"), py::arg("window") = 0, py::arg("scale") = 1.f,
        py::arg("softcap") = 0.f,
        "Runs AttentionParams for q [tokens, group, head_dim]; returns the states (m, l, acc).");
  k.def("attention_finish", &run_attention_finish, py::arg("isa"), py::arg("m").noconvert(),
        py::arg("l").noconvert(), py::arg("acc").noconvert(),
        "Merges states [states, rows(, head_dim)]; returns [rows, head_dim].");
  k.def("kv_write", &run_kv_write, py::arg("isa"), py::arg("pool").noconvert(),
        py::arg("block_table").noconvert(), py::arg("k").noconvert(), py::arg("v").noconvert(),
        py::kw_only(), py::arg("kv_head"), py::arg("block_stride"), py::arg("head_stride"),
        py::arg("block_size"), py::arg("first_position"));
  k.def("rms_norm", &run_rms_norm, py::arg("isa"), py::arg("x").noconvert(),
        py::arg("weight").noconvert(), py::arg("eps"));
  k.def("rope", &run_rope, py::arg("isa"), py::arg("x").noconvert(), py::arg("cos").noconvert(),
        py::arg("sin").noconvert());
  const auto binary = [&k](const char* name, BinaryEntry entry) {
    k.def(
        name,
        [entry](const std::string& isa, const FloatArray& a, const FloatArray& b) {
          return run_binary(entry, isa, a, b);
        },
        py::arg("isa"), py::arg("a").noconvert(), py::arg("b").noconvert());
  };
  binary("add", &kernels::KernelTable::add);
  binary("silu_mul", &kernels::KernelTable::silu_mul);
  binary("gelu_tanh_mul", &kernels::KernelTable::gelu_tanh_mul);
  binary("bias_gelu", &kernels::KernelTable::bias_gelu);
  k.def("layer_norm", &run_layer_norm, py::arg("isa"), py::arg("x").noconvert(),
        py::arg("weight").noconvert(), py::arg("bias").noconvert(), py::arg("eps"));
  k.def("softmax", &run_softmax, py::arg("isa"), py::arg("x").noconvert());
  k.def(
      "scale",
      [](const std::string& isa, const FloatArray& x, float factor) {
        return run_scaled(false, isa, x, factor);
      },
      py::arg("isa"), py::arg("x").noconvert(), py::arg("factor"));
  k.def(
      "softcap",
      [](const std::string& isa, const FloatArray& x, float cap) {
        return run_scaled(true, isa, x, cap);
      },
      py::arg("isa"), py::arg("x").noconvert(), py::arg("cap"));
  k.def("to_bf16", &run_to_bf16, py::arg("isa"), py::arg("x").noconvert());
  k.def("argmax", &run_argmax, py::arg("isa"), py::arg("x").noconvert());
  k.def(
      "sum_exp",
      [](const std::string& isa, const FloatArray& x, float max) {
        return kernels::kernel_table(isa).sum_exp(x.data(), max, x.size());
      },
      py::arg("isa"), py::arg("x").noconvert(), py::arg("max"));
  k.def("sampling_weights", &run_sampling_weights, py::arg("isa"), py::arg("x").noconvert(),
        py::arg("largest"), py::arg("rate"), py::arg("cut"), "Returns (sum, weights).");
}
