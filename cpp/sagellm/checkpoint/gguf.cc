#include "sagellm/checkpoint/gguf.h"

#include <bit>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include "sagellm/base/error.h"
#include "sagellm/base/math.h"
#include "sagellm/checkpoint/text.h"

namespace sagellm::checkpoint {

static_assert(std::endian::native == std::endian::little,
              "the readers copy little-endian fields as they are");

namespace {

constexpr char kMagic[] = {'G', 'G', 'U', 'F'};
constexpr uint32_t kMaxDims = 4;
constexpr int kMaxArrayDepth = 4;
constexpr uint64_t kMaxNameBytes = 65535;
constexpr uint32_t kDefaultAlignment = 32;
constexpr uint32_t kMaxAlignment = 1u << 20;

/// Tensor type tags of the formats that are read.
std::optional<Format> format_of(uint32_t type) {
  switch (type) {
    case 0:
      return Format::kF32;
    case 1:
      return Format::kF16;
    case 2:
      return Format::kQ4_0;
    case 3:
      return Format::kQ4_1;
    case 6:
      return Format::kQ5_0;
    case 7:
      return Format::kQ5_1;
    case 8:
      return Format::kQ8_0;
    case 10:
      return Format::kQ2_K;
    case 11:
      return Format::kQ3_K;
    case 12:
      return Format::kQ4_K;
    case 13:
      return Format::kQ5_K;
    case 14:
      return Format::kQ6_K;
    case 20:
      return Format::kIQ4_NL;
    case 30:
      return Format::kBF16;
    default:
      return std::nullopt;
  }
}

/// Bytes of a scalar; 0 for strings and arrays.
size_t scalar_bytes(GgufType type) {
  switch (type) {
    case GgufType::kUint8:
    case GgufType::kInt8:
    case GgufType::kBool:
      return 1;
    case GgufType::kUint16:
    case GgufType::kInt16:
      return 2;
    case GgufType::kUint32:
    case GgufType::kInt32:
    case GgufType::kFloat32:
      return 4;
    case GgufType::kUint64:
    case GgufType::kInt64:
    case GgufType::kFloat64:
      return 8;
    case GgufType::kString:
    case GgufType::kArray:
      break;
  }
  return 0;
}

}  // namespace

/// Reads the file front to back; every length is compared with what is left before it is used.
class GgufFile::Parser {
 public:
  Parser(GgufFile& file, std::span<const uint8_t> bytes) : file_(file), bytes_(bytes) {}

  void parse() {
    require<CorruptFile>(
        bytes_.size() >= 4 && std::memcmp(bytes_.data(), kMagic, 4) == 0, file_.name(),
        ": not a GGUF file (it does not begin with 'GGUF'); check that the download is the model "
        "itself and not a web page or a pointer file");
    offset_ = 4;
    const auto version = read<uint32_t>();
    require<Unsupported>((version & 0xffff) != 0, file_.name(),
                         ": big-endian GGUF; convert the model again for a little-endian machine");
    require<Unsupported>(version == 2 || version == 3, file_.name(), ": GGUF version ", version,
                         "; supported: 2, 3 (convert the model again)");
    const auto num_tensors = read<uint64_t>();
    const auto num_values = read<uint64_t>();
    require<CorruptFile>(num_tensors <= kMaxEntries && num_values <= kMaxEntries, file_.name(),
                         ": claims ", num_tensors, " tensors and ", num_values,
                         " metadata values; the limit is ", kMaxEntries,
                         "; the file is damaged, download it again");
    for (uint64_t i = 0; i < num_values; ++i) metadata_value();
    read_alignment();
    std::vector<Pending> pending;
    for (uint64_t i = 0; i < num_tensors; ++i) pending.push_back(tensor_header());
    place_tensors(std::move(pending));
  }

 private:
  struct Pending {
    TensorInfo info;
    uint64_t offset = 0;
  };

  size_t remaining() const { return bytes_.size() - offset_; }

  const uint8_t* take(uint64_t size) {
    require<CorruptFile>(size <= remaining(), file_.name(), ": needs ", size, " bytes at offset ",
                         offset_, " but only ", remaining(),
                         " are left; the file is truncated, download it again");
    const uint8_t* data = bytes_.data() + offset_;
    offset_ += static_cast<size_t>(size);
    return data;
  }

