// Products of a warpgroup, one warp at a time. They happen when a warp waits for them, as late as
// hardware may: who overwrites shared memory or fragments before that is found out.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "emulator_state.h"

namespace cuda_emulation {

namespace {

// Shared memory does not begin at address 0: the system keeps the first kilobyte of every block.
constexpr uint32_t kSharedWindow = 1024;
constexpr int kDepth = 16;  // k of 16-bit elements

/// PTX ISA, "Matrix Descriptor Format" of wgmma. Strides and start in bytes.
struct Descriptor {
  uint32_t start;
  uint32_t leading;
  uint32_t stride;
  uint32_t span;  // 16-byte pieces that the swizzling mode permutes: 1 (none), 2, 4, 8
};

Descriptor decode_descriptor(uint64_t bits, Place place) {
  constexpr uint64_t kUsed = uint64_t{0x3fff} | uint64_t{0x3fff} << 16 | uint64_t{0x3fff} << 32 |
                             uint64_t{7} << 49 | uint64_t{3} << 62;
  if ((bits & ~kUsed) != 0)
    fail("wgmma descriptor with bits that mean nothing at " + describe(place));
  if ((bits >> 49 & 7) != 0) fail("wgmma descriptor with a base offset at " + describe(place));
  constexpr uint32_t kSpans[4] = {1, 8, 4, 2};
  return {.start = static_cast<uint32_t>(bits & 0x3fff) << 4,
          .leading = static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4,
          .stride = static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4,
          .span = kSpans[bits >> 62]};
}

/// Bytes from the start to element (row, k), before swizzling. PTX ISA, "Strides" and "Canonical
/// Layouts": in pieces of 16 bytes (8 elements),
///   K-major   no swizzle ((8, rows/8), 2) : ((1, SBO), LBO),   else ((8, rows/8), 2) : ((W, SBO),
///   1) MN-major  no swizzle ((1, rows/8), (8, 2)) : ((X, SBO), (1, LBO)),
///             else ((W, rows/8W), (8, 2)) : ((1, LBO), (W, SBO))
/// with W the span of the swizzling mode.
uint32_t offset_of(const Descriptor& d, uint32_t row, uint32_t k, bool mn_major) {
  const bool plain = d.span == 1;
  if (!mn_major) {
    return row % 8 * d.span * 16 + row / 8 * d.stride + k / 8 * (plain ? d.leading : 16) +
           k % 8 * 2;
  }
  if (plain) return row % 8 * 2 + row / 8 * d.stride + k % 8 * 16 + k / 8 * d.leading;
  return row % 8 * 2 + row / 8 % d.span * 16 + row / 8 / d.span * d.leading + k % 8 * d.span * 16 +
         k / 8 * d.stride;
}

float element(const Descriptor& d, uint32_t row, uint32_t k, bool mn_major, bool is_bf16,
              Place place) {
  uint32_t address = d.start + offset_of(d, row, k, mn_major);
  address ^= (address >> 7 & (d.span - 1)) << 4;
  const unsigned char* from = state().block.shared->data() + address - kSharedWindow;
  if (address < kSharedWindow) fail("wgmma reads below shared memory at " + describe(place));
  check_shared(from, 2, "wgmma reads", place);
  uint16_t bits;
  std::memcpy(&bits, from, 2);
  return is_bf16 ? bits_to_float(static_cast<uint32_t>(bits) << 16) : f16_bits_to_float(bits);
}

/// PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16": of A, a lane's four words are rows
/// lane / 4 and eight below, elements 2 (lane % 4) and eight further on, of the warp's sixteen
/// rows.
void fragment_of_a(const WarpProduct& product, float (&a)[16][kDepth]) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!std::equal(product.a_words[lane], product.a_words[lane] + 4, product.a[lane])) {
      fail("a wgmma's fragment was changed before its wait, at " + describe(product.place));
    }
    for (int w = 0; w < 4; ++w) {
      for (int i = 0; i < 2; ++i) {
        const auto bits = static_cast<uint16_t>(product.a_words[lane][w] >> (16 * i));
        a[lane / 4 + w % 2 * 8][lane % 4 * 2 + w / 2 * 8 + i] =
            product.is_bf16 ? bits_to_float(static_cast<uint32_t>(bits) << 16)
                            : f16_bits_to_float(bits);
      }
    }
  }
}

