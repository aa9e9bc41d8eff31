// The emulated wgmma, mbarrier and copy engine against the PTX ISA, and against kernels with
// mistakes.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_emulator.h"
#include "sagellm/kernels/cuda/wgmma.cuh"

namespace {

using namespace sagellm::kernels::cuda;  // NOLINT: the kernel language under test
using cuda_emulation::EmulationError;

constexpr uint32_t kGroup = 128;
constexpr uint16_t kOne = 0x3f80;  // bfloat16

template <typename Params>
std::string failure_of(void (*kernel)(Params), uint32_t threads, size_t shared,
                       const std::type_identity_t<Params>& params) {
  try {
    launch(kernel, Grid{}, threads, shared, nullptr, params);
  } catch (const EmulationError& error) {
    return error.what();
  }
  return "no error";
}
bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// --------------------------------------------------------------------------------------- products
constexpr int kBytesOfA = 64 * 128;
constexpr int kBytesOfB = 16 * 2048;

struct Ones {
  int a_byte;  // of the only 1 of A in shared memory, or -1: in registers
  int a_thread, a_word, a_part;
  int b_byte;  // of the only 1 of B
  uint64_t descriptor_a, descriptor_b;
  float* d;  // [128][64]
};

void multiply_ones(Ones p) {
  auto* shared = shared_memory<unsigned char>();
  for (int i = static_cast<int>(threadIdx.x); i < kBytesOfA + kBytesOfB; i += kGroup) shared[i] = 0;
  sync_block();
  if (threadIdx.x == 0) {
    if (p.a_byte >= 0) std::memcpy(shared + p.a_byte, &kOne, 2);
    std::memcpy(shared + kBytesOfA + p.b_byte, &kOne, 2);
  }
  sync_block();
  const uint64_t a = p.descriptor_a | shared_address(shared) >> 4;
  const uint64_t b = p.descriptor_b | shared_address(shared + kBytesOfA) >> 4;
  float d[64] = {};
  uint32_t words[4] = {};
  if (static_cast<int>(threadIdx.x) == p.a_thread) {
    words[p.a_word] = static_cast<uint32_t>(kOne) << (16 * p.a_part);
  }
  wgmma_fence();
  if (p.a_byte >= 0) {
    wgmma_shared<bf16>(d, a, b, false);
  } else {
    wgmma_registers<bf16>(d, words, b, false);
  }
  wgmma_commit();
  wgmma_wait<0>(d);
  std::memcpy(p.d + 64 * threadIdx.x, d, sizeof d);
}

/// Where the product of one element of A with one of B lands: thread * 64 + register, or -1.
int landing(Ones ones) {
  std::vector<float> d(128 * 64);
  ones.d = d.data();
  launch(multiply_ones, Grid{}, kGroup, kBytesOfA + kBytesOfB, nullptr, ones);
  int place = -1;
  for (size_t i = 0; i < d.size(); ++i) {
    if (d[i] == 0.0f) continue;
    EXPECT_EQ(place, -1);
    place = static_cast<int>(i);
  }
  return place;
}

constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
constexpr uint64_t kStride1024 = uint64_t{64} << 32;

// "Shared Memory Matrix Layout", K-major, 128-byte swizzling: element (37, 11) of A lies in block
// 37 / 8 = 4 of eight rows, row 5 of it, 16-byte piece (11 / 8) ^ 5 = 4, element 3. (21, 11) of B:
// block 2, row 5, piece 4, element 3. D (37, 21): warp 2, row 5, block of columns 2, column 5, so
// thread 64 + 4 * 5 + 2, register 4 * 2 + 1.
TEST(Wgmma, ReadsKMajorMatricesSwizzledBy128Bytes) {
  const Ones ones{.a_byte = 4 * 1024 + 5 * 128 + 4 * 16 + 3 * 2,
                  .a_thread = -1,
                  .a_word = 0,
                  .a_part = 0,
                  .b_byte = 2 * 1024 + 5 * 128 + 4 * 16 + 3 * 2,
                  .descriptor_a = kSwizzle128 | kStride1024,
                  .descriptor_b = kSwizzle128 | kStride1024,
                  .d = nullptr};
  EXPECT_EQ(landing(ones), (64 + 4 * 5 + 2) * 64 + 4 * 2 + 1);
  Ones elsewhere = ones;  // the neighbouring piece is k 3: no product with k 11 of A
  elsewhere.b_byte ^= 16;
  EXPECT_EQ(landing(elsewhere), -1);
  Ones wider = ones;  // a stride of 2048 bytes: the block at 2048 is the second
  wider.descriptor_b = kSwizzle128 | uint64_t{128} << 32;
  EXPECT_EQ(landing(wider) % 64, 1 * 4 + 1);
}

// "Matrix Fragments for wgmma.mma_async.m64nNk16": thread 32 * 3 + 4 * 6 + 1, a5 (word 2, high):
// row 48 + 6, k 2 * 1 + 8 + 1 = 11. N-major: n 77 of k 11 lies in the second 64 of n (leading
// stride), block 1 of eight k (stride), row 3, piece (13 / 8) ^ 3 = 2, element 5. D (54, 77): warp
// 3, row 6, block of columns 9, column 5.
TEST(Wgmma, ReadsFragmentsAndNMajorMatrices) {
  const Ones ones{.a_byte = -1,
                  .a_thread = 96 + 4 * 6 + 1,
                  .a_word = 2,
                  .a_part = 1,
                  .b_byte = 2048 + 1024 + 3 * 128 + 2 * 16 + 5 * 2,
                  .descriptor_a = 0,
                  .descriptor_b = kSwizzle128 | kStride1024 | uint64_t{2048 >> 4} << 16,
                  .d = nullptr};
  EXPECT_EQ(landing(ones), (96 + 4 * 6 + 2) * 64 + 4 * 9 + 1);
}

TEST(Wgmma, DescriptorsOfTheKernelsAreThese) {
  struct Encoded {
    uint64_t* out;
  };
  uint64_t out[2] = {};
  launch(
      +[](Encoded p) {
        if (threadIdx.x != 0) return;
        p.out[0] = matrix_descriptor(shared_memory<unsigned char>() + 2048, 16384);
        p.out[1] = moved(p.out[0], 32);
      },
      Grid{}, 32, 4096, nullptr, Encoded{out});
  const uint64_t start = (1024 + 2048) >> 4;
  EXPECT_EQ(out[0], kSwizzle128 | kStride1024 | uint64_t{1024} << 16 | start);
  EXPECT_EQ(out[1], out[0] + 2);
}

// --------------------------------------------------------------------------------------- mistakes
struct Mistake {
  int kind;
  float* out;
};
enum Kind : int { kNone, kNoFence, kReadEarly, kFragmentChanged, kDifferentWarps, kOverwritten };

void mistaken_product(Mistake p) {
  auto* shared = shared_memory<unsigned char>();
  for (int i = static_cast<int>(threadIdx.x); i < 4096; i += kGroup) shared[i] = 0;
  sync_block();
  const int warp = p.kind == kDifferentWarps ? warp_id() : 0;
  const uint64_t b = matrix_descriptor(shared + 1024 * warp, 1024);
  float d[32] = {};
  uint32_t a[4] = {};
  if (p.kind != kNoFence) wgmma_fence();
  wgmma_registers<bf16>(d, a, b, true);
  wgmma_commit();
  p.out[threadIdx.x] = d[0];
  if (p.kind == kReadEarly) return;
  if (p.kind == kFragmentChanged) a[0] = 1;
  if (p.kind == kOverwritten) std::memset(shared + 2 * threadIdx.x, 0xff, 2);
  wgmma_wait<0>(d);
  p.out[threadIdx.x] = d[0];
}

TEST(Wgmma, FindsMistakes) {
  std::vector<float> out(kGroup);
  const auto run = [&](int kind) {
    return failure_of(mistaken_product, kGroup, 8192, {kind, out.data()});
  };
  EXPECT_EQ(run(kNone), "no error");
  EXPECT_EQ(out[0], 0.0f);
  EXPECT_PRED2(contains, run(kNoFence), "wgmma_fence");
  EXPECT_PRED2(contains, run(kFragmentChanged), "fragment was changed");
  EXPECT_PRED2(contains, run(kDifferentWarps), "different products");
  EXPECT_EQ(run(kReadEarly), "no error");
  EXPECT_TRUE(std::isnan(out[0]));
  (void)run(kOverwritten);
  EXPECT_TRUE(std::isnan(out[0]));  // 0 * NaN
}

// --------------------------------------------------------------------------------- boxes, barriers
struct Box {
  TensorMap map;
  int x, y, z;
  bool wait;
  uint16_t* out;  // [8][64]
};

void copy_one_box(Box p) {
  auto* shared = shared_memory<unsigned char>();
  auto* barrier = reinterpret_cast<uint64_t*>(shared + 1024);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_publish();
    mbarrier_arrive_expect(barrier, 1024);
    copy_box(shared, &p.map, barrier, p.x, p.y, p.z);
  }
  sync_block();
  if (p.wait) mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 512; i += kWarpSize) {
    std::memcpy(p.out + i, shared + swizzled(i / 64, i % 64 / 8) + i % 8 * 2, 2);
  }
  if (!p.wait) mbarrier_wait(barrier, 0);
}

