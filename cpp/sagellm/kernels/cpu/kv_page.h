// Where a position's keys and values are. In an anonymous namespace: an ISA object must not define
// symbols that another one could share.
#pragma once

#include "sagellm/kernels/params.h"

namespace sagellm::kernels {
namespace {

/// The sub-page of one kv head that holds `position`.
inline uint8_t* sub_page(const KvView& kv, const int32_t* block_table, int kv_head, int position) {
  const int in_block = position % kv.block_size;
  return kv.pool + block_table[position / kv.block_size] * kv.block_stride +
         kv_head * kv.head_stride + int64_t{in_block / kSubPage} * kv.sub_page_bytes;
}

/// The halves of a bfloat16 sub-page.
inline uint16_t* bf16_keys(uint8_t* page) { return reinterpret_cast<uint16_t*>(page); }
inline const uint16_t* bf16_keys(const uint8_t* page) {
  return reinterpret_cast<const uint16_t*>(page);
}
inline uint16_t* bf16_values(uint8_t* page, int head_dim) {
  return bf16_keys(page) + kSubPage * head_dim;
}
inline const uint16_t* bf16_values(const uint8_t* page, int head_dim) {
  return bf16_keys(page) + kSubPage * head_dim;
}

/// The parts of an int8 sub-page.
struct CodedPage {
  const int8_t* keys;
  const int8_t* values;
  const float* key_scales;
  const float* value_scales;
};
inline CodedPage coded_page(const uint8_t* page, int head_dim) {
  const auto* codes = reinterpret_cast<const int8_t*>(page);
  const auto* scales = reinterpret_cast<const float*>(page + 2 * kSubPage * head_dim);
  return {codes, codes + kSubPage * head_dim, scales, scales + kSubPage};
}

/// Stores one token's codes and scales in its sub-page.
inline void store_codes(uint8_t* page, int slot, int head_dim, const int8_t* k, float k_scale,
                        const int8_t* v, float v_scale) {
  auto* key = reinterpret_cast<int8_t*>(page) + slot * 2;  // [head_dim / 2][16 tokens][2]
  for (int i = 0; i < head_dim / 2; ++i) __builtin_memcpy(key + i * 2 * kSubPage, k + 2 * i, 2);
  auto* value = reinterpret_cast<int8_t*>(page) + kSubPage * head_dim + (slot / 2) * 2 * head_dim +
                slot % 2;  // [8 pairs][head_dim][2]
  for (int d = 0; d < head_dim; ++d) value[2 * d] = v[d];
  auto* scales = reinterpret_cast<float*>(page + 2 * kSubPage * head_dim);
  scales[slot] = k_scale;
  scales[kSubPage + slot] = v_scale;
}

}  // namespace
}  // namespace sagellm::kernels
