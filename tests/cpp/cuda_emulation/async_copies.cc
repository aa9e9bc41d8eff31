// Copies that arrive later: cp.async, boxes of the copy engine, and the barriers that count them.
#include <algorithm>
#include <utility>

#include "emulator_state.h"

namespace cuda_emulation {

// --------------------------------------------------------------------------------------- cp.async
namespace {

void finish_group(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.from != nullptr) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
}

}  // namespace

void cp_async_16(void* shared, const void* source, bool valid, Place place) {
  check_aligned(shared, 16, "cp_async_16 (to)", place);
  check_aligned(source, 16, "cp_async_16 (from)", place);
  Block& block = state().block;
  check_shared(shared, 16, "cp_async_16 to", place);
  ++state().statistics.async_copies;
  state().statistics.global_bytes_streamed += valid ? 16 : 0;
  std::memset(shared, kPoison, 16);
  block.running->open_copies.push_back({shared, valid ? source : nullptr});
}

void cp_async_commit() {
  Fiber& self = *state().block.running;
  self.groups.push_back(std::exchange(self.open_copies, {}));
}

void cp_async_wait_groups(int pending) {
  Fiber& self = *state().block.running;
  while (self.groups.size() > static_cast<size_t>(pending)) {
    finish_group(self.groups.front());
    self.groups.erase(self.groups.begin());
  }
}

// --------------------------------------------------------------------------------------- mbarrier
// PTX ISA, "mbarrier": a phase ends when no arrival is pending and the tx-count is zero; the next
// one then expects as many arrivals again. The word holds it all, so that who overwrites it is
// found out.
namespace {

constexpr int kCountBits = 20;
constexpr int kMaxCount = (1 << kCountBits) - 1;
constexpr int kMaxBytes = (1 << 20) - 1;

struct Phase {
  int pending;   // arrivals
  int expected;  // in every phase
  int bytes;     // announced and not yet here; below zero when they come first
  int parity;
};

Phase decode(uint64_t word) {
  const auto bytes = static_cast<int>(word >> (2 * kCountBits) & 0x7fffff);
  return {.pending = static_cast<int>(word & kMaxCount),
          .expected = static_cast<int>(word >> kCountBits & kMaxCount),
          .bytes = bytes >= 0x400000 ? bytes - 0x800000 : bytes,
          .parity = mbarrier_parity(word)};
}
uint64_t encode(const Phase& phase) {
  return static_cast<uint64_t>(phase.pending) |
         static_cast<uint64_t>(phase.expected) << kCountBits |
         static_cast<uint64_t>(phase.bytes & 0x7fffff) << (2 * kCountBits) |
         static_cast<uint64_t>(phase.parity) << 63;
}

Phase load_phase(const uint64_t* barrier, Place place) {
  check_aligned(barrier, 8, "mbarrier", place);
  check_shared(barrier, 8, "mbarrier at", place);
  if (state().block.mbarriers.count(barrier) == 0) {
    fail("mbarrier that was not initialised at " + describe(place));
  }
  const Phase phase = decode(*barrier);
  if (phase.pending > phase.expected || phase.expected == kMaxCount) {
    fail("mbarrier that was overwritten at " + describe(place));
  }
  return phase;
}

void store_phase(uint64_t* barrier, Phase phase, Place place) {
  if (std::abs(phase.bytes) > kMaxBytes) {
    fail("mbarrier with a tx-count of " + std::to_string(phase.bytes) + " at " + describe(place));
  }
  if (phase.pending == 0 && phase.bytes == 0) {
    phase.pending = phase.expected;
    phase.parity ^= 1;
  }
  *barrier = encode(phase);
}

}  // namespace

void mbarrier_init(uint64_t* barrier, int arrivals, Place place) {
  check_aligned(barrier, 8, "mbarrier", place);
  check_shared(barrier, 8, "mbarrier at", place);
  if (arrivals < 1 || arrivals >= kMaxCount) {
    fail("mbarrier of " + std::to_string(arrivals) + " arrivals at " + describe(place));
  }
  state().block.mbarriers.insert(barrier);
  *barrier = encode({.pending = arrivals, .expected = arrivals, .bytes = 0, .parity = 0});
}

void mbarrier_arrive_expect(uint64_t* barrier, int bytes, Place place) {
  Phase phase = load_phase(barrier, place);
  phase.bytes += bytes;
  if (phase.pending-- == 0) fail("mbarrier with more arrivals than expected at " + describe(place));
  store_phase(barrier, phase, place);
  yield();  // whoever waits may go on before this thread does
}

void mbarrier_arrive(uint64_t* barrier, Place place) { mbarrier_arrive_expect(barrier, 0, place); }

void mbarrier_wait(uint64_t* barrier, int parity, Place place) {
  if (load_phase(barrier, place).parity != parity) return;
  Fiber& self = *state().block.running;
  self.waits_on = barrier;
  self.waits_parity = parity;
  self.waits_in = place;
  yield();
}

