// The vector parts of the integer product for AVX-512, with and without VNNI.
#pragma once

#include <immintrin.h>

#include "common/quant_math.h"
#include "cpu/integer_product.h"

namespace amct_ext::cpu {
namespace {

using Sums = __m512i;
using Quads = __m512i;
constexpr int kLanes = 16, kVectors = 1, kKernelBlocks = 4, kCodeShift = 0;
AMCT_INLINE Sums zero_sums() { return _mm512_setzero_si512(); }
AMCT_INLINE Quads load_quads(const int8_t* w) { return _mm512_loadu_si512(w); }
AMCT_INLINE Quads broadcast4(const uint8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}
#if defined(__AVX512VNNI__)
constexpr bool kSplits = false;
constexpr decltype(ProductKernel::split_weights) kSplitWeights = nullptr;
AMCT_INLINE Sums add_dot4(Sums sums, Quads x, Quads w) { return _mm512_dpbusd_epi32(sums, x, w); }
#else
// The sum of two products is 16 bits wide.
AMCT_INLINE Sums add_dot4(Sums sums, Quads x, Quads w) {
  const __m512i pairs = _mm512_maddubs_epi16(x, w);
  return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

void split_weights(const int8_t* weights, int64_t quads, int8_t* safe, SplitOutput* remainders) {
  const __m512i ones = _mm512_set1_epi8(1), most = _mm512_set1_epi16(kMaxPairSum), sign = _mm512_set1_epi8(-128);
  for (int64_t q = 0; q < quads; ++q) {
    const __m512i w = _mm512_loadu_si512(weights + q * kQuadBytes);
    const __mmask32 large = _mm512_cmpgt_epi16_mask(_mm512_abs_epi16(_mm512_maddubs_epi16(ones, w)), most);
    __m512i first = w;
    if (large != 0) {
      // Half of each weight, rounded down: a shift of unsigned bytes.
      const __m512i bytes = _mm512_and_si512(_mm512_srli_epi16(_mm512_xor_si512(w, sign), 1), _mm512_set1_epi8(127));
      first = _mm512_mask_mov_epi16(w, large, _mm512_sub_epi8(bytes, _mm512_set1_epi8(64)));
      remainders->indices[remainders->count] = static_cast<int32_t>(q);
      _mm512_storeu_si512(remainders->weights + remainders->count++ * kQuadBytes, _mm512_sub_epi8(w, first));
    }
    _mm512_storeu_si512(safe + q * kQuadBytes, first);
  }
}
constexpr bool kSplits = true;
constexpr decltype(ProductKernel::split_weights) kSplitWeights = split_weights;
#endif

// dequantize() for sixteen channels at a time, whose factors stay in registers.
struct Dequantizer {
  __m512i zeros;
  __m512d scales[2], biases[2];

  AMCT_INLINE Dequantizer(const Epilogue& o, int first)
      : zeros(_mm512_loadu_si512(o.zeros + first)),
        scales{_mm512_loadu_pd(o.scales + first), _mm512_loadu_pd(o.scales + first + 8)},
        biases{_mm512_loadu_pd(o.biases + first), _mm512_loadu_pd(o.biases + first + 8)} {}

  AMCT_INLINE __m512 operator()(const int32_t* sums) const {
    const __m512i total = _mm512_sub_epi32(_mm512_loadu_si512(sums), zeros);
    const __m512d low = _mm512_cvtepi32_pd(_mm512_castsi512_si256(total)),
                  high = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(total, 1));
    const __m256 first = _mm512_cvtpd_ps(_mm512_add_pd(_mm512_mul_pd(low, scales[0]), biases[0])),
                 second = _mm512_cvtpd_ps(_mm512_add_pd(_mm512_mul_pd(high, scales[1]), biases[1]));
    return _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
  }
};

// add_and_clamp() for sixteen values; the instructions return their second operand where one is NaN.
struct AddAndClamp {
  __m512 lowest, highest;

  AMCT_INLINE explicit AddAndClamp(const Epilogue& o)
      : lowest(_mm512_set1_ps(o.lowest)), highest(_mm512_set1_ps(o.highest)) {}

  AMCT_INLINE __m512 operator()(__m512 v, const float* addend) const {
    if (addend != nullptr) v = _mm512_add_ps(v, _mm512_loadu_ps(addend));
    return _mm512_min_ps(highest, _mm512_max_ps(lowest, v));
  }
};

AMCT_INLINE void store_floats(float* p, __m512 v) { _mm512_storeu_ps(p, v); }

// Three of the four steps of a transpose: afterwards channels i and i + 8 lie in b[i] and b[i + 8], half of each in
// both.
AMCT_INLINE void transpose_three_steps(__m512 (&a)[16], __m512 (&b)[16]) {
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
  }
}

// write_columns for sixteen channels from `first` on, in blocks of 16 x 16 transposed in registers; returns the first
// row that is left.
AMCT_INLINE int64_t write_columns_vec(const Epilogue& o, const int32_t* sums, int first, int64_t rows, float* y,
                                      int64_t stride) {
  int64_t r = 0;
  const Dequantizer dequantize16(o, first);
  const AddAndClamp finish(o);
  for (; r + 16 <= rows; r += 16) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = dequantize16(sums + (r + i) * kTileChannels + first);
    transpose_three_steps(a, b);
    const auto store = [&](int channel, __m512 v) __attribute__((always_inline)) {
      const int64_t at = (first + channel) * stride + r;
      store_floats(y + at, finish(v, o.addend == nullptr ? nullptr : o.addend + at));
    };
    for (int i = 0; i < 8; ++i) {
      store(i, _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
      store(i + 8, _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
    }
  }
  return r;
}

}  // namespace
}  // namespace amct_ext::cpu
