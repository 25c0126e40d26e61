// HalfDivider (csrc/simd/half_divider.h) against the division, at every pair that could differ: all divisors and values
// of 11 significant bits whose quotient lies within four units in the last place of a tie, up to 2^16. Powers of two
// scale both alike, so divisors in [1, 2) stand for all. Prints the fractions of the divisors that fail. Needs FMA.
#include "simd/half_divider.h"

#include <cmath>
#include <cstdio>
#include <set>

namespace {

using amct_ext::cpu::bit_cast;
using amct_ext::cpu::broadcast;
using amct_ext::cpu::HalfDivider;
using amct_ext::cpu::round_even;

constexpr int kSignificantBits = 11, kLargestTie = 1 << 16, kNeighbours = 4;
constexpr uint32_t kFraction = (1u << 23) - 1, kOne = 0x3f800000;

bool rounds_alike(float value, float divisor) {
  const auto quotient = round_even(HalfDivider(divisor)(broadcast(value)));
  return quotient[0] == std::nearbyint(value / divisor);
}

}  // namespace

int main() {
  static_assert(amct_ext::cpu::kHasFma, "without FMA the divider divides");
  std::set<uint32_t> failing;
  for (int significand = 1 << (kSignificantBits - 1); significand < 1 << kSignificantBits; ++significand) {
    for (int below = 0; below < kLargestTie; ++below) {
      const float tie = static_cast<float>(below) + 0.5f, nearest = static_cast<float>(significand) / tie;
      const float power = std::ldexp(1.0f, -std::ilogb(nearest));  // brings the divisor into [1, 2)
      const uint32_t bits = bit_cast<uint32_t>(nearest * power);
      for (uint32_t near = bits - kNeighbours; near <= bits + kNeighbours; ++near) {
        const uint32_t fraction = near & kFraction;
        if (near - fraction != kOne) continue;
        if (!rounds_alike(static_cast<float>(significand) * power, bit_cast<float>(near))) failing.insert(fraction);
      }
    }
  }
  for (const uint32_t fraction : failing) std::printf("%06x\n", fraction);
  return failing == std::set<uint32_t>{HalfDivider::kExcludedFraction} ? 0 : 1;
}