// ---------------------------------------------------------------------------------- boxes
namespace {

constexpr uint64_t kMapMark = 0x70616d5f726f736e;

/// What the emulated driver writes into a tensor map.
struct EncodedMap {
  uint64_t mark;
  const unsigned char* array;
  uint64_t dims[3];
  uint64_t strides[2];  // bytes
  uint32_t box[3];
  uint32_t swizzle;
};
static_assert(sizeof(EncodedMap) <= 128);

constexpr int kElementBytes = 2;
constexpr uint32_t kSwizzle128B = 3;

size_t box_bytes(const EncodedMap& map) {
  return size_t{map.box[0]} * map.box[1] * map.box[2] * kElementBytes;
}
EncodedMap map_of(const TensorBox& box) {
  EncodedMap map;
  std::memcpy(&map, box.map.data(), sizeof map);
  return map;
}

}  // namespace

// The limits of cuda.h for rank 3, 16-bit elements, no interleaving, 128-byte swizzle.
int encode_tensor_map(void* map, int type, uint32_t rank, void* address, const uint64_t* dims,
                      const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                      int interleave, int swizzle, int promotion, int fill) {
  constexpr int kInvalidValue = 1;
  bool valid = reinterpret_cast<uintptr_t>(map) % 64 == 0 && rank == 3 &&
               (type == 6 || type == 9) && reinterpret_cast<uintptr_t>(address) % 16 == 0 &&
               interleave == 0 && swizzle == static_cast<int>(kSwizzle128B) && promotion >= 0 &&
               promotion <= 3 && fill == 0;
  EncodedMap encoded{.mark = kMapMark,
                     .array = static_cast<const unsigned char*>(address),
                     .dims = {},
                     .strides = {},
                     .box = {},
                     .swizzle = kSwizzle128B};
  for (int i = 0; valid && i < 3; ++i) {
    valid = dims[i] > 0 && dims[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 &&
            element_strides[i] == 1;
    encoded.dims[i] = dims[i];
    encoded.box[i] = box[i];
  }
  for (int i = 0; valid && i < 2; ++i) {
    valid = strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40;
    encoded.strides[i] = strides[i];
  }
  if (!valid || box[0] * kElementBytes % 16 != 0 || box[0] * kElementBytes > 128) {
    return kInvalidValue;
  }
  std::memset(map, 0, 128);
  std::memcpy(map, &encoded, sizeof encoded);
  return 0;
}

void copy_tensor_box(void* shared, const void* map, uint64_t* barrier, int x, int y, int z,
                     Place place) {
  check_aligned(map, 64, "copy_box (map)", place);
  check_aligned(shared, 128, "copy_box (to)", place);
  (void)load_phase(barrier, place);
  BoxCopy copy{static_cast<unsigned char*>(shared), {.map = {}, .at = {x, y, z}}, barrier, place};
  std::memcpy(copy.box.map.data(), map, copy.box.map.size());
  const EncodedMap encoded = map_of(copy.box);
  if (encoded.mark != kMapMark) fail("copy_box with what is no tensor map at " + describe(place));
  const size_t bytes = box_bytes(encoded);
  check_shared(shared, bytes, "copy_box to", place);
  for (const BoxCopy& other : state().block.box_copies) {
    if (copy.to < other.to + box_bytes(map_of(other.box)) && other.to < copy.to + bytes) {
      fail("two boxes are on their way to the same place at " + describe(place));
    }
  }
  ++state().statistics.box_copies;
  std::memset(shared, kPoison, bytes);
  state().block.box_copies.push_back(copy);
}

// PTX ISA, "Swizzling Modes", 128 bytes: of an address in shared memory, the 16-byte piece (bits 4
// to 6) is exchanged by the row (bits 7 to 9).
void finish_box(const BoxCopy& copy) {
  const EncodedMap map = map_of(copy.box);
  const size_t row_bytes = size_t{map.box[0]} * kElementBytes;
  const unsigned char* shared = state().block.shared->data();
  for (uint32_t z = 0; z < map.box[2]; ++z) {
    for (uint32_t y = 0; y < map.box[1]; ++y) {
      for (uint32_t x = 0; x < map.box[0]; ++x) {
        const int64_t at[3] = {int64_t{copy.box.at[0]} + x, int64_t{copy.box.at[1]} + y,
                               int64_t{copy.box.at[2]} + z};
        bool inside = true;
        for (int i = 0; i < 3; ++i) {
          inside = inside && at[i] >= 0 && at[i] < static_cast<int64_t>(map.dims[i]);
        }
        const size_t linear = (size_t{z} * map.box[1] + y) * row_bytes + size_t{x} * kElementBytes;
        auto address = static_cast<size_t>(copy.to - shared) + linear;
        address ^= (address >> 7 & 7) << 4;
        unsigned char* to = state().block.shared->data() + address;
        if (inside) {
          std::memcpy(to,
                      map.array + at[0] * kElementBytes +
                          at[1] * static_cast<int64_t>(map.strides[0]) +
                          at[2] * static_cast<int64_t>(map.strides[1]),
                      kElementBytes);
        } else {
          std::memset(to, 0, kElementBytes);
        }
      }
    }
  }
  Phase phase = load_phase(copy.barrier, copy.place);
  phase.bytes -= static_cast<int>(box_bytes(map));
  store_phase(copy.barrier, phase, copy.place);
}

}  // namespace cuda_emulation
