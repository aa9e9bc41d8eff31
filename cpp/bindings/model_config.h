// The Python class ModelConfig, of every module that has a decoder.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "sagellm/model/config.h"

namespace sagellm::bindings {

namespace py = pybind11;

/// Adds it to `sub`; `extra` is passed to the class, such as py::module_local().
template <typename... Extra>
void bind_model_config(py::module_& sub, const Extra&... extra) {
  using namespace py::literals;
  using model::ModelConfig;
  py::class_<ModelConfig>(sub, "ModelConfig", extra...,
                          "Shape of a decoder; see sagellm.checkpoint.config.ModelConfig.")
      .def(py::init<>())
      .def_readwrite("vocab_size", &ModelConfig::vocab_size)
      .def_readwrite("hidden_size", &ModelConfig::hidden_size)
      .def_readwrite("intermediate_size", &ModelConfig::intermediate_size)
      .def_readwrite("num_heads", &ModelConfig::num_heads)
      .def_readwrite("num_kv_heads", &ModelConfig::num_kv_heads)
      .def_readwrite("head_dim", &ModelConfig::head_dim)
      .def_readwrite("max_position", &ModelConfig::max_position)
      .def_readwrite("norm_eps", &ModelConfig::norm_eps)
      .def_readwrite("attention_scale", &ModelConfig::attention_scale)
      .def_readwrite("attention_softcap", &ModelConfig::attention_softcap)
      .def_readwrite("final_softcap", &ModelConfig::final_softcap)
      .def_readwrite("embedding_scale", &ModelConfig::embedding_scale)
      .def_readwrite("qkv_bias", &ModelConfig::qkv_bias)
      .def_readwrite("qk_norm", &ModelConfig::qk_norm)
      .def_readwrite("post_norms", &ModelConfig::post_norms)
      .def_readwrite("tie_embeddings", &ModelConfig::tie_embeddings)
      .def_property(
          "gelu_tanh",
          [](const ModelConfig& c) { return c.activation == model::Activation::kGeluTanh; },
          [](ModelConfig& c, bool gelu) {
            c.activation = gelu ? model::Activation::kGeluTanh : model::Activation::kSilu;
          })
      .def(
          "add_rope",
          [](ModelConfig& c, std::vector<double> inverse_frequencies, float attention_factor) {
            c.ropes.push_back({std::move(inverse_frequencies), attention_factor});
          },
          "inverse_frequencies"_a, "attention_factor"_a)
      .def(
          "add_layer",
          [](ModelConfig& c, int32_t window, int32_t group, int32_t slot, int32_t rope) {
            c.layers.push_back({window, group, slot, rope});
          },
          "window"_a, "group"_a, "slot"_a, "rope"_a);
}

}  // namespace sagellm::bindings
