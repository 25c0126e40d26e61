#include "cpu/fingerprint.h"

#include <bit>
#include <cstring>

namespace amct_ext::cpu {
namespace {

constexpr size_t kLanes = 8, kStripe = kLanes * sizeof(uint64_t);
constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u;

// Mixes in a word; a bijection in either argument, so different inputs stay different. The rotation brings the upper
// bits down to where the product spreads them.
uint64_t mix(uint64_t state, uint64_t word) { return std::rotl(state ^ word, 29) * kOdd; }

struct State {
  uint64_t lanes[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8};

  void consume(const char* stripe) {
    uint64_t words[kLanes];
    std::memcpy(words, stripe, kStripe);
    for (size_t i = 0; i < kLanes; ++i) lanes[i] = mix(lanes[i], words[i]);
  }
};

}  // namespace

uint64_t fingerprint(const void* data, size_t bytes, size_t stripes) {
  const char* start = static_cast<const char*>(data);
  const size_t all = bytes / kStripe;
  State state;
  if (stripes >= all) {
    for (size_t i = 0; i < all; ++i) state.consume(start + i * kStripe);
  } else {
    // One stripe of each part, at a different place in each, because parts may be rows that all begin alike. The length
    // of a part is a fixed-point number with 32 fraction bits: divisions would take longer than the memory reads.
    const uint64_t part = (static_cast<uint64_t>(all) << 32) / stripes;
    uint64_t first = 0;
    for (size_t i = 0; i < stripes; ++i, first += part) {
      const uint64_t inside = ((i * kOdd) >> 32) * (part >> 32);
      state.consume(start + ((first + inside) >> 32) * kStripe);
    }
  }
  char rest[kStripe] = {};
  std::memcpy(rest, start + all * kStripe, bytes - all * kStripe);
  state.consume(rest);
  uint64_t result = bytes;
  for (const uint64_t lane : state.lanes) result = mix(result, lane);
  return result;
}

}  // namespace amct_ext::cpu
