// _core.kernels: matmul and activation quantization of any instruction set this machine runs, and
// what it runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/kernels/cpu/cpu_info.h"
#include "sagellm/kernels/cpu/dispatch.h"
#include "sagellm/kernels/params.h"
#include "sagellm/quant/pack.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm;  // NOLINT: a binding file of the core

using Floats = py::array_t<float, py::array::c_style>;

bool is_a15(const std::string& precision) {
  require<InvalidArgument>(precision == "a8" || precision == "a15", "precision is '", precision,
                           "', must be \"a8\" or \"a15\"");
  return precision == "a15";
}

/// Rows of activations in the representation that a matmul wants.
struct Encoded {
  std::vector<float> f32;
  std::vector<uint16_t> bf16;
  std::vector<int8_t> q, q_lo;
  std::vector<float> d, s;
  std::vector<int32_t> sum16;

  kernels::Activations view() const {
    return {f32.data(), bf16.data(), q.data(),    q_lo.empty() ? nullptr : q_lo.data(),
            d.data(),   s.data(),    sum16.data()};
  }
};

Encoded encode(const kernels::KernelTable& table, kernels::ActKind kind, const float* x,
               int32_t tokens, int64_t k, bool a15) {
  const auto size = [tokens](int64_t per_token) {
    return static_cast<size_t>(tokens) * static_cast<size_t>(per_token);
  };
  Encoded out;
  if (kind == kernels::ActKind::kF32) {
    out.f32.assign(x, x + size(k));
  } else if (kind == kernels::ActKind::kBF16) {
    const int64_t stride = k + k % 2;
    out.bf16.resize(size(stride));
    for (int32_t t = 0; t < tokens; ++t) table.to_bf16(x + t * k, out.bf16.data() + t * stride, k);
  } else {
    require<InvalidArgument>(k % kernels::kUnit == 0, "k is ", k, ", must be a multiple of ",
                             kernels::kUnit);
    out.q.resize(size(k));
    if (a15) out.q_lo.resize(size(k));
    out.d.resize(size(k / 32));
    out.s.resize(size(k / 32));
    out.sum16.resize(size(k / 16));
    kernels::QuantizeParams p;
    p.x = x;
    p.x_stride = p.k = k;
    p.num_tokens = tokens;
    p.q = out.q.data();
    p.q_lo = a15 ? out.q_lo.data() : nullptr;
    p.d = out.d.data();
    p.s = out.s.data();
    p.sum16 = out.sum16.data();
    table.quantize(p);
  }
  return out;
}

kernels::MatmulParams matmul_params(const quant::PackedMatrix& w, const Encoded& x, int32_t tokens,
                                    std::vector<float>& out) {
  const int64_t columns = w.num_row_blocks() * kernels::kRowBlock;
  out.resize(static_cast<size_t>(tokens * columns));
  kernels::MatmulParams p;
  p.format = w.format;
  p.weights = w.storage.data();
  p.k = w.k;
  p.row_block_end = static_cast<int32_t>(w.num_row_blocks());
  p.num_tokens = tokens;
  p.x = x.view();
  p.out = out.data();
  p.out_stride = columns;
  return p;
}

Floats run_matmul(const std::string& isa, const quant::PackedMatrix& w, const Floats& x,
                  const std::string& precision, const std::vector<int32_t>& splits) {
  require<InvalidArgument>(x.ndim() == 2 && x.shape(0) > 0 && x.shape(1) == w.k,
                           "x must have shape [tokens, ", w.k, "]");
  const auto& table = kernels::kernel_table(isa);
  const bool a15 = is_a15(precision);
  const auto tokens = static_cast<int32_t>(x.shape(0));
  const auto blocks = static_cast<int32_t>(w.num_row_blocks());
  std::vector<int32_t> bounds = splits;
  require<InvalidArgument>(std::is_sorted(bounds.begin(), bounds.end()) &&
                               (bounds.empty() || (bounds.front() >= 0 && bounds.back() <= blocks)),
                           "splits must ascend within 0..", blocks, " row blocks");
  bounds.insert(bounds.begin(), 0);
  bounds.push_back(blocks);
  Floats result({x.shape(0), static_cast<py::ssize_t>(w.n)});
  const float* values = x.data();
  float* to = result.mutable_data();
  {
    const py::gil_scoped_release release;
    std::vector<float> out;
    const kernels::ActKind kind = table.act_kind[static_cast<int>(w.format)];
    const Encoded encoded = encode(table, kind, values, tokens, w.k, a15);
    kernels::MatmulParams p = matmul_params(w, encoded, tokens, out);
    for (size_t i = 0; i + 1 < bounds.size(); ++i) {
      p.row_block_begin = bounds[i];
      p.row_block_end = bounds[i + 1];
      table.matmul(p);
    }
    for (int64_t t = 0; t < tokens; ++t)
      std::copy_n(out.data() + t * p.out_stride, w.n, to + t * w.n);
  }
  return result;
}

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values, int64_t rows) {
  const auto columns = static_cast<py::ssize_t>(values.size()) / rows;
  py::array_t<T> out({static_cast<py::ssize_t>(rows), columns});
  std::copy(values.begin(), values.end(), out.mutable_data());
  return out;
}

