// 2:4 masks. The rule is stated in amct_ext/ops/masks.py; magnitudes are compared as bit patterns, which orders NaN
// last. Work goes by four registers that hold the members of as many groups as a register has lanes.
#pragma once

#include <utility>

#include "cpu/isa/register.h"
#include "cpu/kernels.h"

namespace amct_ext::cpu {
namespace {

// What is kept of a register, from comparisons: a mask register where there are such, else all ones or zero in a lane.
// `put` writes the mask as bytes and, where y is not null, what is kept of `raw`.
#if defined(AMCT_AVX512)
AMCT_INLINE __m512i plain(auto v) { return as<__m512i>(v); }

template <int kBytes>
struct Choice;
template <>
struct Choice<4> {
  static AMCT_INLINE __mmask16 at_least(auto a, auto b) { return _mm512_cmpge_epi32_mask(plain(a), plain(b)); }
  static AMCT_INLINE __mmask16 ones(auto v) { return _mm512_movepi32_mask(plain(v)); }
  static AMCT_INLINE void put(__mmask16 keep, auto raw, uint8_t* mask, void* y) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(mask), _mm_maskz_mov_epi8(keep, _mm_set1_epi8(1)));
    if (y) _mm512_storeu_si512(y, _mm512_maskz_mov_epi32(keep, plain(raw)));
  }
};
template <>
struct Choice<8> {
  static AMCT_INLINE __mmask8 at_least(auto a, auto b) { return _mm512_cmpge_epi64_mask(plain(a), plain(b)); }
  static AMCT_INLINE __mmask8 ones(auto v) { return _mm512_movepi64_mask(plain(v)); }
  static AMCT_INLINE void put(__mmask8 keep, auto raw, uint8_t* mask, void* y) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(mask), _mm_maskz_mov_epi8(keep, _mm_set1_epi8(1)));
    if (y) _mm512_storeu_si512(y, _mm512_maskz_mov_epi64(keep, plain(raw)));
  }
};
template <>
struct Choice<2> {
  static AMCT_INLINE __mmask32 at_least(auto a, auto b) { return _mm512_cmpge_epi16_mask(plain(a), plain(b)); }
  static AMCT_INLINE __mmask32 ones(auto v) { return _mm512_movepi16_mask(plain(v)); }
  static AMCT_INLINE void put(__mmask32 keep, auto raw, uint8_t* mask, void* y) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask), _mm256_maskz_mov_epi8(keep, _mm256_set1_epi8(1)));
    if (y) _mm512_storeu_si512(y, _mm512_maskz_mov_epi16(keep, plain(raw)));
  }
};
#else
// Lanes that are all ones or zero as bytes 1 or 0. Compilers make poor code of the conversion.
template <int kBytes, typename V>
AMCT_INLINE void put_bytes(V keep, uint8_t* mask) {
  constexpr int kLanes = kRegister / kBytes;
#if defined(__SSE2__)
  __m128i half[2];
  __builtin_memcpy(&half[0], &keep, 16);
  __builtin_memcpy(&half[1], reinterpret_cast<const char*>(&keep) + kRegister - 16, 16);
  __m128i v = kBytes == 2 ? _mm_packs_epi16(half[0], half[1]) : _mm_packs_epi32(half[0], half[1]);
  for (int size = kBytes; size > 2; size /= 2) v = _mm_packs_epi16(v, v);
  v = _mm_and_si128(v, _mm_set1_epi8(1));
  __builtin_memcpy(mask, &v, kLanes);
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  const Bytes bytes = __builtin_convertvector(keep, Bytes) & 1;
  __builtin_memcpy(mask, &bytes, kLanes);
#endif
}

template <int kBytes>
struct Choice {
  template <typename V>
  static AMCT_INLINE V at_least(V a, V b) {
    return a >= b;
  }
  template <typename V>
  static AMCT_INLINE V ones(V v) {
    return v;
  }
  template <typename V>
  static AMCT_INLINE void put(V keep, V raw, uint8_t* mask, void* y) {
    put_bytes<kBytes>(keep, mask);
    if (!y) return;
    const V kept = raw & keep;
    __builtin_memcpy(y, &kept, sizeof(kept));
  }
};
#endif

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