/// An array [2][12][64 + 32] of numbers from 0, with boxes of 8 x 64.
struct Numbered {
  std::vector<uint16_t> values;
  TensorMap map;

  Numbered() : values(2 * 12 * 96) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(i + 1);
    const uint64_t dims[3] = {96, 12, 2};
    const uint64_t strides[2] = {192, 12 * 192};
    const uint32_t box[3] = {64, 8, 1};
    const uint32_t every[3] = {1, 1, 1};
    EXPECT_EQ(cuda_emulation::encode_tensor_map(&map, 9, 3, values.data(), dims, strides, box,
                                                every, 0, 3, 2, 0),
              0);
  }
  uint16_t at(int z, int y, int x) const {
    if (x >= 96 || y >= 12 || z >= 2) return 0;
    return values[static_cast<size_t>((z * 12 + y) * 96 + x)];
  }
};

TEST(CopyBox, LandsSwizzledAndFillsWithZerosBeyondTheArray) {
  const Numbered numbered;
  for (const auto& [x, y, z] : {std::array{0, 0, 0}, std::array{64, 8, 1}, std::array{0, 12, 1}}) {
    std::vector<uint16_t> out(512);
    launch(copy_one_box, Grid{}, 32, 2048, nullptr, {numbered.map, x, y, z, true, out.data()});
    for (int i = 0; i < 512; ++i) {
      EXPECT_EQ(out[static_cast<size_t>(i)], numbered.at(z, y + i / 64, x + i % 64)) << i;
    }
  }
}

