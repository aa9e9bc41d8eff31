// Plain structs shared by every kernel and device: what a kernel reads and writes, in which layout.
// ISA translation units include this file, <immintrin.h>, <cstdint>, <cstddef> and their own folder
// only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sagellm::kernels {

// ------------------------------------------------------------------------------------------------
// R16 packed weights
//
// A weight matrix W [n, k] is cut into blocks of 16 output rows (the last one zero-padded). A row
// block is contiguous over k. Inside it, one 64-byte line holds 16 rows x 4 consecutive k
// (quantized), so a vector lane is an output row. The same bytes serve GEMV and GEMM.
//
//   kF32   [k][16] float           kF16  [k][16] half          kBF16 [ceil(k/2)][16][2] bfloat16
//   kF8    per 128 k (the last group may be shorter): scale[16] float, code [k][16] e4m3;
//          the value is code * scale
//
// Quantized: units of 32 k. Nibble byte [j*64 + r*4 + i], j = 0..3: low nibble is (row r, k =
// 4j+i), high nibble is (row r, k = 16+4j+i). High-bit byte [r*4 + i]: bit j is bit 4 of (row r,
// k = 4j+i), j = 0..7. Weights are unsigned codes q; the value is given with each format.
//
//   kQ4_0  nib[256] d[16]h                              d*(q-8)                        288 bytes
//   kQ4_1  nib[256] d[16]h m[16]h                       d*q+m                          320
//   kQ5_0  nib[256] high[64] d[16]h                     d*(q-16)                       352
//   kQ5_1  nib[256] high[64] d[16]h m[16]h              d*q+m                          384
//   kQ8_0  q[512]  d[16]h                               d*(q-128); q[j*64+r*4+i] is k = 4j+i, j =
//   0..7   544 (h: IEEE half) K-quants: superblocks of 256 k (8 units), then their scales: kQ4_K
//   nib[8][256]            sc[8][16]u8 mn[8][16]u8 d[16]h dmin[16]h    d*sc*q - dmin*mn        2368
//   kQ5_K  {nib[256] high[64]}[8] sc[8][16]u8 mn[8][16]u8 d[16]h dmin[16]h    d*sc*q - dmin*mn 2880
//   kQ6_K  {nib[256] two[128]}[8] sc[16][16]i8 d[16]h     d*sc*(q-32), one sc per 16 k 3360
//          two: group j = 0..7 (k = 4j+i) has its bits 4..5 in byte [(j&1)*64 + r*4 + i] at bit
//          2*(j>>1).
// ------------------------------------------------------------------------------------------------
enum class PackedFormat : uint8_t {
  kF32,
  kF16,
  kBF16,
  kF8,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ4_K,
  kQ5_K,
  kQ6_K
};
inline constexpr int kNumPackedFormats = 12;
inline constexpr int kRowBlock = 16;  // output rows per packed block
inline constexpr int kUnit = 32;      // k per quantized unit and per activation block
inline constexpr int kF8Group = 128;  // k per scale of a kF8 row

/// Bytes of one row block of `k` columns.
constexpr size_t packed_row_block_bytes(PackedFormat format, int64_t k) {
  switch (format) {
    case PackedFormat::kF32:
      return static_cast<size_t>(k) * 64;
    case PackedFormat::kF16:
      return static_cast<size_t>(k) * 32;
    case PackedFormat::kBF16:
      return static_cast<size_t>((k + 1) / 2) * 64;
    case PackedFormat::kF8:
      return static_cast<size_t>((k + kF8Group - 1) / kF8Group * 64 + k * 16);
    case PackedFormat::kQ4_0:
      return static_cast<size_t>(k / 32) * 288;
    case PackedFormat::kQ4_1:
      return static_cast<size_t>(k / 32) * 320;
    case PackedFormat::kQ5_0:
      return static_cast<size_t>(k / 32) * 352;
    case PackedFormat::kQ5_1:
      return static_cast<size_t>(k / 32) * 384;
    case PackedFormat::kQ8_0:
      return static_cast<size_t>(k / 32) * 544;
    case PackedFormat::kQ4_K:
      return static_cast<size_t>(k / 256) * 2368;
    case PackedFormat::kQ5_K:
      return static_cast<size_t>(k / 256) * 2880;
    case PackedFormat::kQ6_K:
      return static_cast<size_t>(k / 256) * 3360;
  }
  return 0;
}

/// Which representation of the activations a (format, ISA) pair multiplies with.
enum class ActKind : uint8_t { kF32, kBF16, kI8 };

/// Activations of `num_tokens` rows of `k` values (k is the packed k: a multiple of 32 for kI8).
struct Activations {
  const float* f32 = nullptr;      // [num_tokens][k]            kF32
  const uint16_t* bf16 = nullptr;  // [num_tokens][round_up(k,2)] kBF16, zero-padded
  // kI8: per 32-k block, x ~= d * X with the integer X = q (A8), or X = 128*q + q_lo (A15, q_lo in
  // [-64, 63]).
  const int8_t* q = nullptr;       // [num_tokens][k], in [-127, 127]
  const int8_t* q_lo = nullptr;    // [num_tokens][k], null in A8
  const float* d = nullptr;        // [num_tokens][k/32]
  const float* s = nullptr;        // [num_tokens][k/32]  d * sum of X over the block
  const int32_t* sum16 = nullptr;  // [num_tokens][k/16]  sum of X over each half block
};