  template <typename T>
  T read() {
    T value;
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
    return value;
  }

  std::string_view read_string() {
    const auto size = read<uint64_t>();
    const size_t at = offset_;
    const std::string_view text(reinterpret_cast<const char*>(take(size)),
                                static_cast<size_t>(size));
    require<CorruptFile>(is_utf8(text), file_.name(), ": the string at offset ", at,
                         " is not valid UTF-8");
    return text;
  }

  std::string read_name(const char* what) {
    const std::string_view name = read_string();
    require<CorruptFile>(!name.empty() && name.size() <= kMaxNameBytes, file_.name(), ": the ",
                         what, " before offset ", offset_, " has ", name.size(),
                         " bytes, expected 1 to ", kMaxNameBytes);
    return std::string(name);
  }

  GgufType read_type() {
    const auto type = read<uint32_t>();
    require<CorruptFile>(type < kNumGgufTypes, file_.name(), ": unknown metadata type ", type,
                         " at offset ", offset_ - 4);
    return static_cast<GgufType>(type);
  }

  bool read_bool() {
    const auto byte = read<uint8_t>();
    require<CorruptFile>(byte <= 1, file_.name(), ": a bool at offset ", offset_ - 1, " is ",
                         int{byte});
    return byte != 0;
  }

  GgufValue read_value(GgufType type, int depth) {
    switch (type) {
      case GgufType::kUint8:
        return {uint64_t{read<uint8_t>()}};
      case GgufType::kUint16:
        return {uint64_t{read<uint16_t>()}};
      case GgufType::kUint32:
        return {uint64_t{read<uint32_t>()}};
      case GgufType::kUint64:
        return {read<uint64_t>()};
      case GgufType::kInt8:
        return {int64_t{read<int8_t>()}};
      case GgufType::kInt16:
        return {int64_t{read<int16_t>()}};
      case GgufType::kInt32:
        return {int64_t{read<int32_t>()}};
      case GgufType::kInt64:
        return {read<int64_t>()};
      case GgufType::kFloat32:
        return {double{read<float>()}};
      case GgufType::kFloat64:
        return {read<double>()};
      case GgufType::kBool:
        return {read_bool()};
      case GgufType::kString:
        return {read_string()};
      case GgufType::kArray:
        return read_array(depth + 1);
    }
    fail<CorruptFile>(file_.name(), ": unknown metadata type");
  }

  GgufValue read_array(int depth) {
    require<CorruptFile>(depth <= kMaxArrayDepth, file_.name(), ": arrays nest deeper than ",
                         kMaxArrayDepth);
    const GgufType type = read_type();
    const auto count = read<uint64_t>();
    const size_t width = scalar_bytes(type);
    // Strings take at least their 8-byte length, arrays their 4-byte type and 8-byte count.
    const size_t least = width != 0 ? width : (type == GgufType::kString ? 8 : 12);
    require<CorruptFile>(
        count <= remaining() / least, file_.name(), ": an array at offset ", offset_, " claims ",
        count, " elements, more than the file can hold; it is truncated, download it again");
    if (width != 0) {
      const GgufNumbers numbers{type, take(count * width), static_cast<size_t>(count)};
      if (type == GgufType::kBool) {
        for (size_t i = 0; i < numbers.count; ++i) {
          require<CorruptFile>(numbers.data[i] <= 1, file_.name(), ": a bool array before offset ",
                               offset_, " holds ", int{numbers.data[i]});
        }
      }
      return {numbers};
    }
    if (type == GgufType::kString) {
      std::vector<std::string_view> strings;
      strings.reserve(static_cast<size_t>(count));
      for (uint64_t i = 0; i < count; ++i) strings.push_back(read_string());
      return {std::move(strings)};
    }
    std::vector<GgufValue> arrays;
    arrays.reserve(static_cast<size_t>(count));
    for (uint64_t i = 0; i < count; ++i) arrays.push_back(read_array(depth + 1));
    return {std::move(arrays)};
  }

