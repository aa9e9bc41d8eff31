// sagellm._core.kv. The calls take well under a microsecond and touch Python objects, so the GIL is
// kept except in the benchmark.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/kv/benchmark.h"
#include "sagellm/kv/kv_cache.h"
#include "sagellm/kv/kv_storage.h"

namespace py = pybind11;
using namespace py::literals;
using sagellm::InvalidArgument;
using sagellm::require;

namespace {

using namespace sagellm::kv;
using TokenArray = py::array_t<int32_t, py::array::c_style>;

std::span<const int32_t> tokens_of(const TokenArray& array) {
  require<InvalidArgument>(array.ndim() == 1, "token_ids has ", array.ndim(),
                           " dimensions, must have 1");
  return {array.data(), static_cast<size_t>(array.size())};
}

py::array_t<int32_t> block_tables(const KvCache& cache, const std::vector<int64_t>& sequence_ids) {
  const int64_t width = cache.max_blocks(sequence_ids);
  py::array_t<int32_t> tables({py::ssize_t{cache.num_groups()},
                               static_cast<py::ssize_t>(sequence_ids.size()), py::ssize_t{width}});
  cache.block_tables(sequence_ids, width, tables.mutable_data());
  return tables;
}

py::array_t<int32_t> take_copies(KvCache& cache) {
  const std::vector<BlockCopy> copies = cache.take_copies();
  py::array_t<int32_t> rows({static_cast<py::ssize_t>(copies.size()), py::ssize_t{2}});
  int32_t* out = rows.mutable_data();
  for (const BlockCopy& copy : copies) {
    *out++ = copy.source;
    *out++ = copy.destination;
  }
  return rows;
}

py::object stats(const KvCache& cache) {
  const KvStats s = cache.stats();
  return py::module_::import("sagellm.kv.interface")
      .attr("KvStats")("num_blocks"_a = s.num_blocks, "free_blocks"_a = s.free_blocks,
                       "cached_blocks"_a = s.cached_blocks,
                       "prefix_queried_tokens"_a = s.prefix_queried_tokens,
                       "prefix_hit_tokens"_a = s.prefix_hit_tokens,
                       "evicted_blocks"_a = s.evicted_blocks, "copied_blocks"_a = s.copied_blocks);
}

void bind_cache(py::module_& m) {
  py::class_<KvCache>(m, "KvCache", "Paged KV cache; the contract is sagellm.kv.KvCache.")
      .def(py::init([](int64_t num_blocks, int64_t block_size, std::vector<int64_t> windows,
                       bool enable_prefix_caching, uint64_t hash_mask) {
             return KvCache({.num_blocks = num_blocks,
                             .block_size = block_size,
                             .windows = std::move(windows),
                             .enable_prefix_caching = enable_prefix_caching,
                             .hash_mask = hash_mask});
           }),
           "num_blocks"_a, "block_size"_a, "windows"_a, "enable_prefix_caching"_a = true,
           py::kw_only(), "hash_mask"_a = ~uint64_t{0},
           "`hash_mask` is for tests: 0 makes every prefix collide.")
      .def_property_readonly("block_size", &KvCache::block_size)
      .def_property_readonly("num_groups", &KvCache::num_groups)
      .def("add", &KvCache::add, "sequence_id"_a, "salt"_a = 0)
      .def(
          "match_prefix",
          [](KvCache& cache, int64_t sequence_id, const TokenArray& token_ids) {
            return cache.match_prefix(sequence_id, tokens_of(token_ids));
          },
          "sequence_id"_a, "token_ids"_a.noconvert())
      .def("reserve", &KvCache::reserve, "sequence_id"_a, "num_tokens"_a)
      .def(
          "commit",
          [](KvCache& cache, int64_t sequence_id, const TokenArray& token_ids,
             int64_t num_computed) {
            cache.commit(sequence_id, tokens_of(token_ids), num_computed);
          },
          "sequence_id"_a, "token_ids"_a.noconvert(), "num_computed"_a)
      .def("fork", &KvCache::fork, "parent_id"_a, "child_id"_a)
      .def("release", &KvCache::release, "sequence_id"_a)
      .def("block_tables", &block_tables, "sequence_ids"_a)
      .def("num_tokens", &KvCache::num_tokens, "sequence_id"_a)
      .def("num_blocks_of", &KvCache::num_blocks_of, "sequence_id"_a)
      .def("take_copies", &take_copies)
      .def("pin", &KvCache::pin, "sequence_id"_a)
      .def("unpin", &KvCache::unpin, "sequence_id"_a)
      .def("reset_prefix_index", &KvCache::reset_prefix_index)
      .def("stats", &stats)
      .def("check_integrity", &KvCache::check_integrity);
}

// The pages of one slot as bytes [num_blocks + 1, kv_heads, bytes of a page] over the storage's own
// memory; 16-bit elements in bf16.
py::array pages(py::object self, int slot) {
  auto& storage = self.cast<KvStorage&>();
  const auto view = storage.view(slot);
  const bool bf16 = view.dtype == sagellm::kernels::KvDtype::kBF16;
  const py::dtype type = bf16 ? py::dtype::of<uint16_t>() : py::dtype::of<int8_t>();
  return py::array(
      type,
      std::vector<py::ssize_t>{static_cast<py::ssize_t>(storage.num_blocks() + 1),
                               static_cast<py::ssize_t>(storage.num_kv_heads()),
                               static_cast<py::ssize_t>(view.head_stride) / type.itemsize()},
      std::vector<py::ssize_t>{static_cast<py::ssize_t>(view.block_stride),
                               static_cast<py::ssize_t>(view.head_stride), type.itemsize()},
      view.pool, self);
}

void bind_storage(py::module_& m) {
  py::class_<KvStorage, std::shared_ptr<KvStorage>>(
      m, "KvStorage", "Memory of the KV pages, packed for the attention kernels.")
      .def(py::init([](int64_t num_blocks, int64_t num_slots, int64_t num_kv_heads,
                       int64_t head_dim, int64_t block_size, const std::string& dtype) {
             return std::make_shared<KvStorage>(num_blocks, num_slots, num_kv_heads, head_dim,
                                                block_size, dtype_from_name(dtype));
           }),
           "num_blocks"_a, "num_slots"_a, "num_kv_heads"_a, "head_dim"_a, "block_size"_a,
           "dtype"_a = "bf16")
      .def("pages", &pages, "slot"_a,
           "View [num_blocks + 1, kv_heads, elements of a page]: uint16 in bf16, int8 in int8.")
      .def("copy_block", &KvStorage::copy_block, "source"_a, "destination"_a)
      .def_property_readonly("dtype",
                             [](const KvStorage& s) { return std::string(dtype_name(s.dtype())); })
      .def_property_readonly("bytes", &KvStorage::bytes)
      .def_property_readonly("bytes_per_block",
                             [](const KvStorage& s) { return s.bytes_per_block(); });
}

py::dict benchmark(int64_t num_blocks, int64_t block_size, int64_t blocks_per_request,
                   int64_t num_requests, int64_t repeat) {
  const BenchmarkOptions options{.num_blocks = num_blocks,
                                 .block_size = block_size,
                                 .blocks_per_request = blocks_per_request,
                                 .num_requests = num_requests,
                                 .repeat = repeat};
  BenchmarkResult result;
  {
    py::gil_scoped_release release;
    result = run_benchmark(options);
  }
  return py::dict("num_blocks"_a = num_blocks, "block_size"_a = block_size,
                  "blocks_per_request"_a = blocks_per_request, "num_requests"_a = num_requests,
                  "repeat"_a = repeat, "allocate_free_ns"_a = result.allocate_free_ns,
                  "prefix_path_ns"_a = result.prefix_path_ns,
                  "prefix_hit_rate"_a = result.prefix_hit_rate);
}

}  // namespace

void register_kv(py::module_& m) {
  py::module_ sub = m.def_submodule("kv", "Block pool, prefix index, block tables and KV pages.");
  bind_cache(sub);
  bind_storage(sub);
  const BenchmarkOptions defaults;
  sub.def(
      "bytes_per_block",
      [](int64_t num_slots, int64_t num_kv_heads, int64_t head_dim, int64_t block_size,
         const std::string& dtype) {
        return KvStorage::bytes_per_block(num_slots, num_kv_heads, head_dim, block_size,
                                          dtype_from_name(dtype));
      },
      "num_slots"_a, "num_kv_heads"_a, "head_dim"_a, "block_size"_a, "dtype"_a = "bf16",
      "Bytes of one block of a KvStorage of these sizes.");
  sub.def("benchmark", &benchmark, "num_blocks"_a = defaults.num_blocks,
          "block_size"_a = defaults.block_size,
          "blocks_per_request"_a = defaults.blocks_per_request,
          "num_requests"_a = defaults.num_requests, "repeat"_a = defaults.repeat,
          "Times the bookkeeping; medians in nanoseconds per block (allocate_free_ns, "
          "prefix_path_ns).");
}