void multiply_now(Warp& warp, int warp_in_group, const WarpProduct& product) {
  ++state().statistics.warpgroup_products;
  float a[16][kDepth];
  if (product.a_in_registers) {
    fragment_of_a(product, a);
  } else {
    const Descriptor d = decode_descriptor(product.descriptor_a, product.place);
    for (uint32_t m = 0; m < 16; ++m) {
      for (uint32_t k = 0; k < kDepth; ++k) {
        a[m][k] = element(d, static_cast<uint32_t>(warp_in_group) * 16 + m, k, false,
                          product.is_bf16, product.place);
      }
    }
  }
  const Descriptor d = decode_descriptor(product.descriptor_b, product.place);
  std::vector<double> b(static_cast<size_t>(kDepth * product.n));  // [k][n]
  for (int n = 0; n < product.n; ++n) {
    for (int k = 0; k < kDepth; ++k) {
      b[static_cast<size_t>(k * product.n + n)] =
          element(d, static_cast<uint32_t>(n), static_cast<uint32_t>(k), product.transposed_b,
                  product.is_bf16, product.place);
    }
  }
  std::vector<double> sums(static_cast<size_t>(product.n));
  InFlight& d_values = warp.in_flight.at(product.accumulators);
  for (int m = 0; m < 16; ++m) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int k = 0; k < kDepth; ++k) {
      const auto left = static_cast<double>(a[m][k]);
      const double* right = b.data() + k * product.n;
      for (int n = 0; n < product.n; ++n) sums[static_cast<size_t>(n)] += left * right[n];
    }
    for (int n = 0; n < product.n; ++n) {  // lane 4 (m % 8) + n % 8 / 2 has column n of row m
      const int lane = m % 8 * 4 + n % 8 / 2;
      float& to = d_values.values[lane][static_cast<size_t>(n / 8 * 4 + m / 8 * 2 + n % 2)];
      const double before = product.add ? static_cast<double>(to) : 0.0;
      to = static_cast<float>(before + sums[static_cast<size_t>(n)]);
    }
  }
  --d_values.products;
}

Warp& running_warp() {
  Block& block = state().block;
  return block.warps[static_cast<size_t>(block.running->index / 32)];
}

struct Issue {
  WarpProduct product;
  float* d;
  const uint32_t* a;
};

void issue(void* const* lanes) {
  Warp& warp = running_warp();
  const auto index = static_cast<size_t>(state().block.running->index / 32);
  Issue& first = *static_cast<Issue*>(lanes[0]);
  WarpProduct product = first.product;
  if (!warp.fenced) fail("wgmma without wgmma_fence before it at " + describe(product.place));
  InFlight& d = warp.in_flight[first.d];
  const bool fresh = d.products++ == 0;
  for (int lane = 0; lane < 32; ++lane) {
    const Issue& mine = *static_cast<Issue*>(lanes[lane]);
    if (mine.product.descriptor_a != product.descriptor_a ||
        mine.product.descriptor_b != product.descriptor_b || mine.product.n != product.n) {
      fail("lanes bring different operands to wgmma at " + describe(product.place));
    }
    product.a[lane] = mine.a;
    if (mine.a != nullptr) std::copy(mine.a, mine.a + 4, product.a_words[lane]);
    if (fresh && d.values[lane].empty()) {
      d.lanes[lane] = mine.d;
      d.values[lane].assign(mine.d, mine.d + product.n / 2);
      std::memset(mine.d, kPoison, static_cast<size_t>(product.n) * 2);
    } else if (d.lanes[lane] != mine.d ||
               d.values[lane].size() * 2 != static_cast<size_t>(product.n)) {
      fail("accumulators of a wgmma overlap those of another at " + describe(product.place));
    }
  }
  product.accumulators = first.d;
  warp.open_products.push_back(product);

  // The four warps of a warpgroup start the same products in the same order.
  std::vector<IssuedProduct>& issued = state().block.warpgroups[index / 4];
  const IssuedProduct mine{product.n, product.descriptor_a, product.descriptor_b};
  if (warp.products_issued == issued.size()) issued.push_back(mine);
  if (!(issued[warp.products_issued++] == mine)) {
    fail("warps of one warpgroup start different products at " + describe(product.place));
  }
}