TEST(CopyBox, IsPoisonBeforeItsBarrier) {
  const Numbered numbered;
  std::vector<uint16_t> out(512);
  launch(copy_one_box, Grid{}, 32, 2048, nullptr, {numbered.map, 0, 0, 0, false, out.data()});
  EXPECT_EQ(out[31], 0xffff);  // of the last to pass the barrier: no box has landed since
}

void misuse_of_barriers(Mistake p) {
  auto* barrier = shared_memory<uint64_t>();
  if (threadIdx.x == 0 && p.kind != 0) mbarrier_init(barrier, 2);
  sync_block();
  if (p.kind == 0) mbarrier_arrive(barrier);
  if (p.kind == 1) mbarrier_wait(barrier, 0);  // nobody arrives
  if (p.kind == 2) {
    if (threadIdx.x == 0) *barrier = ~uint64_t{0};
    sync_block();
    mbarrier_arrive(barrier);
  }
  if (p.kind == 3) {  // two arrivals end a phase, whose parity is 0; the parity before it is 1
    mbarrier_wait(barrier, 1);
    sync_block();
    if (threadIdx.x < 2) mbarrier_arrive(barrier);
    mbarrier_wait(barrier, 0);
  }
}

TEST(Mbarrier, CountsArrivalsAndFindsMisuse) {
  const auto run = [&](int kind) {
    return failure_of(misuse_of_barriers, 32, 64, {kind, nullptr});
  };
  EXPECT_PRED2(contains, run(0), "not initialised");
  EXPECT_PRED2(contains, run(1), "wait for ever");
  EXPECT_PRED2(contains, run(2), "overwritten");
  EXPECT_EQ(run(3), "no error");
}

void uneven_arrivals(Mistake p) {
  if (warp_id() == 0) arrive_named(1, p.kind);
  if (warp_id() == 1) sync_named(1, 64);
}
TEST(NamedBarriers, WaitOnlyForThoseWhoSync) {
  EXPECT_EQ(failure_of(uneven_arrivals, 64, 0, {64, nullptr}), "no error");
  EXPECT_PRED2(contains, failure_of(uneven_arrivals, 64, 0, {96, nullptr}), "others wait");
}

}  // namespace
