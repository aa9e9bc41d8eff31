#include "sagellm/cuda/tensor_map.h"

#include "sagellm/cuda/check.h"
#include "sagellm/kernels/cuda/attention_launch.h"

namespace sagellm::cuda {
namespace {

using kernels::cuda::KvPages;
using kernels::cuda::KvType;
using kernels::cuda::TensorMap;

// Values and prototype as in the driver's cuda.h (since CUDA 12.0), whose library is not linked.
constexpr int kFloat16 = 6;   // CU_TENSOR_MAP_DATA_TYPE_FLOAT16
constexpr int kBfloat16 = 9;  // CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
constexpr int kInterleaveNone = 0;
constexpr int kSwizzle128B = 3;
constexpr int kPromotion256B = 3;  // CU_TENSOR_MAP_L2_PROMOTION_L2_256B: rows of a page are one run
constexpr int kFillZeros = 0;
using EncodeTiled = int (*)(TensorMap* map, int type, uint32_t rank, void* address,
                            const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
                            const uint32_t* element_strides, int interleave, int swizzle,
                            int promotion, int fill);

EncodeTiled find_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  constexpr unsigned kSince = 12000;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kSince,
                                         cudaEnableDefault, &status),
        "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status),
        "cudaGetDriverEntryPoint(cuTensorMapEncodeTiled)");
#endif
  require<DeviceError>(status == cudaDriverEntryPointSuccess && found != nullptr,
                       "the NVIDIA driver has no cuTensorMapEncodeTiled; update it to one that "
                       "serves CUDA 12");
  return reinterpret_cast<EncodeTiled>(found);
}

// Blocks are not counted: which exist, the block tables know. No limit of the copy engine is near.
constexpr uint64_t kAnyBlock = uint64_t{1} << 30;

TensorMap encode(const KvPages& pages) {
  static const EncodeTiled encode_tiled = find_encoder();
  require<InvalidArgument>(!kernels::cuda::kv_has_scales(pages.type),
                           "tensor maps are made of 16-bit pages");
  const auto row_bytes = static_cast<uint64_t>(pages.head_dim) * 2;
  const uint64_t rows = uint64_t{2} * static_cast<uint64_t>(pages.page_size) *
                        static_cast<uint64_t>(pages.num_kv_heads);
  const uint64_t dims[3] = {static_cast<uint64_t>(pages.head_dim), rows, kAnyBlock};
  const uint64_t strides[2] = {row_bytes, static_cast<uint64_t>(pages.block_stride)};
  const uint32_t box[3] = {kernels::cuda::kWarpgroupBoxDims, static_cast<uint32_t>(pages.page_size),
                           1};
  const uint32_t every[3] = {1, 1, 1};
  TensorMap map;
  const int error =
      encode_tiled(&map, pages.type == KvType::kBF16 ? kBfloat16 : kFloat16, 3, pages.pool, dims,
                   strides, box, every, kInterleaveNone, kSwizzle128B, kPromotion256B, kFillZeros);
  require<DeviceError>(error == 0, "cuTensorMapEncodeTiled refused pages of ", pages.page_size,
                       " tokens, ", pages.num_kv_heads, " heads, head_dim ", pages.head_dim,
                       " and a block stride of ", pages.block_stride, " bytes (CUresult ", error,
                       ")");
  return map;
}

}  // namespace

const TensorMap& PageMaps::of(const KvPages& pages) {
  const auto key = std::pair{static_cast<const std::byte*>(pages.pool), pages.block_stride};
  auto found = maps_.find(key);
  if (found == maps_.end()) found = maps_.emplace(key, encode(pages)).first;
  return found->second;
}

}  // namespace sagellm::cuda
