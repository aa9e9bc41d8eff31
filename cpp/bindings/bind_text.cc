// _core.text: byte-pair tables. Whatever takes long runs with the GIL released.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/text/byte_pair_table.h"
#include "string_array.h"

namespace py = pybind11;

namespace {

using sagellm::text::BytePairTable;

/// The texts of a tuple of str, as UTF-8 that the str objects own.
std::vector<std::string_view> views(const py::tuple& texts) {
  std::vector<std::string_view> out;
  out.reserve(texts.size());
  for (const py::handle text : texts) {
    Py_ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (data == nullptr) throw py::error_already_set();
    out.emplace_back(data, static_cast<size_t>(size));
  }
  return out;
}

/// Texts that stay while the GIL is released, whatever becomes of the sequence they came in.
class Texts {
 public:
  explicit Texts(const py::sequence& texts) {
    if (py::isinstance<StringArray>(texts)) {
      array_ = texts.cast<StringArray>();
    } else {
      kept_ = py::tuple(texts);
      views_ = ::views(kept_);
    }
  }

  const std::vector<std::string_view>& views() const {
    return array_.texts == nullptr ? views_ : *array_.texts;
  }

 private:
  StringArray array_{};
  py::tuple kept_;
  std::vector<std::string_view> views_;
};

std::unique_ptr<BytePairTable> make_table(const py::sequence& tokens, const py::sequence& merges,
                                          bool whole_words) {
  const Texts kept_tokens(tokens);
  const Texts kept_merges(merges);
  const py::gil_scoped_release release;
  const std::vector<std::string_view>& texts = kept_tokens.views();
  return std::make_unique<BytePairTable>(std::vector<std::string>(texts.begin(), texts.end()),
                                         kept_merges.views(), whole_words);
}

std::vector<int32_t> encode(const BytePairTable& table, const py::list& words) {
  const py::tuple kept(words);
  const std::vector<std::string_view> word_views = views(kept);
  const py::gil_scoped_release release;
  std::vector<int32_t> ids;
  for (const std::string_view word : word_views) table.encode(word, ids);
  return ids;
}

py::list encode_to_list(const BytePairTable& table, const py::list& words) {
  const std::vector<int32_t> ids = encode(table, words);
  py::list out(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) out[i] = py::int_(ids[i]);
  return out;
}

py::str token(const BytePairTable& table, int32_t id) {
  sagellm::require<sagellm::InvalidArgument>(id >= 0 && id < table.size(), "token id ", id,
                                             " is outside the ", table.size(), " tokens");
  return {table.token(id)};
}

}  // namespace

void register_text(py::module_& m) {
  py::module_ sub = m.def_submodule("text", "Vocabularies.");
  using namespace py::literals;
  py::class_<BytePairTable>(sub, "BytePairTable",
                            "A byte-level vocabulary and its merges. Safe to share.")
      .def(py::init(&make_table), "tokens"_a, "merges"_a, "whole_words"_a = false,
           "`tokens`: texts by id in the alphabet of byte-level vocabularies. `merges`: \"left "
           "right\",\n"
           "best first. Sequences of str; a StringArray is read where it lies. Raises\n"
           "CorruptFileError when they contradict each other.")
      .def_property_readonly("size", &BytePairTable::size)
      .def("token", &token, "token_id"_a, "The stored text of a token.")
      .def(
          "find",
          [](const BytePairTable& table, std::string_view text) -> py::object {
            const int32_t id = table.find(text);
            return id < 0 ? py::object(py::none()) : py::object(py::int_(id));
          },
          "token"_a, "The id of a token by its stored text, or None.")
      .def("encode", &encode_to_list, "words"_a,
           "Token ids of words of text (not of the alphabet), one word after the other.");
}