// The second largest of every four and whether the choice is clear: it is not where the third is as large, or where a
// value is NaN.
template <typename T>
AMCT_INLINE bool second_largest(const V<T>* m, V<T>& second) {
  const V<T> first = larger(m[0], m[1]), other = larger(m[2], m[3]);
  const V<T> p = smaller(first, other), q = larger(smaller(m[0], m[1]), smaller(m[2], m[3]));
  second = larger(p, q);
  constexpr auto infinity = static_cast<Lane<T>>(Traits<T>::kInfinity);
  return !any((p == q) | (larger(first, other) > infinity));
}

// All NaN are equal and larger than infinity.
template <typename T>
AMCT_INLINE void chosen_exactly(const V<T>* m, V<T>* keep) {
  const V<T> nan = V<T>{} + static_cast<Lane<T>>(Traits<T>::kInfinity + 1);
  const V<T> ordered[4] = {smaller(m[0], nan), smaller(m[1], nan), smaller(m[2], nan), smaller(m[3], nan)};
  kept_of_four(ordered, keep);
}

// Four rows of a register of groups, `inner` apart.
template <typename T>
AMCT_INLINE void mask_rows(const T* w, uint8_t* mask, T* y, int64_t inner) {
  const V<T> raw[4] = {load(w), load(w + inner), load(w + 2 * inner), load(w + 3 * inner)};
  const V<T> m[4] = {magnitudes<T>(raw[0]), magnitudes<T>(raw[1]), magnitudes<T>(raw[2]), magnitudes<T>(raw[3])};
  V<T> second, keep[4];
  const auto put = [&](int r, auto kept) __attribute__((always_inline)) {
    Choice<sizeof(T)>::put(kept, raw[r], mask + r * inner, y ? y + r * inner : nullptr);
  };
  if (second_largest<T>(m, second)) [[likely]] {
    for (int r = 0; r < 4; ++r) put(r, Choice<sizeof(T)>::at_least(m[r], second));
  } else {
    chosen_exactly<T>(m, keep);
    for (int r = 0; r < 4; ++r) put(r, Choice<sizeof(T)>::ones(keep[r]));
  }
}

// Every second lane of two registers, from the first or from the second on.
template <int kFirst, typename V, int... I>
AMCT_INLINE V every_second(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + kFirst)...);
}

// Register kAt of four in memory order, from one value for each group.
template <int kAt, typename V, int... I>
AMCT_INLINE V of_groups(V v, std::integer_sequence<int, I...>) {
  constexpr int kFirst = kAt * static_cast<int>(sizeof...(I));
  return __builtin_shufflevector(v, v, ((kFirst + I) / 4)...);
}

// The same from one value for each member.
template <int kAt, typename V, int... I>
AMCT_INLINE V of_members(const V* v, std::integer_sequence<int, I...> lanes) {
  constexpr int kFirst = kAt * static_cast<int>(sizeof...(I));
  constexpr V member = {((kFirst + I) % 4)...};
  return (of_groups<kAt>(v[0], lanes) & (member == 0)) | (of_groups<kAt>(v[1], lanes) & (member == 1)) |
         (of_groups<kAt>(v[2], lanes) & (member == 2)) | (of_groups<kAt>(v[3], lanes) & (member == 3));
}

// Four registers of groups that lie side by side.
template <typename T>
AMCT_INLINE void mask_neighbours(const T* w, uint8_t* mask, T* y) {
  constexpr int width = kWidth<T>;
  constexpr auto lanes = std::make_integer_sequence<int, width>{};
  const V<T> raw[4] = {load(w), load(w + width), load(w + 2 * width), load(w + 3 * width)};
  const V<T> in[4] = {magnitudes<T>(raw[0]), magnitudes<T>(raw[1]), magnitudes<T>(raw[2]), magnitudes<T>(raw[3])};
  const V<T> even[2] = {every_second<0>(in[0], in[1], lanes), every_second<0>(in[2], in[3], lanes)};
  const V<T> odd[2] = {every_second<1>(in[0], in[1], lanes), every_second<1>(in[2], in[3], lanes)};
  const V<T> m[4] = {every_second<0>(even[0], even[1], lanes), every_second<0>(odd[0], odd[1], lanes),
                     every_second<1>(even[0], even[1], lanes), every_second<1>(odd[0], odd[1], lanes)};
  const auto put = [&](int r, auto kept) __attribute__((always_inline)) {
    Choice<sizeof(T)>::put(kept, raw[r], mask + r * width, y ? y + r * width : nullptr);
  };
  V<T> second, keep[4];
  if (second_largest<T>(m, second)) [[likely]] {
    put(0, Choice<sizeof(T)>::at_least(in[0], of_groups<0>(second, lanes)));
    put(1, Choice<sizeof(T)>::at_least(in[1], of_groups<1>(second, lanes)));
    put(2, Choice<sizeof(T)>::at_least(in[2], of_groups<2>(second, lanes)));
    put(3, Choice<sizeof(T)>::at_least(in[3], of_groups<3>(second, lanes)));
  } else {
    chosen_exactly<T>(m, keep);
    put(0, Choice<sizeof(T)>::ones(of_members<0>(keep, lanes)));
    put(1, Choice<sizeof(T)>::ones(of_members<1>(keep, lanes)));
    put(2, Choice<sizeof(T)>::ones(of_members<2>(keep, lanes)));
    put(3, Choice<sizeof(T)>::ones(of_members<3>(keep, lanes)));
  }
}