/// out[t*out_stride + n] = sum_k W[n, k] * x[t, k] for the row blocks [row_block_begin,
/// row_block_end). The additions of one output happen in ascending block order in one chain,
/// whatever num_tokens is (kF8: a chain over each group of 128 k, in a chain over the groups):
/// results are bitwise independent of batch size and of how row blocks are split among threads.
struct MatmulParams {
  PackedFormat format = PackedFormat::kF32;
  const void* weights = nullptr;  // row block 0, 64-byte aligned
  int64_t k = 0;
  int32_t row_block_begin = 0;
  int32_t row_block_end = 0;
  int32_t num_tokens = 0;
  Activations x;
  float* out = nullptr;  // columns are padded to whole row blocks
  int64_t out_stride = 0;
};

/// Fills the kI8 arrays of Activations from f32 rows. Per block of 32: A8 d = absmax/127; A15
/// d = absmax/16256, X = round(x/d), q = round-half-up(X/128) in [-127, 127], q_lo = X - 128*q. d =
/// 0 gives zeros.
struct QuantizeParams {
  const float* x = nullptr;  // [num_tokens][x_stride]
  int64_t x_stride = 0;
  int64_t k = 0;
  int32_t num_tokens = 0;
  int8_t* q = nullptr;
  int8_t* q_lo = nullptr;  // null: A8
  float* d = nullptr;
  float* s = nullptr;
  int32_t* sum16 = nullptr;
};

// ------------------------------------------------------------------------------------------------
// Paged KV: block_size is a multiple of 16. For one layer, block b and kv head h, the page is at
// pool + b*block_stride + h*head_stride (bytes) and holds block_size/16 sub-pages of 16 tokens:
//
//   kBF16  K [head_dim/2][16 tokens][2] bfloat16, V [8 token pairs][head_dim][2] bfloat16
//   kI8    K [head_dim/2][16 tokens][2] int8, V [8 token pairs][head_dim][2] int8,
//          k_scale [16] float, v_scale [16] float; a value is code * scale of its token
//
// kI8 codes of a token's K, and likewise of its V: with a = the largest magnitude, scale = a / 127
// and code = x * (127 / a) rounded to nearest even. a < kMinCodedMagnitude gives scale 0 and codes
// 0; a value that is not finite gives scale NaN and codes 0. All of it depends on that token alone.
// ------------------------------------------------------------------------------------------------
enum class KvDtype : uint8_t { kBF16, kI8 };

inline constexpr int kSubPage = 16;          // tokens per sub-page
inline constexpr int kAttentionTile = 64;    // tokens per softmax tile, on the absolute grid
inline constexpr int kAttentionSplit = 512;  // tokens per split, on the absolute grid
inline constexpr int kMaxHeadDim = 256;
inline constexpr float kMinCodedMagnitude = 0x1p-100f;  // 1 / it, times a code, is a finite float

/// Bytes of one sub-page: a multiple of 64 when head_dim is even.
constexpr int64_t kv_sub_page_bytes(KvDtype dtype, int64_t head_dim) {
  const int64_t values = 2 * kSubPage * head_dim;
  return dtype == KvDtype::kBF16 ? 2 * values : values + 2 * kSubPage * int64_t{sizeof(float)};
}

struct KvView {
  uint8_t* pool = nullptr;   // first byte of the layer
  int64_t block_stride = 0;  // bytes
  int64_t head_stride = 0;   // bytes
  int32_t block_size = 0;
  int32_t head_dim = 0;
  int32_t sub_page_bytes = 0;  // kv_sub_page_bytes(dtype, head_dim)
  KvDtype dtype = KvDtype::kBF16;
};

/// Writes k and v rows of one kv head for consecutive positions. In bfloat16 pages, writing an even
/// position also clears the V slot of its odd partner, so that a pair never shows bytes of an
/// earlier owner.
struct KvWriteParams {
  KvView kv;
  int32_t kv_head = 0;
  const int32_t* block_table = nullptr;
  int32_t first_position = 0;
  int32_t num_tokens = 0;
  const float* k = nullptr;  // [num_tokens][stride], head_dim values each
  const float* v = nullptr;
  int64_t stride = 0;
};

/// K and V that the calling thread expects to read after a call. A hint for prefetching: it changes
/// no result.
struct KvAhead {
  const int32_t* block_table = nullptr;  // of the same KvView
  int32_t kv_head = 0;
  int32_t begin = 0;  // positions [begin, end); none when empty
  int32_t end = 0;
};

