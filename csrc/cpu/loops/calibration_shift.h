// searchN: the squared error of every shift of the accumulator, as exact integers.
//
// With S the accumulator, shift N loses the low N bits of S, unless the rest overflows 16 bits. So the errors are sums
// of squares of integers, which are the same in any order of additions: a result does not depend on threads,
// instruction set or memory layout, and needs no fixed partial sums.
#pragma once

#include "cpu/loop_params.h"
#include "simd/reciprocal.h"
#include "simd/vec.h"

namespace amct_ext::cpu {
namespace {

using math::kShifts;
constexpr int kShiftChunk = 1024;  // values at a time: the arrays of a chunk stay in the L1 cache
constexpr int kLowBits = 10;       // squares of 11 bits, summed over a chunk, fit 31 bits: 2 * 10 + 10
constexpr int kPadding = 64;       // sums run over a multiple of this; zeros add nothing

struct ShiftChunk {
  alignas(64) int32_t accumulators[kShiftChunk];
  alignas(64) int16_t low_bits[kShiftChunk];  // the low 16 bits of each
  int blocks;                                 // of kPadding values
};

using Int32s = int32_t __attribute__((vector_size(4 * kLanes<double>)));

// round(x / scale) as a 32-bit integer, by the division itself. True: a value is NaN.
template <typename T>
bool accumulators_exact(const T* x, int n, double scale, int32_t* accumulators) {
  int nan = 0;
  for (int i = 0; i < n; ++i) {
    const double t =
        math::clamp(math::round_even(static_cast<double>(widen(x[i])) / scale), -2147483648.0, 2147483647.0);
    nan |= t != t;
    accumulators[i] = static_cast<int32_t>(t == t ? t : 0.0);
  }
  return nan != 0;
}

// The same by the reciprocal; false where a value comes too close to a tie for that, or is NaN.
template <typename T>
AMCT_INLINE bool accumulators_fast(const T* x, int n, const Reciprocal<double>& recip, int32_t* accumulators) {
  const Vec<double> magic = broadcast(6755399441055744.0);  // 1.5 * 2^52: adding it rounds to an integer, half to even
  const Vec<double> lowest = broadcast(-2147483648.0), highest = broadcast(2147483647.0),
                    max_safe_distance = broadcast(recip.max_safe_distance);
  Mask<double> close = {};
  for (int i = 0; i < n; i += kLanes<double>) {
    const Vec<double> t = clamp(load_double(x + i) * recip.inverse, lowest, highest), code = (t + magic) - magic;
    const Vec<double> distance = reinterpret_cast<Vec<double>>(abs_bits<double>(t - code));
    close |= ~(distance <= max_safe_distance);  // NaN is not
    const Int32s result = __builtin_convertvector(code, Int32s);
    __builtin_memcpy(accumulators + i, &result, sizeof(result));
  }
  return !any(close);
}

// Sum of products of 16-bit integers; the caller makes sure that 32 bits hold it.
template <typename Left, typename Right>
AMCT_INLINE uint64_t dot(const ShiftChunk& c, Left left, Right right) {
  int32_t sum = 0;
  for (int i = 0; i < c.blocks * kPadding; ++i) {
    const int16_t a = left(c.low_bits[i]), b = right(c.low_bits[i]);
    sum += a * b;
  }
  return static_cast<uint64_t>(sum);
}

// Errors of the shifts from `first` on, for which no accumulator of the chunk overflows: squares of the low bits.
// Beyond kLowBits they are put together from two parts, (l + 2^10 h)^2 = l^2 + 2^11 l h + 2^20 h^2.
AMCT_INLINE void add_low_bits_errors(const ShiftChunk& c, int first, WideSum* sums) {
  uint64_t below = 0;
  for (int shift = 1; shift <= kLowBits; ++shift) {
    if (shift < first && shift < kLowBits) continue;
    const int16_t mask = static_cast<int16_t>((1 << shift) - 1);
    const auto low = [mask](int16_t v) __attribute__((always_inline)) { return static_cast<int16_t>(v & mask); };
    below = dot(c, low, low);
    if (shift >= first) sums[shift - 1] += below;
  }
  for (int shift = kLowBits + 1; shift <= kShifts; ++shift) {
    if (shift < first) continue;
    const int16_t mask = static_cast<int16_t>((1 << (shift - kLowBits)) - 1);
    const auto low = [](int16_t v)
                         __attribute__((always_inline)) { return static_cast<int16_t>(v & ((1 << kLowBits) - 1)); };
    const auto high = [mask](int16_t v)
                          __attribute__((always_inline)) { return static_cast<int16_t>((v >> kLowBits) & mask); };
    sums[shift - 1] += below + (dot(c, low, high) << (kLowBits + 1)) + (dot(c, high, high) << (2 * kLowBits));
  }
}

// The error of one shift where accumulators may overflow: below 2^31, so squares are added in two halves.
AMCT_INLINE void add_overflow_errors(const ShiftChunk& c, int shift, WideSum* sums) {
  const int32_t mask = static_cast<int32_t>(~((uint32_t{1} << shift) - 1));
  const int32_t top = 32767 << shift, bottom = -32768 * (1 << shift);
  uint64_t low = 0, high = 0;
  for (int i = 0; i < c.blocks * kPadding; ++i) {
    const int32_t kept = math::clamp(c.accumulators[i] & mask, bottom, top), e = c.accumulators[i] - kept;
    const uint32_t size = static_cast<uint32_t>(e < 0 ? -e : e);
    const uint64_t square = static_cast<uint64_t>(size) * size;
    low += square & 0xffffffffu;
    high += square >> 32;
  }
  sums[shift - 1] += (static_cast<WideSum>(high) << 32) + low;
}

template <typename T>
bool shift_errors(const void* x_, int64_t n, double scale, WideSum* sums) {
  const T* x = static_cast<const T*>(x_);
  const auto recip = reciprocal<double>(scale, -2147483648.0, 2147483647.0);
  bool nan = false;
  ShiftChunk c;
  for (int64_t begin = 0; begin < n; begin += kShiftChunk) {
    const int count = n - begin < kShiftChunk ? static_cast<int>(n - begin) : kShiftChunk, whole = count & ~7;
    c.blocks = (count + kPadding - 1) / kPadding;
    for (int i = count; i < c.blocks * kPadding; ++i) c.accumulators[i] = 0;
    if (!recip.usable || !accumulators_fast(x + begin, whole, recip, c.accumulators)) {
      nan |= accumulators_exact(x + begin, whole, scale, c.accumulators);
    }
    nan |= accumulators_exact(x + begin + whole, count - whole, scale, c.accumulators + whole);
    int32_t largest = 0, smallest = 0;
    for (int i = 0; i < c.blocks * kPadding; ++i) {
      const int32_t v = c.accumulators[i];
      largest = v > largest ? v : largest;
      smallest = v < smallest ? v : smallest;
      c.low_bits[i] = static_cast<int16_t>(v);
    }
    // The first shift that leaves 16 bits of every accumulator.
    int first = 1;
    while (largest >> first > 32767 || smallest >> first < -32768) ++first;
    for (int shift = 1; shift < first; ++shift) add_overflow_errors(c, shift, sums);
    add_low_bits_errors(c, first, sums);
  }
  return nan;
}

}  // namespace
}  // namespace amct_ext::cpu