py::dict run_quantize(const std::string& isa, const Floats& x, const std::string& precision) {
  require<InvalidArgument>(x.ndim() == 2 && x.size() > 0, "x must have shape [tokens, k]");
  const auto tokens = static_cast<int32_t>(x.shape(0));
  const bool a15 = is_a15(precision);
  const auto& table = kernels::kernel_table(isa);
  const Encoded e = encode(table, kernels::ActKind::kI8, x.data(), tokens, x.shape(1), a15);
  py::dict out("q"_a = to_array(e.q, tokens), "d"_a = to_array(e.d, tokens),
               "s"_a = to_array(e.s, tokens), "sum16"_a = to_array(e.sum16, tokens));
  if (a15) out["q_lo"] = to_array(e.q_lo, tokens);
  return out;
}

double benchmark_matmul(const std::string& isa, const quant::PackedMatrix& w, int32_t num_tokens,
                        int repeat, const std::string& precision) {
  require<InvalidArgument>(num_tokens > 0 && repeat > 0, "num_tokens and repeat must be positive");
  const auto& table = kernels::kernel_table(isa);
  const bool a15 = is_a15(precision);
  const py::gil_scoped_release release;
  std::vector<float> x(static_cast<size_t>(num_tokens * w.k)), out;
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = static_cast<float>(i * 2654435761u % 1000) / 500.f - 1.f;
  const kernels::ActKind kind = table.act_kind[static_cast<int>(w.format)];
  const Encoded encoded = encode(table, kind, x.data(), num_tokens, w.k, a15);
  const kernels::MatmulParams p = matmul_params(w, encoded, num_tokens, out);
  table.matmul(p);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < repeat; ++i) table.matmul(p);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / repeat;
}

}  // namespace

void register_kernels_matmul(py::module_& m) {
  py::module_ k =
      m.def_submodule("kernels", "Kernels by instruction set, for tests and benchmarks.");
  k.def("available_isas", &kernels::available_isas,
        "Instruction sets with kernels that run here, plainest first.");
  k.def(
      "selected_isa", [] { return std::string(kernels::kernel_table().name); },
      "The instruction set in use: SAGELLM_CPU_ISA, or the best available.");
  k.def(
      "cpu_features", [] { return kernels::cpu_info().features(); },
      "Instruction-set extensions of this processor that some kernel is built for.");
  k.def(
      "cpu_brand", [] { return kernels::cpu_info().brand; },
      "The processor's name for itself, or ''.");
  k.def("matmul", &run_matmul, "isa"_a, "packed"_a, "x"_a.noconvert(), "precision"_a = "a8",
        "splits"_a = std::vector<int32_t>{},
        "x [tokens, k] times the packed matrix: float32 [tokens, n]. Quantized formats see x as "
        "`precision`. The row "
        "blocks are computed in one call, or in ranges that end at `splits`.");
  k.def("quantize", &run_quantize, "isa"_a, "x"_a.noconvert(), "precision"_a = "a8",
        "Activations as the kernels see them: q, d, s, sum16 and in \"a15\" q_lo, each [tokens, "
        "...].");
  k.def("benchmark_matmul", &benchmark_matmul, "isa"_a, "packed"_a, "num_tokens"_a, "repeat"_a,
        "precision"_a = "a8",
        "Mean seconds of one matmul by one thread, without quantization of the activations.");
}