// `n` values of up to four rows, at most a register wide, by way of a copy with zeros around it.
template <typename T>
AMCT_INLINE void mask_piece(const T* w, uint8_t* mask, T* y, int64_t inner, int rows, int64_t n) {
  constexpr int width = kWidth<T>;
  T in[4 * width] = {}, kept[4 * width];
  uint8_t bytes[4 * width];
  for (int r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) in[r * width + i] = w[r * inner + i];
  }
  mask_rows(in, bytes, kept, width);
  for (int r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) mask[r * inner + i] = bytes[r * width + i];
    if (!y) continue;
    for (int64_t i = 0; i < n; ++i) y[r * inner + i] = kept[r * width + i];
  }
}

// Groups that a register at a time cannot take: the last of a plane, and rows that do not fill a group.
template <typename T>
void mask_rest(const T* w, uint8_t* mask, T* y, int64_t count, int64_t inner) {
  for (int64_t row = 0; row < count; row += 4) {
    const int rows = count - row < 4 ? static_cast<int>(count - row) : 4;
    for (int64_t i = 0; i < inner; i += kWidth<T>) {
      const int64_t at = row * inner + i, n = inner - i < kWidth<T> ? inner - i : kWidth<T>;
      mask_piece(w + at, mask + at, y ? y + at : nullptr, inner, rows, n);
    }
  }
}

// Whole groups; returns how many were masked. Rows of a register or more: the last register of a row overlaps the one
// before. Shorter rows: what is written beyond a row is overwritten by the rows that follow, which go out in rising
// order, as far as enough of them follow.
template <typename T, bool kKeeps>
AMCT_INLINE int64_t mask_groups(const T* w, uint8_t* mask, T* y, int64_t groups, int64_t inner) {
  constexpr int64_t width = kWidth<T>;
  const int64_t size = groups * 4 * inner;
  if (inner == 1) {
    int64_t at = 0;
    for (; at + 4 * width <= size; at += 4 * width) {
      mask_neighbours(w + at, mask + at, kKeeps ? y + at : nullptr);
    }
    return at / 4;
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t start = g * 4 * inner;
    if (inner < width && start + 3 * inner + width > size) return g;
    for (int64_t i = 0; i < inner; i += width) {
      const int64_t at = start + (i + width <= inner || inner < width ? i : inner - width);
      mask_rows(w + at, mask + at, kKeeps ? y + at : nullptr, inner);
    }
  }
  return groups;
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
  T* y = static_cast<T*>(p.y);
  if (p.count <= 2) {
    const int64_t n = p.count * p.inner;
    for (int64_t i = 0; i < n; ++i) p.mask[i] = 1;
    if (y) apply_mask<T>(w, p.mask, y, n);
    return;
  }
  const int64_t groups = p.count / 4;
  const int64_t done =
      y ? mask_groups<T, true>(w, p.mask, y, groups, p.inner) : mask_groups<T, false>(w, p.mask, y, groups, p.inner);
  const int64_t at = 4 * done * p.inner;
  mask_rest(w + at, p.mask + at, y ? y + at : nullptr, p.count - 4 * done, p.inner);
}

}  // namespace
}  // namespace amct_ext::cpu
