// NCCL on arrays of a device.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>

#include "device_array.h"
#include "sagellm/cuda/nccl.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm;  // NOLINT: a binding file of the core
using cuda::Communicator;
using cuda::Nccl;

std::unique_ptr<Communicator> join(std::shared_ptr<Nccl> library, const py::bytes& id, int rank,
                                   int size, double timeout_s) {
  const auto bytes = static_cast<std::string>(id);
  cuda::NcclId native;
  require<InvalidArgument>(bytes.size() == native.bytes.size(), "an id has ", native.bytes.size(),
                           " bytes, not ", bytes.size());
  std::copy(bytes.begin(), bytes.end(), native.bytes.begin());
  const py::gil_scoped_release release;
  return std::make_unique<Communicator>(std::move(library), native, rank, size,
                                        Communicator::Seconds(timeout_s));
}

cuda::Reduction reduction_of(const std::string& name) {
  if (name == "sum") return cuda::Reduction::kSum;
  if (name == "max") return cuda::Reduction::kMax;
  fail<InvalidArgument>("reduction is '", name, "'; choose sum or max");
}

/// The elements of `array` as a reduction takes them.
void* reduced(const DeviceArray& array, const char* name, kernels::cuda::FloatType type,
              int64_t count) {
  return type == kernels::cuda::FloatType::kF32
             ? static_cast<void*>(array.elements<float>(name, count))
             : array.elements<uint16_t>(name, count);
}

void require_bytes(const DeviceArray& array, const char* name, size_t needed) {
  require<InvalidArgument>(array.bytes() >= needed, name, " has ", array.bytes(), " bytes; ",
                           needed, " are needed");
}

void all_reduce(Communicator& c, const DeviceArray& in, const DeviceArray& out,
                const std::string& type, const std::string& reduction) {
  const auto element = float_type_of(type);
  const void* from = reduced(in, "in", element, in.size());
  void* to = reduced(out, "out", element, in.size());
  const auto how = reduction_of(reduction);
  const py::gil_scoped_release release;
  c.all_reduce(from, to, static_cast<size_t>(in.size()), element, how, nullptr);
}

void reduce_scatter(Communicator& c, const DeviceArray& in, const DeviceArray& out,
                    const std::string& type, const std::string& reduction) {
  const auto element = float_type_of(type);
  const void* from = reduced(in, "in", element, out.size() * c.size());
  void* to = reduced(out, "out", element, out.size());
  const auto how = reduction_of(reduction);
  const py::gil_scoped_release release;
  c.reduce_scatter(from, to, static_cast<size_t>(out.size()), element, how, nullptr);
}

void all_gather(Communicator& c, const DeviceArray& in, const DeviceArray& out) {
  require_bytes(out, "out", in.bytes() * static_cast<size_t>(c.size()));
  const py::gil_scoped_release release;
  c.all_gather(in.data(), out.data(), in.bytes(), nullptr);
}

void broadcast(Communicator& c, const DeviceArray& array, int root) {
  const py::gil_scoped_release release;
  c.broadcast(array.data(), array.data(), array.bytes(), root, nullptr);
}

void send(Communicator& c, const DeviceArray& in, int to) {
  const py::gil_scoped_release release;
  c.send(in.data(), in.bytes(), to, nullptr);
}

void receive(Communicator& c, const DeviceArray& out, int from) {
  const py::gil_scoped_release release;
  c.receive(out.data(), out.bytes(), from, nullptr);
}

void group(Communicator& c, const std::function<void()>& work) {
  const py::gil_scoped_release release;
  c.group([&] {
    const py::gil_scoped_acquire acquire;
    work();
  });
}

}  // namespace

void register_nccl(py::module_& m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<Nccl, std::shared_ptr<Nccl>>(m, "Nccl", py::module_local(),
                                          "NCCL, opened from one of `folders` or the system.")
      .def(py::init<const std::vector<std::string>&>(), "folders"_a = std::vector<std::string>{})
      .def_property_readonly("version", &Nccl::version, "22809 for 2.28.9.")
      .def_property_readonly("version_text", &Nccl::version_text)
      .def_property_readonly("path", &Nccl::path)
      .def(
          "make_id",
          [](const Nccl& library) {
            const cuda::NcclId id = library.make_id();
            return py::bytes(id.bytes.data(), id.bytes.size());
          },
          "The name of a new clique: 128 bytes that one rank makes and all join with.");
  py::class_<Communicator>(m, "Communicator", py::module_local(),
                           "One rank of a clique, on this thread's device; calls queue on its "
                           "default stream. Returns when all ranks have joined. A call for which "
                           "other ranks do not do their part in `timeout_s` seconds ends it with "
                           "an error.")
      .def(py::init(&join), "library"_a, "id"_a, "rank"_a, "size"_a,
           "timeout_s"_a = Communicator::kTimeout.count())
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("size", &Communicator::size)
      .def("all_reduce", &all_reduce, "in"_a, "out"_a, "type"_a = "float32", "reduction"_a = "sum")
      .def("reduce_scatter", &reduce_scatter, "in"_a, "out"_a, "type"_a = "float32",
           "reduction"_a = "sum", "Rank r keeps part r of the reduced `in`.")
      .def("all_gather", &all_gather, "in"_a, "out"_a, "The bytes of all ranks in their order.")
      .def("broadcast", &broadcast, "array"_a, "root"_a, "From the root's array to all others.")
      .def("send", &send, "array"_a, "to"_a)
      .def("receive", &receive, "array"_a, "sender"_a)
      .def("group", &group, "work"_a, "What `work` calls starts as one operation.")
      .def("async_error", &Communicator::async_error, unlocked,
           "Why queued work cannot complete; empty while all is well.")
      .def("finish", &Communicator::finish, unlocked, "Leaves together with all other ranks.")
      .def("cancel", &Communicator::cancel, unlocked, "Leaves alone, ending what is queued.");
}
