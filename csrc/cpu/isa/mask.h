// 2:4 masks. The rule is stated in amct_ext/ops/masks.py; magnitudes are compared as bit patterns, which orders NaN
// last.
#pragma once

#include "cpu/isa/scalar.h"
#include "cpu/kernels.h"

namespace amct_ext::cpu {
namespace {

// A register of the instruction set. Patterns without their sign are compared as signed numbers, which every
// instruction set can; comparisons give all ones or zero.
#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

template <typename Bits>
struct Register;
template <>
struct Register<uint16_t> {
  using Lane = int16_t;
  using V = int16_t __attribute__((vector_size(kRegister)));
};
template <>
struct Register<uint32_t> {
  using Lane = int32_t;
  using V = int32_t __attribute__((vector_size(kRegister)));
};
template <>
struct Register<uint64_t> {
  using Lane = int64_t;
  using V = int64_t __attribute__((vector_size(kRegister)));
};

template <typename B>
constexpr int kWidth = kRegister / static_cast<int>(sizeof(B));

// All NaN are equal and larger than infinity.
template <typename T>
AMCT_INLINE Bits<T> order(T v) {
  const Bits<T> bits = magnitude_bits(v);
  constexpr Bits<T> nan = Traits<T>::kInfinity + 1;
  return bits > nan ? nan : bits;
}

// One vector at a time, each a value of its own: an array filled in a loop goes through memory.
template <typename V>
AMCT_INLINE V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V>
AMCT_INLINE V two_of(V a, V b, V c) {
  return (a & b) | (c & (a | b));
}

// What is kept of groups whose members lie in four vectors. A value is kept that goes before two others, where the
// larger goes before the smaller and of equals the first goes first; but where the first of the four is the smallest
// alone, of equals the last goes first, and of three equals the middle one last.
template <typename V>
AMCT_INLINE void kept_of_four(const V* m, V* keep) {
  const V a_b = m[0] >= m[1], a_c = m[0] >= m[2], a_d = m[0] >= m[3];
  const V usual = a_b | a_c | a_d;             // -1 where the first is not the smallest alone
  const V b = m[1] - usual, c = m[2] - usual;  // one more: a tie is won
  const V b_d = b > m[3], c_d = c > m[3], b_c = (b > m[2]) | ((m[1] == m[2]) & (m[2] == m[3]));
  keep[0] = two_of(a_b, a_c, a_d);
  keep[1] = two_of(~a_b, b_c, b_d);
  keep[2] = two_of(~a_c, ~b_c, c_d);
  keep[3] = two_of(~a_d, ~b_d, ~c_d);
}

constexpr int kGroups = 256;  // groups handled at a time

constexpr int kChunk = 16;  // longest row that moves in one piece

// What a step works on: magnitudes of the four members of each group and what is kept of them, -1 or 0. Rows are moved
// in pieces of kChunk that run over into the next row, hence the padding.
template <typename B>
struct GroupStage {
  alignas(64) B in[4][kGroups + kChunk];
  alignas(64) B keep[4][kGroups + kChunk];
};

// The first n groups of a stage, and what is left of the last register.
template <typename T>
AMCT_INLINE void mask_groups(GroupStage<Bits<T>>& s, int n) {
  using V = typename Register<Bits<T>>::V;
  for (int i = 0; i < n; i += kWidth<T>) {
    const V in[4] = {load<V>(s.in[0] + i), load<V>(s.in[1] + i), load<V>(s.in[2] + i), load<V>(s.in[3] + i)};
    V keep[4];
    kept_of_four(in, keep);
    __builtin_memcpy(s.keep[0] + i, &keep[0], sizeof(V));
    __builtin_memcpy(s.keep[1] + i, &keep[1], sizeof(V));
    __builtin_memcpy(s.keep[2] + i, &keep[2], sizeof(V));
    __builtin_memcpy(s.keep[3] + i, &keep[3], sizeof(V));
  }
}

// Rows of `inner` values from memory order to member order. Whole pieces are moved where what follows may be read,
// which is not known of the last plane.
template <typename T>
AMCT_INLINE void gather(const T* __restrict w, int64_t planes, int64_t inner, GroupStage<Bits<T>>& s) {
  if (inner == 1) {
    for (int64_t g = 0; g < planes; ++g) {
      for (int r = 0; r < 4; ++r) s.in[r][g] = order(w[4 * g + r]);
    }
    return;
  }
  const int64_t whole = inner <= kChunk && planes * inner >= 2 * kChunk ? planes - (kChunk / inner + 1) : 0;
  for (int64_t g = 0; g < planes; ++g) {
    for (int r = 0; r < 4; ++r) {
      const T* __restrict row = w + (4 * g + r) * inner;
      Bits<T>* __restrict to = s.in[r] + g * inner;
      if (g < whole) {
        for (int i = 0; i < kChunk; ++i) to[i] = order(row[i]);
      } else {
        for (int64_t i = 0; i < inner; ++i) to[i] = order(row[i]);
      }
    }
  }
}

// Back to memory order. Pieces that run over are overwritten by the rows that follow: rows go out in rising order.
template <typename B>
AMCT_INLINE void scatter(const GroupStage<B>& s, int64_t planes, int64_t inner, uint8_t* __restrict mask) {
  if (inner == 1) {
    for (int64_t g = 0; g < planes; ++g) {
      for (int r = 0; r < 4; ++r) mask[4 * g + r] = static_cast<uint8_t>(s.keep[r][g] & 1);
    }
  } else {
    const int64_t whole = inner <= kChunk && planes * inner >= 2 * kChunk ? planes - (kChunk / inner + 1) : 0;
    for (int64_t g = 0; g < planes; ++g) {
      for (int r = 0; r < 4; ++r) {
        const B* __restrict from = s.keep[r] + g * inner;
        uint8_t* __restrict to = mask + (4 * g + r) * inner;
        if (g < whole) {
          for (int i = 0; i < kChunk; ++i) to[i] = static_cast<uint8_t>(from[i] & 1);
        } else {
          for (int64_t i = 0; i < inner; ++i) to[i] = static_cast<uint8_t>(from[i] & 1);
        }
      }
    }
  }
}

template <typename T>
void apply_mask(const void* w_, const uint8_t* __restrict mask, void* y_, int64_t n) {
  const T* __restrict w = static_cast<const T*>(w_);
  T* __restrict y = static_cast<T*>(y_);
  for (int64_t i = 0; i < n; ++i) {
    const Bits<T> keep = static_cast<Bits<T>>(0 - static_cast<Bits<T>>(mask[i]));  // a bool is 0 or 1
    y[i] = as<T>(static_cast<Bits<T>>(as<Bits<T>>(w[i]) & keep));
  }
}

// Groups in rows long enough to be worked on where they lie, or a partial group.
template <typename T>
void mask_long_rows(const T* __restrict w, uint8_t* __restrict mask, T* y, int64_t inner, int rows) {
  GroupStage<Bits<T>> s;
  for (int64_t begin = 0; begin < inner; begin += kGroups) {
    const int n = inner - begin < kGroups ? static_cast<int>(inner - begin) : kGroups;
    for (int r = 0; r < 4; ++r) {
      if (r < rows) {
        for (int i = 0; i < n; ++i) s.in[r][i] = order(w[begin + r * inner + i]);
      } else {
        for (int i = 0; i < n; ++i) s.in[r][i] = 0;
      }
    }
    mask_groups<T>(s, n);
    for (int r = 0; r < rows; ++r) {
      uint8_t* __restrict to = mask + begin + r * inner;
      for (int i = 0; i < n; ++i) to[i] = static_cast<uint8_t>(s.keep[r][i] & 1);
      if (y) apply_mask<T>(w + begin + r * inner, to, y + begin + r * inner, n);
    }
  }
}

// Whole groups with short rows, as many as fit the stage at a time.
template <typename T>
void mask_short_rows(const T* w, uint8_t* mask, T* y, int64_t groups, int64_t inner) {
  GroupStage<Bits<T>> s;
  const int64_t fit = kGroups / inner;
  for (int64_t g = 0; g < groups; g += fit) {
    const int64_t planes = groups - g < fit ? groups - g : fit, at = g * 4 * inner;
    gather(w + at, planes, inner, s);
    mask_groups<T>(s, static_cast<int>(planes * inner));
    scatter(s, planes, inner, mask + at);
    if (y) apply_mask<T>(w + at, mask + at, y + at, 4 * planes * inner);
  }
}

#if defined(__AVX512F__)
template <typename T, typename V>
AMCT_INLINE V order_register(V v) {
  using Lane = typename Register<Bits<T>>::Lane;
  const V bits = v & static_cast<Lane>(~Traits<T>::kSign), nan = V{} + static_cast<Lane>(Traits<T>::kInfinity + 1);
  return bits > nan ? nan : bits;
}

template <typename T, typename V>
AMCT_INLINE void put_register(V raw, V keep, uint8_t* mask, T* y) {
  typename Register<Bits<T>>::Lane lanes[kWidth<T>];
  __builtin_memcpy(lanes, &keep, sizeof(V));
  for (int i = 0; i < kWidth<T>; ++i) mask[i] = static_cast<uint8_t>(lanes[i] & 1);
  if (!y) return;
  const V kept = raw & keep;
  __builtin_memcpy(y, &kept, sizeof(V));
}

// Four rows of a register of groups, `inner` apart, without a stage: narrowing to bytes takes one instruction here.
template <typename T>
AMCT_INLINE void mask_register(const T* w, uint8_t* mask, T* y, int64_t inner) {
  using V = typename Register<Bits<T>>::V;
  const V a = load<V>(w), b = load<V>(w + inner), c = load<V>(w + 2 * inner), d = load<V>(w + 3 * inner);
  const V in[4] = {order_register<T>(a), order_register<T>(b), order_register<T>(c), order_register<T>(d)};
  V keep[4];
  kept_of_four(in, keep);
  put_register(a, keep[0], mask, y);
  put_register(b, keep[1], mask + inner, y ? y + inner : nullptr);
  put_register(c, keep[2], mask + 2 * inner, y ? y + 2 * inner : nullptr);
  put_register(d, keep[3], mask + 3 * inner, y ? y + 3 * inner : nullptr);
}

// Whole groups; returns how many were masked. Rows of a register or more: the last register of a row overlaps the one
// before. Shorter rows: what is written beyond a row is overwritten by the rows that follow, which go out in rising
// order, as far as enough of them follow. Very short rows would waste most of the register.
template <typename T>
AMCT_INLINE int64_t mask_registers(const T* w, uint8_t* mask, T* y, int64_t groups, int64_t inner) {
  constexpr int64_t width = kWidth<T>;
  if (inner < width / 4 || inner == 1) return 0;
  const int64_t size = groups * 4 * inner;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t start = g * 4 * inner;
    if (start + 3 * inner + width > size && inner < width) return g;
    for (int64_t i = 0; i < inner; i += width) {
      const int64_t at = start + (i + width <= inner || inner < width ? i : inner - width);
      mask_register(w + at, mask + at, y ? y + at : nullptr, inner);
    }
  }
  return groups;
}
#else
template <typename T>
AMCT_INLINE int64_t mask_registers(const T*, uint8_t*, T*, int64_t, int64_t) {
  return 0;
}
#endif

template <typename T>
void mask_plane(const Plane& p) {
  const T* w = static_cast<const T*>(p.w);
  T* y = static_cast<T*>(p.y);
  if (p.count <= 2) {
    const int64_t n = p.count * p.inner;
    for (int64_t i = 0; i < n; ++i) p.mask[i] = 1;
    if (y) apply_mask<T>(w, p.mask, y, n);
    return;
  }
  const int64_t groups = p.count / 4, done = mask_registers(w, p.mask, y, groups, p.inner);
  int64_t first = 4 * done;
  if (p.inner < kGroups / 4 && done < groups) {
    const int64_t at = first * p.inner;
    mask_short_rows(w + at, p.mask + at, y ? y + at : nullptr, groups - done, p.inner);
    first = 4 * groups;
  }
  for (; first < p.count; first += 4) {
    const int rows = p.count - first < 4 ? static_cast<int>(p.count - first) : 4;
    const int64_t at = first * p.inner;
    mask_long_rows(w + at, p.mask + at, y ? y + at : nullptr, p.inner, rows);
  }
}

}  // namespace
}  // namespace amct_ext::cpu
