// The AVX-512 instructions that csrc/cpu/loops uses, one lane after the other: in the include path before the
// compiler's own header it makes the loops of level v4 run on a processor without them (tests/native/test_native.py).
// It takes AVX2 and F16C.
#pragma once

#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1

namespace lanes {

template <typename L, typename V>
struct All {
  static constexpr unsigned kCount = sizeof(V) / sizeof(L);
  L lane[kCount];

  explicit All(const V& v) { std::memcpy(lane, &v, sizeof(v)); }
  V vector() const {
    V v;
    std::memcpy(&v, lane, sizeof(v));
    return v;
  }
};

template <typename V>
V zero() {
  V v;
  std::memset(&v, 0, sizeof(v));
  return v;
}

// f(number, lane) for every lane.
template <typename L, typename V, typename F>
V each(const V& v, const F& f) {
  All<L, V> all(v);
  for (unsigned i = 0; i < all.kCount; ++i) all.lane[i] = f(i, all.lane[i]);
  return all.vector();
}

template <typename L, typename V, typename F>
V zip(const V& a, const V& b, const F& f) {
  const All<L, V> other(b);
  return each<L>(a, [&](unsigned i, L x) { return f(x, other.lane[i]); });
}

// The lanes for which f(a, b) is true.
template <typename L, typename M, typename V, typename F>
M mask_of(const V& a, const V& b, const F& f) {
  const All<L, V> left(a), right(b);
  uint64_t mask = 0;
  for (unsigned i = 0; i < left.kCount; ++i) mask |= uint64_t{f(left.lane[i], right.lane[i])} << i;
  return static_cast<M>(mask);
}

template <typename L, typename V>
V zero_unless(uint64_t mask, const V& v) {
  return each<L>(v, [=](unsigned i, L x) { return mask >> i & 1 ? x : L(0); });
}

template <typename L, typename V>
V load_masked(const V& other, uint64_t mask, const void* from) {
  return each<L>(other, [=](unsigned i, L x) {
    if (mask >> i & 1) std::memcpy(&x, static_cast<const char*>(from) + i * sizeof(L), sizeof(L));
    return x;
  });
}

template <typename L, typename V>
void store_masked(void* to, uint64_t mask, const V& v) {
  const All<L, V> all(v);
  for (unsigned i = 0; i < all.kCount; ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<char*>(to) + i * sizeof(L), &all.lane[i], sizeof(L));
  }
}

template <typename L>
__m512i broadcast(L value) {
  return each<L>(zero<__m512i>(), [=](unsigned, L) { return value; });
}

inline __m512 from_half(const __m256i& v) {
  __m128i in[2];
  std::memcpy(in, &v, sizeof(in));
  const __m256 out[2] = {_mm256_cvtph_ps(in[0]), _mm256_cvtph_ps(in[1])};
  __m512 result;
  std::memcpy(&result, out, sizeof(result));
  return result;
}

inline __m256i to_half(const __m512& v) {
  __m256 in[2];
  std::memcpy(in, &v, sizeof(in));
  const __m128i out[2] = {_mm256_cvtps_ph(in[0], 0), _mm256_cvtps_ph(in[1], 0)};
  __m256i result;
  std::memcpy(&result, out, sizeof(result));
  return result;
}

inline __m512d to_double(const __m256& v) {
  const All<float, __m256> in(v);
  return each<double>(zero<__m512d>(), [&](unsigned i, double) { return static_cast<double>(in.lane[i]); });
}

// As the instructions: the second operand where one is NaN or both are zero.
struct Max {
  template <typename L>
  L operator()(L a, L b) const {
    return a > b ? a : b;
  }
};
struct Min {
  template <typename L>
  L operator()(L a, L b) const {
    return a < b ? a : b;
  }
};
struct AnyBit {
  template <typename L>
  bool operator()(L a, L b) const {
    return (a & b) != 0;
  }
};
struct Negative {
  template <typename L>
  bool operator()(L a, L) const {
    return a < 0;
  }
};

}  // namespace lanes

#undef _mm512_maskz_roundscale_ps
#undef _mm512_maskz_roundscale_pd
#undef _mm512_maskz_cvtps_ph

