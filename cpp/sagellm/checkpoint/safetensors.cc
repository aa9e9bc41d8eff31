#include "sagellm/checkpoint/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/base/math.h"
#include "sagellm/checkpoint/json_cursor.h"
#include "sagellm/checkpoint/text.h"

namespace sagellm::checkpoint {

static_assert(std::endian::native == std::endian::little,
              "the readers copy little-endian fields as they are");

namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kMaxDims = 8;

struct Dtype {
  std::string_view name;
  uint64_t bits;
};

/// Dtypes of the format, so that sizes can be checked even where the elements cannot be read.
constexpr std::array<Dtype, 19> kDtypes = {{
    {"F32", 32},    {"F16", 16},    {"BF16", 16},   {"F64", 64},    {"F8_E4M3", 8},
    {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4},
    {"BOOL", 8},    {"U8", 8},      {"I8", 8},      {"U16", 16},    {"I16", 16},
    {"U32", 32},    {"I32", 32},    {"U64", 64},    {"I64", 64},
}};

}  // namespace

/// Reads the header, then lays the tensors out.
class SafetensorsFile::Parser {
 public:
  Parser(SafetensorsFile& file, std::span<const uint8_t> bytes) : file_(file), bytes_(bytes) {}

  void parse() {
    require<CorruptFile>(bytes_.size() >= 8, file_.name(), ": ", bytes_.size(),
                         " bytes are too few for a safetensors file; download it again");
    uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, bytes_.data(), 8);
    require<CorruptFile>(header_bytes <= kMaxHeaderBytes && header_bytes <= bytes_.size() - 8,
                         file_.name(), ": claims a header of ", header_bytes,
                         " bytes in a file of ", bytes_.size(),
                         "; it is truncated or not a safetensors file, download it again");
    const auto header_size = static_cast<size_t>(header_bytes);
    const std::string_view header(reinterpret_cast<const char*>(bytes_.data() + 8), header_size);
    const std::span<const uint8_t> body = bytes_.subspan(8 + header_size);
    JsonCursor json(header, file_.name());
    bool has_metadata = false;
    json.expect('{');
    if (!json.accept('}')) {
      do {
        std::string key = json.string();
        json.expect(':');
        if (key == "__metadata__") {
          require<CorruptFile>(!std::exchange(has_metadata, true), file_.name(),
                               ": two __metadata__ entries");
          read_metadata(json);
        } else {
          read_tensor(json, std::move(key), body);
        }
      } while (json.accept(','));
      json.expect('}');
    }
    json.end();
    check_layout(body);
  }

 private:
  void read_metadata(JsonCursor& json) {
    json.expect('{');
    if (json.accept('}')) return;
    do {
      require<CorruptFile>(file_.metadata_.size() < kMaxEntries, file_.name(), ": more than ",
                           kMaxEntries, " metadata entries");
      std::string key = json.string();
      json.expect(':');
      const auto [it, inserted] = file_.metadata_.emplace(std::move(key), json.string());
      require<CorruptFile>(inserted, file_.name(), ": metadata key ", in_quotes(it->first),
                           " appears twice");
    } while (json.accept(','));
    json.expect('}');
  }

  void read_tensor(JsonCursor& json, std::string name, std::span<const uint8_t> body) {
    std::string dtype;
    std::vector<int64_t> shape;
    uint64_t begin = 0;
    uint64_t end = 0;
    bool has_dtype = false;
    bool has_shape = false;
    bool has_offsets = false;
    const auto once = [&](bool& seen, const char* field) {
      require<CorruptFile>(!std::exchange(seen, true), file_.name(), ": tensor ", in_quotes(name),
                           " has two fields ", field);
    };
    json.expect('{');
    do {
      const std::string field = json.string();
      json.expect(':');
      if (field == "dtype") {
        once(has_dtype, "dtype");
        dtype = json.string();
      } else if (field == "shape") {
        once(has_shape, "shape");
        shape = read_shape(json, name);
      } else if (field == "data_offsets") {
        once(has_offsets, "data_offsets");
        json.expect('[');
        begin = json.integer();
        json.expect(',');
        end = json.integer();
        json.expect(']');
      } else {
        fail<CorruptFile>(file_.name(), ": tensor ", in_quotes(name), " has an unknown field ",
                          in_quotes(field));
      }
    } while (json.accept(','));
    json.expect('}');
    require<CorruptFile>(has_dtype && has_shape && has_offsets, file_.name(), ": tensor ",
                         in_quotes(name), " lacks dtype, shape or data_offsets");
    require<CorruptFile>(begin <= end && end <= body.size(), file_.name(), ": tensor ",
                         in_quotes(name), " takes bytes ", begin, " to ", end, " of ", body.size(),
                         "; the file is truncated, download it again");
    TensorInfo info{.name = std::move(name),
                    .format = Format::kF32,
                    .shape = std::move(shape),
                    .data = body.data() + begin,
                    .nbytes = static_cast<size_t>(end - begin),
                    .unreadable = {}};
    set_format(info, dtype);
    file_.add_tensor(std::move(info));
  }

  std::vector<int64_t> read_shape(JsonCursor& json, const std::string& name) {
    std::vector<int64_t> shape;
    json.expect('[');
    if (json.accept(']')) return shape;
    do {
      const uint64_t extent = json.integer();
      require<CorruptFile>(
          extent <= uint64_t{std::numeric_limits<int64_t>::max()} && shape.size() < kMaxDims,
          file_.name(), ": the shape of tensor ", in_quotes(name), " is beyond any limit");
      shape.push_back(static_cast<int64_t>(extent));
    } while (json.accept(','));
    json.expect(']');
    return shape;
  }

  void set_format(TensorInfo& info, const std::string& dtype) {
    if (dtype == "F32") {
      info.format = Format::kF32;
    } else if (dtype == "F16") {
      info.format = Format::kF16;
    } else if (dtype == "BF16") {
      info.format = Format::kBF16;
    } else if (dtype == "F8_E4M3") {
      info.format = Format::kF8_E4M3;
    } else {
      info.unreadable = dtype.empty() ? "?" : dtype;
    }
    const auto* known = std::find_if(kDtypes.begin(), kDtypes.end(),
                                     [&](const Dtype& d) { return d.name == dtype; });
    if (known == kDtypes.end()) return;  // a dtype of a later version: its size is not known
    uint64_t bits = known->bits;
    for (const int64_t extent : info.shape) bits = checked_mul(bits, static_cast<uint64_t>(extent));
    require<CorruptFile>(bits % 8 == 0 && bits / 8 == info.nbytes, file_.name(), ": tensor ",
                         in_quotes(info.name), " has ", info.nbytes,
                         " bytes, but its shape and dtype ", dtype, " need ", bits / 8);
  }

  /// Tensors must cover the body without holes or overlaps.
  void check_layout(std::span<const uint8_t> body) {
    file_.check_no_overlap();
    size_t covered = 0;
    for (const auto& [name, info] : file_.tensors()) covered += info.nbytes;
    require<CorruptFile>(covered == body.size(), file_.name(), ": its tensors cover ", covered,
                         " of ", body.size(),
                         " data bytes; the file is inconsistent, download it again");
  }

  SafetensorsFile& file_;
  std::span<const uint8_t> bytes_;
};

SafetensorsFile::SafetensorsFile(const std::string& path) : File(file_name(path)), mapping_(path) {
  Parser(*this, mapping_.bytes()).parse();
}

SafetensorsFile::SafetensorsFile(std::span<const uint8_t> bytes, std::string name)
    : File(std::move(name)) {
  Parser(*this, bytes).parse();
}

}  // namespace sagellm::checkpoint
