// sagellm._core.ops: whole-tensor operations on NumPy arrays, for tests and for Python callers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "sagellm/base/error.h"
#include "sagellm/kv/kv_storage.h"
#include "sagellm/ops/gated_activation.h"
#include "sagellm/ops/kv_write.h"
#include "sagellm/ops/linear.h"
#include "sagellm/ops/paged_attention.h"
#include "sagellm/ops/rms_norm.h"
#include "sagellm/ops/rope.h"
#include "sagellm/quant/pack.h"
#include "sagellm/tensor/view.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm;  // NOLINT: a binding file of the core

using Floats = py::array_t<float, py::array::c_style>;
using Indices = py::array_t<int32_t, py::array::c_style>;

/// `View` of an array; extents are checked by the operation, only the number of axes here.
template <typename View, typename Array, typename Pointer>
View view_of(const Array& array, Pointer data, ElementType type, const char* name) {
  require<InvalidArgument>(array.ndim() <= kMaxRank, name, " has ", array.ndim(), " axes; at most ",
                           kMaxRank, " are supported");
  View view;
  view.data = data;
  view.type = type;
  view.rank = static_cast<int>(array.ndim());
  for (int i = 0; i < view.rank; ++i) {
    const auto axis = static_cast<size_t>(i);
    view.shape[axis] = array.shape(i);
    view.strides[axis] = array.strides(i) / array.itemsize();
  }
  return view;
}

ConstTensorView input(const Floats& array, const char* name) {
  return view_of<ConstTensorView>(array, array.data(), ElementType::kF32, name);
}

ConstTensorView input(const Indices& array, const char* name) {
  return view_of<ConstTensorView>(array, array.data(), ElementType::kI32, name);
}

TensorView output(Floats& array) {
  return view_of<TensorView>(array, array.mutable_data(), ElementType::kF32, "out");
}

Floats like(const Floats& x) {
  return Floats(py::array::ShapeContainer(x.shape(), x.shape() + x.ndim()));
}

Floats linear(const quant::PackedMatrix& packed, const Floats& x, const std::string& precision) {
  require<InvalidArgument>(precision == "a8" || precision == "a15", "precision is '", precision,
                           "', must be \"a8\" or \"a15\"");
  const auto act = precision == "a15" ? kernels::ActPrecision::kA15 : kernels::ActPrecision::kA8;
  const ConstTensorView in = input(x, "x");
  Floats out({x.ndim() > 0 ? x.shape(0) : 0, static_cast<py::ssize_t>(packed.n)});
  const TensorView to = output(out);
  const py::gil_scoped_release release;
  ops::linear(ops::weight_of(packed), in, act, to);
  return out;
}

Floats rms_norm(const Floats& x, const Floats& weight, float eps) {
  Floats out = like(x);
  const ConstTensorView in = input(x, "x"), scale = input(weight, "weight");
  const TensorView to = output(out);
  const py::gil_scoped_release release;
  ops::rms_norm(in, scale, eps, to);
  return out;
}

Floats rope(const Floats& x, const Floats& cos, const Floats& sin) {
  Floats out = like(x);
  std::copy_n(x.data(), x.size(), out.mutable_data());
  const TensorView rotated = output(out);
  const ConstTensorView cosines = input(cos, "cos"), sines = input(sin, "sin");
  const py::gil_scoped_release release;
  ops::rope(rotated, cosines, sines);
  return out;
}

template <kernels::GateActivation Activation>
Floats gated(const Floats& gate, const Floats& up) {
  Floats out = like(gate);
  const ConstTensorView left = input(gate, "gate"), right = input(up, "up");
  const TensorView to = output(out);
  const py::gil_scoped_release release;
  ops::gated_activation(Activation, left, right, to);
  return out;
}

ops::RaggedBatch batch_of(const Indices& block_tables, const Indices& query_starts,
                          const Indices& positions) {
  return {input(query_starts, "query_starts"), input(positions, "positions"),
          input(block_tables, "block_tables")};
}

void kv_write(kv::KvStorage& storage, int slot, const Floats& k, const Floats& v,
              const Indices& block_tables, const Indices& query_starts, const Indices& positions) {
  const ops::RaggedBatch batch = batch_of(block_tables, query_starts, positions);
  const ConstTensorView keys = input(k, "k"), values = input(v, "v");
  const py::gil_scoped_release release;
  ops::kv_write(ops::pages_of(storage, slot), batch, keys, values);
}

Floats paged_attention(kv::KvStorage& storage, int slot, const Floats& q,
                       const Indices& block_tables, const Indices& query_starts,
                       const Indices& positions, float scale, int32_t window, float softcap) {
  Floats out = like(q);
  const ops::RaggedBatch batch = batch_of(block_tables, query_starts, positions);
  const ConstTensorView queries = input(q, "q");
  const TensorView to = output(out);
  const py::gil_scoped_release release;
  ops::paged_attention(ops::pages_of(storage, slot), batch, queries,
                       {.scale = scale, .window = window, .softcap = softcap}, to);
  return out;
}

}  // namespace

void register_ops(py::module_& m) {
  py::module_ sub = m.def_submodule(
      "ops", "Whole-tensor operations on the CPU; C-contiguous arrays, results are new arrays.");
  sub.def("linear", &linear, "packed"_a, "x"_a.noconvert(), "precision"_a = "a8",
          "x [tokens, k] times the packed matrix: float32 [tokens, n]. Quantized formats see x as "
          "`precision`, \"a8\" or \"a15\".");
  sub.def("rms_norm", &rms_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a,
          "x / sqrt(mean(x^2) + eps) * weight over the last axis of x [rows, n].");
  sub.def("rope", &rope, "x"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(),
          "x [tokens, heads, head_dim] rotated in NeoX pairs by cos, sin [tokens, half].");
  sub.def("silu_mul", &gated<kernels::GateActivation::kSilu>, "gate"_a.noconvert(),
          "up"_a.noconvert(), "silu(gate) * up, both [rows, n].");
  sub.def("gelu_tanh_mul", &gated<kernels::GateActivation::kGeluTanh>, "gate"_a.noconvert(),
          "up"_a.noconvert(), "gelu(gate) * up with the tanh approximation, both [rows, n].");
  sub.def("kv_write", &kv_write, "storage"_a, "slot"_a, "k"_a.noconvert(), "v"_a.noconvert(),
          "block_tables"_a.noconvert(), "query_starts"_a.noconvert(), "positions"_a.noconvert(),
          "Stores k, v [tokens, kv_heads, head_dim]. Sequence s owns rows query_starts[s] .. "
          "query_starts[s + 1] at\nconsecutive positions; block_tables is [sequences, max_blocks]; "
          "indices are int32.");
  sub.def(
      "paged_attention", &paged_attention, "storage"_a, "slot"_a, "q"_a.noconvert(),
      "block_tables"_a.noconvert(), "query_starts"_a.noconvert(), "positions"_a.noconvert(),
      "scale"_a, "window"_a = 0, "softcap"_a = 0.f,
      "Causal attention of q [tokens, heads, head_dim] over stored positions; the batch is as in "
      "kv_write.");
}