#define _mm512_cmpeq_epi16_mask(a, b) lanes::mask_of<int16_t, __mmask32>(a, b, std::equal_to<>())
#define _mm512_cmpeq_epi32_mask(a, b) lanes::mask_of<int32_t, __mmask16>(a, b, std::equal_to<>())
#define _mm512_cmpeq_epi64_mask(a, b) lanes::mask_of<int64_t, __mmask8>(a, b, std::equal_to<>())
#define _mm512_cmpge_epi16_mask(a, b) lanes::mask_of<int16_t, __mmask32>(a, b, std::greater_equal<>())
#define _mm512_cmpge_epi32_mask(a, b) lanes::mask_of<int32_t, __mmask16>(a, b, std::greater_equal<>())
#define _mm512_cmpge_epi64_mask(a, b) lanes::mask_of<int64_t, __mmask8>(a, b, std::greater_equal<>())
#define _mm512_cmpgt_epi16_mask(a, b) lanes::mask_of<int16_t, __mmask32>(a, b, std::greater<>())
#define _mm512_cmpgt_epi32_mask(a, b) lanes::mask_of<int32_t, __mmask16>(a, b, std::greater<>())
#define _mm512_cmpgt_epi64_mask(a, b) lanes::mask_of<int64_t, __mmask8>(a, b, std::greater<>())
#define _mm512_movepi16_mask(a) lanes::mask_of<int16_t, __mmask32>(a, a, lanes::Negative())
#define _mm512_movepi32_mask(a) lanes::mask_of<int32_t, __mmask16>(a, a, lanes::Negative())
#define _mm512_movepi64_mask(a) lanes::mask_of<int64_t, __mmask8>(a, a, lanes::Negative())
#define _mm512_test_epi64_mask(a, b) lanes::mask_of<int64_t, __mmask8>(a, b, lanes::AnyBit())
#define _mm256_test_epi8_mask(a, b) lanes::mask_of<int8_t, __mmask32>(a, b, lanes::AnyBit())
#define _mm_test_epi8_mask(a, b) lanes::mask_of<int8_t, __mmask16>(a, b, lanes::AnyBit())
#define _mm512_maskz_mov_epi16(mask, v) lanes::zero_unless<int16_t>(static_cast<__mmask32>(mask), v)
#define _mm512_maskz_mov_epi32(mask, v) lanes::zero_unless<int32_t>(static_cast<__mmask16>(mask), v)
#define _mm512_maskz_mov_epi64(mask, v) lanes::zero_unless<int64_t>(static_cast<__mmask8>(mask), v)
#define _mm256_maskz_mov_epi8(mask, v) lanes::zero_unless<int8_t>(static_cast<__mmask32>(mask), v)
#define _mm_maskz_mov_epi8(mask, v) lanes::zero_unless<int8_t>(static_cast<__mmask16>(mask), v)
#define _mm512_mask_loadu_epi16(v, mask, from) lanes::load_masked<int16_t>(v, static_cast<__mmask32>(mask), from)
#define _mm512_mask_loadu_epi32(v, mask, from) lanes::load_masked<int32_t>(v, static_cast<__mmask16>(mask), from)
#define _mm512_mask_loadu_epi64(v, mask, from) lanes::load_masked<int64_t>(v, static_cast<__mmask8>(mask), from)
#define _mm512_maskz_loadu_epi16(mask, from) \
  lanes::load_masked<int16_t>(lanes::zero<__m512i>(), static_cast<__mmask32>(mask), from)
#define _mm512_maskz_loadu_epi32(mask, from) \
  lanes::load_masked<int32_t>(lanes::zero<__m512i>(), static_cast<__mmask16>(mask), from)
#define _mm512_maskz_loadu_epi64(mask, from) \
  lanes::load_masked<int64_t>(lanes::zero<__m512i>(), static_cast<__mmask8>(mask), from)
#define _mm256_mask_storeu_epi8(to, mask, v) lanes::store_masked<int8_t>(to, static_cast<__mmask32>(mask), v)
#define _mm_mask_storeu_epi8(to, mask, v) lanes::store_masked<int8_t>(to, static_cast<__mmask16>(mask), v)
#define _mm512_maskz_max_ps(mask, a, b) lanes::zip<float, __m512>((__m512)(a), (__m512)(b), lanes::Max())
#define _mm512_maskz_min_ps(mask, a, b) lanes::zip<float, __m512>((__m512)(a), (__m512)(b), lanes::Min())
#define _mm512_maskz_max_pd(mask, a, b) lanes::zip<double, __m512d>((__m512d)(a), (__m512d)(b), lanes::Max())
#define _mm512_maskz_min_pd(mask, a, b) lanes::zip<double, __m512d>((__m512d)(a), (__m512d)(b), lanes::Min())
#define _mm512_maskz_roundscale_ps(mask, v, mode) \
  lanes::each<float>((__m512)(v), [](unsigned, float x) { return std::nearbyint(x); })
#define _mm512_maskz_roundscale_pd(mask, v, mode) \
  lanes::each<double>((__m512d)(v), [](unsigned, double x) { return std::nearbyint(x); })
#define _mm512_maskz_cvtps_pd(mask, v) lanes::to_double((__m256)(v))
#define _mm512_maskz_cvtph_ps(mask, v) lanes::from_half(v)
#define _mm512_maskz_cvtps_ph(mask, v, mode) lanes::to_half((__m512)(v))
#define _mm512_set1_epi16(v) lanes::broadcast<int16_t>(static_cast<int16_t>(v))
#define _mm512_set1_epi32(v) lanes::broadcast<int32_t>(static_cast<int32_t>(v))
#define _mm512_set1_epi64(v) lanes::broadcast<int64_t>(static_cast<int64_t>(v))
