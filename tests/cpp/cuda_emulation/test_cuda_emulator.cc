// The emulator against the PTX ISA, and against kernels with mistakes that it has to find.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_emulator.h"
#include "sagellm/kernels/cuda/ptx.cuh"

namespace {

using namespace sagellm::kernels::cuda;  // NOLINT: the kernel language under test
using cuda_emulation::EmulationError;

constexpr uint32_t kWarp = 32;

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

/// Runs `kernel` with `params` in one block and gives the message of the error it ends with.
template <typename Params>
std::string failure_of(void (*kernel)(Params), uint32_t threads, size_t shared,
                       const Params& params) {
  try {
    launch(kernel, Grid{}, threads, shared, nullptr, params);
  } catch (const EmulationError& error) {
    return error.what();
  }
  return "no error";
}

struct Words {
  uint32_t* words;  // [32][4]
  bool transposed;
};

/// Shared element i holds the number i; matrix j is rows 8 j .. 8 j + 7 of eight elements.
void load_numbered(Words p) {
  auto* shared = shared_memory<uint16_t>();
  for (int i = lane_id(); i < 256; i += kWarpSize) shared[i] = static_cast<uint16_t>(i);
  sync_block();
  uint32_t words[4];
  const auto* row = shared + lane_id() * 8;
  if (p.transposed) {
    ldmatrix_x4_trans(words, row);
  } else {
    ldmatrix_x4(words, row);
  }
  std::memcpy(p.words + lane_id() * 4, words, sizeof words);
}

// PTX ISA 8.5, ldmatrix: "thread 0 .. 3 hold row 0, 4 .. 7 row 1, ...", two elements each.
TEST(Ldmatrix, GivesLaneItsPairOfItsRow) {
  std::vector<uint32_t> words(128);
  launch(load_numbered, Grid{}, kWarp, 512, nullptr, {words.data(), false});
  // Lane 0: elements 0, 1 of row 0. Lane 5: row 1, elements 2, 3. Lane 31: row 7, elements 6, 7.
  EXPECT_EQ(words[0 * 4 + 0], 0x0001'0000u);
  EXPECT_EQ(words[5 * 4 + 0], (11u << 16) | 10u);
  EXPECT_EQ(words[31 * 4 + 0], (63u << 16) | 62u);
  EXPECT_EQ(words[5 * 4 + 3], ((192u + 11u) << 16) | (192u + 10u));  // matrix 3 starts at 192
}

TEST(Ldmatrix, TransposedGivesLaneItsPairOfItsColumn) {
  std::vector<uint32_t> words(128);
  launch(load_numbered, Grid{}, kWarp, 512, nullptr, {words.data(), true});
  // Lane 0: (0, 0), (1, 0). Lane 5 = 4 * 1 + 1: column 1 of rows 2, 3. Lane 31: column 7, rows
  // 6, 7.
  EXPECT_EQ(words[0 * 4 + 0], (8u << 16) | 0u);
  EXPECT_EQ(words[5 * 4 + 0], (25u << 16) | 17u);
  EXPECT_EQ(words[31 * 4 + 0], (63u << 16) | 55u);
  EXPECT_EQ(words[5 * 4 + 2], ((128u + 25u) << 16) | (128u + 17u));
}

struct OneProduct {
  int a_lane, a_word, a_part;  // the only 1 of A
  int b_lane, b_word, b_part;  // the only 1 of B
  float* c;                    // [32][4]
};

template <typename T>
void multiply_ones(OneProduct p) {
  const uint32_t one = std::is_same_v<T, bf16> ? 0x3f80 : 0x3c00;
  uint32_t a[4] = {};
  uint32_t b[2] = {};
  if (lane_id() == p.a_lane) a[p.a_word] = one << (16 * p.a_part);
  if (lane_id() == p.b_lane) b[p.b_word] = one << (16 * p.b_part);
  float c[4] = {};
  mma_m16n8k16<T>(c, a, b);
  std::memcpy(p.c + lane_id() * 4, c, sizeof c);
}

/// Where the product of one element of A with one of B lands: lane * 4 + register, or -1.
int landing(void (*kernel)(OneProduct), OneProduct product) {
  std::vector<float> c(128);
  product.c = c.data();
  launch(kernel, Grid{}, kWarp, 0, nullptr, product);
  int place = -1;
  for (int i = 0; i < 128; ++i) {
    if (c[static_cast<size_t>(i)] == 0.0f) continue;
    EXPECT_EQ(place, -1);
    place = i;
  }
  return place;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": with groupID = lane / 4
// and t = lane % 4, A's a0, a1 are (groupID, 2t + i), a2, a3 (groupID + 8, same), a4, a5 (groupID,
// 2t + 8 + i), a6, a7 (groupID + 8, 2t + 8 + i); B's b0, b1 are (2t + i, groupID), b2, b3 8 deeper;
// C's c0, c1 are (groupID, 2t + i), c2, c3 (groupID + 8, 2t + i).
TEST(MmaM16N8K16, FragmentsLieAsThePtxIsaSays) {
  // A (0, 0) * B (0, 0) -> C (0, 0): lane 0, register 0.
  EXPECT_EQ(landing(multiply_ones<bf16>, {0, 0, 0, 0, 0, 0, nullptr}), 0);
  // A of lane 13, a6 (word 3, low): (3 + 8, 2 + 8). B of lane 21, b2: (2 + 8, 5). C (11, 5): lane
  // 4 * 3 + 2, register 2 (row + 8) + 1 (odd column).
  EXPECT_EQ(landing(multiply_ones<bf16>, {13, 3, 0, 21, 1, 0, nullptr}), 14 * 4 + 3);
  EXPECT_EQ(landing(multiply_ones<f16>, {13, 3, 0, 21, 1, 0, nullptr}), 14 * 4 + 3);
  // A of lane 30, a1: (7, 5). B of lane 2, b1: (5, 0). C (7, 0): lane 28, register 0.
  EXPECT_EQ(landing(multiply_ones<bf16>, {30, 0, 1, 2, 0, 1, nullptr}), 28 * 4);
  // A of lane 4, a2 (word 1): (9, 0); a4 (word 2): (1, 8).
  EXPECT_EQ(landing(multiply_ones<bf16>, {4, 1, 0, 0, 0, 0, nullptr}), 4 * 4 + 2);
  EXPECT_EQ(landing(multiply_ones<bf16>, {4, 2, 0, 0, 1, 0, nullptr}), 4 * 4);
  // Another k: nothing.
  EXPECT_EQ(landing(multiply_ones<bf16>, {4, 2, 0, 0, 0, 0, nullptr}), -1);
}

struct OneInteger {
  int a_lane, a_word, a_part;
  int b_lane, b_word, b_part;
  int32_t* c;
};

void multiply_integers(OneInteger p) {
  uint32_t a[4] = {};
  uint32_t b[2] = {};
  if (lane_id() == p.a_lane) a[p.a_word] = 0xfdu << (8 * p.a_part);  // -3
  if (lane_id() == p.b_lane) b[p.b_word] = 0x05u << (8 * p.b_part);
  int32_t c[4] = {7, 7, 7, 7};
  mma_m16n8k32_s8(c, a, b);
  std::memcpy(p.c + lane_id() * 4, c, sizeof c);
}

// "Matrix Fragments for mma.m16n8k32": A's a0 .. a3 are (groupID, 4t + i), a4 .. a7 8 rows down,
// a8 .. a11 (groupID, 4t + 16 + i), a12 .. a15 both; B's b0 .. b3 are (4t + i, groupID), b4 .. b7
// 16 deeper.
TEST(MmaM16N8K32, FragmentsLieAsThePtxIsaSays) {
  std::vector<int32_t> c(128);
  // A lane 9, word 3, byte 2: (2 + 8, 4 + 2 + 16 = 22). B lane 29, word 1, byte 2: (22, 7). C (10,
  // 7): lane 4 * 2 + 3, register 3.
  launch(multiply_integers, Grid{}, kWarp, 0, nullptr, {9, 3, 2, 29, 1, 2, c.data()});
  for (size_t i = 0; i < c.size(); ++i) EXPECT_EQ(c[i], i == 11 * 4 + 3 ? 7 - 15 : 7) << i;
}

struct Bytes {
  uint8_t* codes;
  const float* values;
  float* decoded;
};

void convert_fp8(Bytes p) {
  for (int i = lane_id(); i < 256; i += kWarpSize) {
    p.decoded[i] = to_float(fp8{static_cast<uint8_t>(i)});
    p.codes[i] = from_float<fp8>(p.values[i]).bits;
  }
}

TEST(Fp8, DecodesEveryCodeAndEncodesItBack) {
  std::vector<float> values(256), decoded(256);
  std::vector<uint8_t> codes(256);
  for (int i = 0; i < 256; ++i) {  // e4m3 by its definition
    const int exponent = i >> 3 & 15;
    const float fraction = static_cast<float>(i & 7) / 8.0f;
    const float value =
        exponent == 0 ? std::ldexp(fraction, -6) : std::ldexp(1.0f + fraction, exponent - 7);
    values[static_cast<size_t>(i)] = (i & 0x80) != 0 ? -value : value;
  }
  launch(convert_fp8, Grid{}, kWarp, 0, nullptr, {codes.data(), values.data(), decoded.data()});
  for (int i = 0; i < 256; ++i) {
    const auto at = static_cast<size_t>(i);
    EXPECT_EQ(decoded[at], values[at]) << i;                    // the NaN patterns decode to 480
    EXPECT_EQ(codes[at], (i & 0x7f) == 0x7f ? i - 1 : i) << i;  // and 480 saturates
  }
}

TEST(Fp8, RoundsToNearestEven) {
  std::vector<float> values(256, 0.0f), decoded(256);
  std::vector<uint8_t> codes(256);
  values[0] = 1.0625f;  // between 1 (0x38) and 1.125 (0x39): even
  values[1] = 1.1875f;  // between 1.125 (0x39) and 1.25 (0x3a): even
  values[2] = 1.07f;
  values[3] = std::ldexp(1.0f, -10);  // between 0 and the smallest: even
  values[4] = std::ldexp(1.5f, -9);   // between 1 and 2 smallest: even
  values[5] = 1e9f;
  values[6] = std::ldexp(7.75f, -9);  // rounds up to the smallest normal
  launch(convert_fp8, Grid{}, kWarp, 0, nullptr, {codes.data(), values.data(), decoded.data()});
  codes.resize(7);
  EXPECT_EQ(codes, (std::vector<uint8_t>{0x38, 0x3a, 0x39, 0x00, 0x02, 0x7e, 0x08}));
}

struct Floats {
  float* out;
};

void reduce(Floats p) {
  p.out[threadIdx.x] = warp_sum(static_cast<float>(lane_id()));
  p.out[threadIdx.x] += warp_max<4>(static_cast<float>(lane_id()));
  p.out[threadIdx.x] += static_cast<float>(shfl(lane_id(), 3) + __popc(ballot(lane_id() < 5)));
}

TEST(WarpOperations, ReachTheRightLanes) {
  for (const uint64_t seed : {0u, 1u}) {
    cuda_emulation::set_order(seed);
    std::vector<float> out(64);
    launch(reduce, Grid{}, 64, 0, nullptr, {out.data()});
    for (int i = 0; i < 64; ++i) {
      const int group_maximum = i % 32 / 4 * 4 + 3;
      EXPECT_EQ(out[static_cast<size_t>(i)], static_cast<float>(496 + group_maximum + 3 + 5));
    }
  }
  cuda_emulation::set_order(0);
}

// ------------------------------------------------------------------------- mistakes that are found
void half_of_the_block_syncs(Floats) {
  if (threadIdx.x < 32) sync_block();
}
void places_differ(Floats) {
  if (threadIdx.x < 32) {
    sync_block();
  } else {
    sync_block();
  }
}
void lane_missing(Floats) {
  if (lane_id() != 7) (void)shfl_xor(1, 1);
}

TEST(Mistakes, BarriersThatNotAllReach) {
  EXPECT_PRED2(contains, failure_of(half_of_the_block_syncs, 64, 0, {}), "32 have ended");
  EXPECT_PRED2(contains, failure_of(places_differ, 64, 0, {}), "different places");
  EXPECT_PRED2(contains, failure_of(lane_missing, 32, 0, {}), "31 at test_cuda_emulator.cc");
}

#if !defined(__SANITIZE_ADDRESS__)  // which reports these itself
struct Access {
  float* memory;
  int64_t index;
};
void read_global(Access p) {
  if (threadIdx.x == 3) p.memory[0] = p.memory[p.index];
}
void read_shared(Access p) { shared_memory<float>()[0] = shared_memory<float>()[p.index]; }

TEST(Mistakes, AccessOutsideMemory) {
  auto* memory = static_cast<float*>(cuda_emulation::allocate(4096));
  EXPECT_PRED2(contains, failure_of(read_global, 32, 0, {memory, 1024}),
               "0 bytes behind an allocation of 4096 bytes (block 0,0,0 thread 3)");
  EXPECT_PRED2(contains, failure_of(read_shared, 32, 2048, {nullptr, 512}),
               "0 bytes behind shared memory of 2048 bytes");
  EXPECT_EQ(failure_of(read_global, 32, 0, {memory, 1023}), "no error");  // and goes on working
  cuda_emulation::release(memory);
}
#endif

TEST(Mistakes, BytesWrittenBesideAnAllocation) {
  auto* memory = static_cast<unsigned char*>(cuda_emulation::allocate(5));
  memory[5] = 0;
  EXPECT_THROW(cuda_emulation::release(memory), EmulationError);
}

TEST(Mistakes, UnwrittenMemoryIsNotANumber) {
  auto* memory = static_cast<float*>(cuda_emulation::allocate(64));
  EXPECT_TRUE(std::isnan(memory[0]));
  cuda_emulation::release(memory);
}

struct CopyCase {
  const uint32_t* from;
  uint32_t* out;
  bool wait;
};
void copy_asynchronously(CopyCase p) {
  auto* shared = shared_memory<uint32_t>();
  cp_async_16(shared + 4 * threadIdx.x, p.from, lane_id() != 1);
  cp_async_commit();
  if (p.wait) cp_async_wait<0>();
  sync_block();
  p.out[threadIdx.x] = shared[4 * threadIdx.x];
}

TEST(Mistakes, CopiesReadBeforeTheWaitArePoison) {
  alignas(16) const uint32_t from[4] = {42, 43, 44, 45};
  std::vector<uint32_t> out(32);
  launch(copy_asynchronously, Grid{}, kWarp, 512, nullptr, {from, out.data(), true});
  EXPECT_EQ(out[0], 42u);
  EXPECT_EQ(out[1], 0u);  // not valid: zeros
  launch(copy_asynchronously, Grid{}, kWarp, 512, nullptr, {from, out.data(), false});
  EXPECT_EQ(out[0], 0xffff'ffffu);
  EXPECT_PRED2(contains, failure_of(copy_asynchronously, kWarp, 512, {from + 1, out.data(), true}),
               "aligned");
  EXPECT_PRED2(contains, failure_of(copy_asynchronously, kWarp, 256, {from, out.data(), true}),
               "outside shared memory");
}

struct Race {
  float* out;
};
/// Lacks the barrier between writing and reading.
void forgets_a_barrier(Race p) {
  shared_memory<float>()[threadIdx.x] = 1.0f;
  p.out[threadIdx.x] = shared_memory<float>()[threadIdx.x ^ 32];
}

TEST(Mistakes, MissingBarriersShowAsPoison) {
  std::vector<float> out(64);
  launch(forgets_a_barrier, Grid{}, 64, 256, nullptr, {out.data()});
  EXPECT_TRUE(std::isnan(out[0]));
}

void conflicting_rows(Floats) {
  uint32_t words[4];
  ldmatrix_x4(words, shared_memory<unsigned char>() + lane_id() * 128);
}

TEST(Statistics, CountBankConflictsOfMatrixLoads) {
  cuda_emulation::statistics() = {};
  launch(conflicting_rows, Grid{}, kWarp, 4096, nullptr, {});
  EXPECT_EQ(cuda_emulation::statistics().matrix_loads, 1);
  EXPECT_EQ(cuda_emulation::statistics().matrix_load_phases, 32);  // eight times the best
}

}  // namespace
