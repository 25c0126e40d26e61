#include "cpu/fingerprint.h"

#include <bit>
#include <cstring>

namespace amct_ext::cpu {
namespace {

constexpr size_t kLanes = 8, kPiece = kLanes * sizeof(uint64_t);
constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u;

// A word at a time, reversible in both: what differs stays different. The turn brings the upper bits down to where the
// product spreads them.
uint64_t mixed(uint64_t state, uint64_t word) { return std::rotl(state ^ word, 29) * kOdd; }

struct State {
  uint64_t lanes[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8};

  void take(const char* piece) {
    uint64_t words[kLanes];
    std::memcpy(words, piece, kPiece);
    for (size_t i = 0; i < kLanes; ++i) lanes[i] = mixed(lanes[i], words[i]);
  }
};

}  // namespace

uint64_t fingerprint(const void* data, size_t bytes, size_t pieces) {
  const char* start = static_cast<const char*>(data);
  const size_t all = bytes / kPiece;
  State state;
  if (pieces >= all) {
    for (size_t i = 0; i < all; ++i) state.take(start + i * kPiece);
  } else {
    // Somewhere in its part, in each part elsewhere: parts may be rows, whose beginnings alone say little. Parts have a
    // length in 2^-32 pieces; divisions would take longer than the memory.
    const uint64_t part = (static_cast<uint64_t>(all) << 32) / pieces;
    uint64_t first = 0;
    for (size_t i = 0; i < pieces; ++i, first += part) {
      const uint64_t inside = ((i * kOdd) >> 32) * (part >> 32);
      state.take(start + ((first + inside) >> 32) * kPiece);
    }
  }
  char rest[kPiece] = {};
  std::memcpy(rest, start + all * kPiece, bytes - all * kPiece);
  state.take(rest);
  uint64_t result = bytes;
  for (const uint64_t lane : state.lanes) result = mixed(result, lane);
  return result;
}

}  // namespace amct_ext::cpu
