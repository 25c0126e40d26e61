// 2:4 masks. The rule is stated in amct_ext/ops/masks.py; magnitudes are compared as bit patterns, which orders NaN
// last.
#pragma once

#include "cpu/isa/scalar.h"
#include "cpu/kernels.h"

namespace amct_ext::cpu {
namespace {

// All NaN are equal and larger than infinity.
template <typename T>
AMCT_INLINE Bits<T> order(T v) {
  const Bits<T> bits = magnitude_bits(v);
  constexpr Bits<T> nan = Traits<T>::kInfinity + 1;
  return bits > nan ? nan : bits;
}

// 1 where a value of the group is kept. Written with numbers of the element's width, 0 or 1, which vectorises.
template <typename B>
AMCT_INLINE void kept_of_four(B a, B b, B c, B d, B& keep_a, B& keep_b, B& keep_c, B& keep_d) {
  const B one = 1;
  const B a_b = a >= b, a_c = a >= c, a_d = a >= d, b_c = b >= c, b_d = b >= d, c_d = c >= d;
  // Places in the order "largest first, of equals the earlier one first"; two or more wins among three keep a value.
  const B wins_a = a_b + a_c + a_d, wins_b = (one - a_b) + b_c + b_d, wins_c = (one - a_c) + (one - b_c) + c_d,
          wins_d = (one - a_d) + (one - b_d) + (one - c_d);
  const B first_smallest = (one - a_b) & (one - a_c) & (one - a_d);
  const B b_is_c = b == c, c_is_d = c == d, b_to_c = b <= c, b_to_d = b <= d, c_to_b = c < b, c_to_d = c <= d;
  const B equal = b_is_c & c_is_d;
  const B drop_b = b_to_c & b_to_d & (one - equal);
  const B drop_c = (c_to_b & c_to_d) | equal;
  const B rest = one - first_smallest;
  const B two_a = wins_a >= 2, two_b = wins_b >= 2, two_c = wins_c >= 2, two_d = wins_d >= 2;
  keep_a = rest & two_a;
  keep_b = (rest & two_b) | (first_smallest & (one - drop_b));
  keep_c = (rest & two_c) | (first_smallest & (one - drop_c));
  keep_d = (rest & two_d) | (first_smallest & (drop_b | drop_c));
}

// n groups whose members lie in four arrays.
template <typename B>
AMCT_INLINE void mask_groups(const B* __restrict a, const B* __restrict b, const B* __restrict c, const B* __restrict d,
                             B* __restrict ka, B* __restrict kb, B* __restrict kc, B* __restrict kd, int n) {
  for (int i = 0; i < n; ++i) kept_of_four(a[i], b[i], c[i], d[i], ka[i], kb[i], kc[i], kd[i]);
}

constexpr int kGroups = 256;  // groups handled at a time

constexpr int kChunk = 16;  // longest row that moves in one piece

// What a step works on: magnitudes of the four members of each group and what is kept of them. Rows are moved in pieces
// of kChunk that run over into the next row, hence the padding.
template <typename B>
struct GroupStage {
  alignas(64) B in[4][kGroups + kChunk];
  alignas(64) B keep[4][kGroups + kChunk];
};

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
      for (int r = 0; r < 4; ++r) mask[4 * g + r] = static_cast<uint8_t>(s.keep[r][g]);
    }
  } else {
    const int64_t whole = inner <= kChunk && planes * inner >= 2 * kChunk ? planes - (kChunk / inner + 1) : 0;
    for (int64_t g = 0; g < planes; ++g) {
      for (int r = 0; r < 4; ++r) {
        const B* __restrict from = s.keep[r] + g * inner;
        uint8_t* __restrict to = mask + (4 * g + r) * inner;
        if (g < whole) {
          for (int i = 0; i < kChunk; ++i) to[i] = static_cast<uint8_t>(from[i]);
        } else {
          for (int64_t i = 0; i < inner; ++i) to[i] = static_cast<uint8_t>(from[i]);
        }
      }
    }
  }
}

// Groups in rows long enough to be worked on where they lie, or a partial group.
template <typename T>
void mask_long_rows(const T* __restrict w, uint8_t* __restrict mask, int64_t inner, int rows) {
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
    mask_groups(s.in[0], s.in[1], s.in[2], s.in[3], s.keep[0], s.keep[1], s.keep[2], s.keep[3], n);
    for (int r = 0; r < rows; ++r) {
      uint8_t* __restrict to = mask + begin + r * inner;
      for (int i = 0; i < n; ++i) to[i] = static_cast<uint8_t>(s.keep[r][i]);
    }
  }
}

// Whole groups with short rows, as many as fit the stage at a time.
template <typename T>
void mask_short_rows(const T* w, uint8_t* mask, int64_t groups, int64_t inner) {
  GroupStage<Bits<T>> s;
  const int64_t fit = kGroups / inner;
  for (int64_t g = 0; g < groups; g += fit) {
    const int64_t planes = groups - g < fit ? groups - g : fit, at = g * 4 * inner;
    gather(w + at, planes, inner, s);
    mask_groups(s.in[0], s.in[1], s.in[2], s.in[3], s.keep[0], s.keep[1], s.keep[2], s.keep[3],
                static_cast<int>(planes * inner));
    scatter(s, planes, inner, mask + at);
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

template <typename T>
void mask_plane(const Plane& p) {
  const T* w = static_cast<const T*>(p.w);
  const int64_t n = p.count * p.inner;
  if (p.count <= 2) {
    for (int64_t i = 0; i < n; ++i) p.mask[i] = 1;
  } else {
    int64_t first = 0;
    if (p.inner < kGroups / 4) {
      first = p.count / 4 * 4;
      mask_short_rows(w, p.mask, first / 4, p.inner);
    }
    for (; first < p.count; first += 4) {
      const int rows = p.count - first < 4 ? static_cast<int>(p.count - first) : 4;
      mask_long_rows(w + first * p.inner, p.mask + first * p.inner, p.inner, rows);
    }
  }
  if (p.y) apply_mask<T>(w, p.mask, p.y, n);
}

}  // namespace
}  // namespace amct_ext::cpu