struct Wait {
  int pending;
  float* d;
  Place place;
};

void wait_for_products(void* const* lanes) {
  Warp& warp = running_warp();
  const Wait& first = *static_cast<Wait*>(lanes[0]);
  const int warp_in_group = state().block.running->index / 32 % 4;
  while (warp.product_groups.size() > static_cast<size_t>(first.pending)) {
    for (const WarpProduct& product : warp.product_groups.front()) {
      multiply_now(warp, warp_in_group, product);
    }
    warp.product_groups.pop_front();
  }
  warp.fenced = false;
  const auto found = warp.in_flight.find(first.d);
  if (found == warp.in_flight.end() || found->second.products != 0) {
    fail("wgmma_wait for accumulators that are not complete at " + describe(first.place));
  }
  for (int lane = 0; lane < 32; ++lane) {
    std::copy(found->second.values[lane].begin(), found->second.values[lane].end(),
              found->second.lanes[lane]);
  }
  warp.in_flight.erase(found);
}

void change_registers(int count, bool raise, Place place) {
  Warp& warp = running_warp();
  if (count % 8 != 0 || count < 24 || count > 256 ||
      (raise ? count < warp.registers : count > warp.registers)) {
    fail("setmaxnreg from " + std::to_string(warp.registers) + " to " + std::to_string(count) +
         " at " + describe(place));
  }
  sync_warp(place);
  warp.registers = count;
}

}  // namespace

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) -
                               state().block.shared->data()) +
         kSharedWindow;
}

void wgmma_fence(Place place) {
  sync_warp(place);
  running_warp().fenced = true;
}

void wgmma(float* d, int n, const uint32_t* a, uint64_t descriptor_a, uint64_t descriptor_b,
           bool add, bool transposed_b, bool is_bf16, Place place) {
  if (n % 8 != 0 || n < 8 || n > 256) fail("wgmma of n " + std::to_string(n));
  Issue mine{{.n = n,
              .is_bf16 = is_bf16,
              .add = add,
              .transposed_b = transposed_b,
              .a_in_registers = a != nullptr,
              .descriptor_a = descriptor_a,
              .descriptor_b = descriptor_b,
              .accumulators = nullptr,
              .a = {},
              .a_words = {},
              .place = place},
             d,
             a};
  warp_operation(issue, &mine, place);
}

void wgmma_commit(Place place) {
  struct Nothing {
  } nothing;
  warp_operation(
      [](void* const*) {
        Warp& warp = running_warp();
        warp.product_groups.push_back(std::move(warp.open_products));
        warp.open_products.clear();
      },
      &nothing, place);
}

void wgmma_wait_groups(int pending, float* d, Place place) {
  if (this_lane() == 0) {  // products take a while, in which others go on
    const uint64_t turns = state().seed == 0 ? 8 : state().random() % 32;
    for (uint64_t i = 0; i < turns; ++i) yield();
  }
  Wait mine{pending, d, place};
  warp_operation(wait_for_products, &mine, place);
}

void raise_registers_to(int count, Place place) { change_registers(count, true, place); }
void lower_registers_to(int count, Place place) { change_registers(count, false, place); }

}  // namespace cuda_emulation
