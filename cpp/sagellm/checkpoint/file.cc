#include "sagellm/checkpoint/file.h"

#include <algorithm>
#include <utility>

#include "sagellm/base/error.h"
#include "sagellm/checkpoint/text.h"

namespace sagellm::checkpoint {

const TensorInfo& File::tensor(const std::string& name) const {
  const auto it = tensors_.find(name);
  require<CorruptFile>(it != tensors_.end(), name_, ": no tensor ", in_quotes(name),
                       "; the file is incomplete or holds another architecture");
  const TensorInfo& info = it->second;
  require<Unsupported>(info.unreadable.empty(), name_, ": tensor ", in_quotes(name),
                       " is stored as ", in_quotes(info.unreadable),
                       "; supported: ", supported_formats());
  return info;
}

void File::add_tensor(TensorInfo info) {
  require<CorruptFile>(tensors_.size() < kMaxEntries, name_, ": more than ", kMaxEntries,
                       " tensors");
  std::string key = info.name;
  const auto [it, inserted] = tensors_.try_emplace(std::move(key), std::move(info));
  require<CorruptFile>(inserted, name_, ": two tensors are named ", in_quotes(it->first));
}

void File::check_no_overlap() const {
  std::vector<const TensorInfo*> order;
  order.reserve(tensors_.size());
  for (const auto& [name, info] : tensors_) {
    if (info.nbytes > 0) order.push_back(&info);
  }
  std::sort(order.begin(), order.end(),
            [](const TensorInfo* a, const TensorInfo* b) { return a->data < b->data; });
  for (size_t i = 1; i < order.size(); ++i) {
    require<CorruptFile>(order[i - 1]->data + order[i - 1]->nbytes <= order[i]->data, name_,
                         ": tensors ", in_quotes(order[i - 1]->name), " and ",
                         in_quotes(order[i]->name), " overlap");
  }
}

}  // namespace sagellm::checkpoint