/// One work item of attention: the G query heads of one kv head, for a tile of consecutive query
/// tokens of one sequence, over the splits [split_begin, split_end). Row r = t*group + g. Token t
/// sits at position first_position + t and sees positions (window > 0 ? max(0, p-window+1) : 0) ..
/// p.
///
/// For every split a fresh online-softmax state {m, l, acc} is built over 64-token tiles in
/// ascending order (tile and split grids are absolute), and the split states are merged in
/// ascending order with merge(a, b): b.l == 0 -> a; a.l == 0 -> b; otherwise rescale both to max(m)
/// and add. Scores are in the base-2 domain. A row's result does not depend on the other rows of
/// the tile. The rows' final state goes to m, l [rows] and acc [rows][head_dim].
struct AttentionParams {
  KvView kv;
  int32_t kv_head = 0;
  const int32_t* block_table = nullptr;
  const float* q = nullptr;  // token t, head g at q + t*q_stride + g*head_dim, after RoPE, unscaled
  int64_t q_stride = 0;
  int32_t group = 1;  // query heads per kv head
  int32_t num_tokens = 0;
  int32_t first_position = 0;
  int32_t split_begin = 0;
  int32_t split_end = 0;
  int32_t window = 0;
  float scale = 1.f;    // multiplies q.k
  float softcap = 0.f;  // > 0: softcap * tanh(score / softcap)
  KvAhead next;
  float* m = nullptr;
  float* l = nullptr;
  float* acc = nullptr;
  void* scratch =
      nullptr;  // attention_scratch_bytes(), 64-byte aligned, private to the calling thread
};

/// Query tokens that one AttentionParams may carry: tile_tokens = max(1, kAttentionRows / group).
inline constexpr int kAttentionRows = 32;

/// Sequential merge of `count` states of `rows` rows ([count][rows] and [count][rows][head_dim])
/// and division by l: out[row*out_stride ...]; a row that saw nothing (l == 0) becomes zeros.
struct AttentionFinishParams {
  const float* m = nullptr;
  const float* l = nullptr;
  const float* acc = nullptr;
  int32_t count = 0;
  int32_t rows = 0;
  int32_t head_dim = 0;
  float* out = nullptr;  // row r at out + (r / group) * out_stride + (r % group) * head_dim
  int64_t out_stride = 0;
  int32_t group = 1;
};

struct CpuInfo;  // defined by kernels/cpu/cpu_info.h

/// The functions of one instruction set. All are noexcept on checked input and keep no state.
struct KernelTable {
  const char* name;                     // "generic", "avx2", "avx512", "avx512_bf16"
  ActKind act_kind[kNumPackedFormats];  // what matmul wants for each PackedFormat
  void (*matmul)(const MatmulParams&);
  void (*quantize)(const QuantizeParams&);
  void (*to_bf16)(const float* x, uint16_t* out, int64_t n);
  /// out = x / sqrt(mean(x^2) + eps) * weight; out may alias x.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  void (*add)(const float* a, const float* b, int64_t n, float* out);
  void (*scale)(float* x, float factor, int64_t n);
  /// NeoX rotation: pairs (i, i + rot/2), i < rot/2, in place; cos, sin [rot/2].
  void (*rope)(float* x, const float* cos, const float* sin, int64_t rot);
  void (*silu_mul)(const float* gate, const float* up, int64_t n, float* out);
  void (*gelu_tanh_mul)(const float* gate, const float* up, int64_t n, float* out);
  void (*softcap)(float* x, float cap, int64_t n);  // cap * tanh(x / cap)
  /// out = (x - mean) / sqrt(variance + eps) * weight + bias, both moments over n; out may alias x.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                     float* out);
  /// out = gelu(x + bias) with the exact gelu(y) = y * Phi(y), the normal distribution function;
  /// out may alias x.
  void (*bias_gelu)(const float* x, const float* bias, int64_t n, float* out);
  void (*softmax)(float* x, int64_t n);  // in place over one row of finite values
  void (*kv_write)(const KvWriteParams&);
  void (*attention)(const AttentionParams&);
  void (*attention_finish)(const AttentionFinishParams&);
  size_t attention_scratch_bytes;
  /// Largest value and its lowest index; NaN is never the largest (all NaN: index 0, value NaN).
  void (*argmax)(const float* x, int64_t n, float* value, int32_t* index);
  /// Sum over i of exp(x[i] - max), in double, in an order fixed by n alone.
  double (*sum_exp)(const float* x, float max, int64_t n);
  /// weights[i] = 2^((x[i] - largest) * rate) in double where x[i] >= cut, 0 elsewhere; returns
  /// their sum, in an order fixed by n alone. `cut` is finite (so -inf weighs 0) and high enough
  /// that no exponent at or above it is below -1000; `largest` is no smaller than any x. A weight
  /// is exactly 1 at `largest` and else within 2^-51 relative, beyond the rounding of its exponent.
  double (*sampling_weights)(const float* x, int64_t n, double largest, double rate, float cut,
                             double* weights);
};

}  // namespace sagellm::kernels