  void metadata_value() {
    std::string key = read_name("metadata key");
    const GgufType type = read_type();
    GgufValue value = read_value(type, 0);
    const auto [it, inserted] = file_.metadata_.emplace(std::move(key), std::move(value));
    require<CorruptFile>(inserted, file_.name(), ": metadata key ", in_quotes(it->first),
                         " appears twice");
    if (it->first == "general.alignment") alignment_type_ = type;
  }

  void read_alignment() {
    const auto it = file_.metadata_.find("general.alignment");
    if (it == file_.metadata_.end()) return;
    require<CorruptFile>(alignment_type_ == GgufType::kUint32, file_.name(),
                         ": general.alignment is not a uint32");
    alignment_ = std::get<uint64_t>(it->second.value);
    require<CorruptFile>(std::has_single_bit(alignment_) && alignment_ <= kMaxAlignment,
                         file_.name(), ": general.alignment is ", alignment_,
                         ", expected a power of two up to ", kMaxAlignment);
  }

  Pending tensor_header() {
    Pending out;
    out.info.name = read_name("tensor name");
    const auto num_dims = read<uint32_t>();
    require<CorruptFile>(num_dims >= 1 && num_dims <= kMaxDims, file_.name(), ": tensor ",
                         in_quotes(out.info.name), " has ", num_dims, " dimensions, expected 1 to ",
                         kMaxDims);
    out.info.shape.resize(num_dims);
    uint64_t elements = 1;
    for (uint32_t i = 0; i < num_dims; ++i) {  // stored innermost first
      const auto extent = read<uint64_t>();
      require<CorruptFile>(extent >= 1 && extent <= uint64_t{std::numeric_limits<int64_t>::max()},
                           file_.name(), ": tensor ", in_quotes(out.info.name),
                           " has an extent of ", extent);
      out.info.shape[num_dims - 1 - i] = static_cast<int64_t>(extent);
      elements = checked_mul(elements, extent);
    }
    const auto type = read<uint32_t>();
    const std::optional<Format> format = format_of(type);
    require<Unsupported>(format.has_value(), file_.name(), ": tensor ", in_quotes(out.info.name),
                         " has GGML type ", type, "; supported: ", supported_formats());
    out.info.format = *format;
    const FormatInfo& facts = format_info(*format);
    const int64_t columns = out.info.shape.back();
    require<CorruptFile>(columns % facts.block_elements == 0, file_.name(), ": rows of tensor ",
                         in_quotes(out.info.name), " have ", columns,
                         " elements, not a multiple of the ", facts.name, " block of ",
                         facts.block_elements);
    const uint64_t blocks = elements / static_cast<uint64_t>(facts.block_elements);
    out.info.nbytes = checked_mul(blocks, static_cast<uint64_t>(facts.block_bytes));
    out.offset = read<uint64_t>();
    require<CorruptFile>(out.offset % alignment_ == 0, file_.name(), ": tensor ",
                         in_quotes(out.info.name), " begins at data offset ", out.offset,
                         ", not a multiple of the alignment ", alignment_);
    return out;
  }

  void place_tensors(std::vector<Pending> pending) {
    const uint64_t data_begin = checked_add(offset_, alignment_ - 1) / alignment_ * alignment_;
    for (Pending& tensor : pending) {
      const uint64_t begin = checked_add(data_begin, tensor.offset);
      const uint64_t end = checked_add(begin, tensor.info.nbytes);
      require<CorruptFile>(end <= bytes_.size(), file_.name(), ": tensor ",
                           in_quotes(tensor.info.name), " ends at byte ", end, " of a file of ",
                           bytes_.size(), " bytes; the file is truncated, download it again");
      tensor.info.data = bytes_.data() + begin;
      file_.add_tensor(std::move(tensor.info));
    }
    file_.check_no_overlap();
  }

  GgufFile& file_;
  std::span<const uint8_t> bytes_;
  size_t offset_ = 0;
  uint64_t alignment_ = kDefaultAlignment;
  GgufType alignment_type_ = GgufType::kUint32;
};

GgufFile::GgufFile(const std::string& path) : File(file_name(path)), mapping_(path) {
  Parser(*this, mapping_.bytes()).parse();
}

GgufFile::GgufFile(std::span<const uint8_t> bytes, std::string name) : File(std::move(name)) {
  Parser(*this, bytes).parse();
}

}  // namespace sagellm::checkpoint
