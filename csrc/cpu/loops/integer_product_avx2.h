// The vector parts of the integer product for AVX2, with and without AVX-VNNI.
#pragma once

#include <immintrin.h>

#include "common/quant_math.h"
#include "cpu/integer_product.h"

namespace amct_ext::cpu {
namespace {

using Sums = __m256i;
using Quads = __m256i;
constexpr int kLanes = 8, kVectors = 2, kKernelBlocks = 1, kCodeShift = 0;
AMCT_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
AMCT_INLINE void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
AMCT_INLINE Sums zero_sums() { return _mm256_setzero_si256(); }
AMCT_INLINE Quads load_quads(const int8_t* w) { return load(w); }
AMCT_INLINE Quads broadcast4(const uint8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}
#if defined(__AVXVNNI__)
constexpr bool kSplits = false;
constexpr decltype(ProductKernel::split_weights) kSplitWeights = nullptr;
AMCT_INLINE Sums add_dot4(Sums sums, Quads x, Quads w) { return _mm256_dpbusd_avx_epi32(sums, x, w); }
#else
// The sum of two products is 16 bits wide.
AMCT_INLINE Sums add_dot4(Sums sums, Quads x, Quads w) {
  const __m256i pairs = _mm256_maddubs_epi16(x, w);
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

void split_weights(const int8_t* weights, int64_t quads, int8_t* safe, SplitOutput* remainders) {
  constexpr int64_t kBytes = kQuadBytes / kVectors;
  const __m256i ones = _mm256_set1_epi8(1), most = _mm256_set1_epi16(kMaxPairSum), sign = _mm256_set1_epi8(-128);
  for (int64_t q = 0; q < quads; ++q) {
    for (int v = 0; v < kVectors; ++v) {
      const __m256i w = load(weights + q * kQuadBytes + v * kBytes);
      const __m256i large = _mm256_cmpgt_epi16(_mm256_abs_epi16(_mm256_maddubs_epi16(ones, w)), most);
      __m256i first = w;
      if (!_mm256_testz_si256(large, large)) {
        // Half of each weight, rounded down: a shift of unsigned bytes.
        const __m256i bytes = _mm256_and_si256(_mm256_srli_epi16(_mm256_xor_si256(w, sign), 1), _mm256_set1_epi8(127));
        first = _mm256_blendv_epi8(w, _mm256_sub_epi8(bytes, _mm256_set1_epi8(64)), large);
        remainders[v].indices[remainders[v].count] = static_cast<int32_t>(q);
        store(remainders[v].weights + remainders[v].count++ * kBytes, _mm256_sub_epi8(w, first));
      }
      store(safe + q * kQuadBytes + v * kBytes, first);
    }
  }
}
constexpr bool kSplits = true;
constexpr decltype(ProductKernel::split_weights) kSplitWeights = split_weights;
#endif

// dequantize() for eight channels at a time, whose factors stay in registers.
struct Dequantizer {
  __m256i zeros;
  __m256d scales[2], biases[2];

  AMCT_INLINE Dequantizer(const Epilogue& o, int first)
      : zeros(load(o.zeros + first)),
        scales{_mm256_loadu_pd(o.scales + first), _mm256_loadu_pd(o.scales + first + 4)},
        biases{_mm256_loadu_pd(o.biases + first), _mm256_loadu_pd(o.biases + first + 4)} {}

  AMCT_INLINE __m256 operator()(const int32_t* sums) const {
    const __m256i total = _mm256_sub_epi32(load(sums), zeros);
    const __m256d low = _mm256_cvtepi32_pd(_mm256_castsi256_si128(total)),
                  high = _mm256_cvtepi32_pd(_mm256_extracti128_si256(total, 1));
    const __m128 first = _mm256_cvtpd_ps(_mm256_add_pd(_mm256_mul_pd(low, scales[0]), biases[0])),
                 second = _mm256_cvtpd_ps(_mm256_add_pd(_mm256_mul_pd(high, scales[1]), biases[1]));
    return _mm256_set_m128(second, first);
  }
};

// add_and_clamp() for eight values; the instructions return their second operand where one is NaN.
struct AddAndClamp {
  __m256 lowest, highest;

  AMCT_INLINE explicit AddAndClamp(const Epilogue& o)
      : lowest(_mm256_set1_ps(o.lowest)), highest(_mm256_set1_ps(o.highest)) {}

  AMCT_INLINE __m256 operator()(__m256 v, const float* addend) const {
    if (addend != nullptr) v = _mm256_add_ps(v, _mm256_loadu_ps(addend));
    return _mm256_min_ps(highest, _mm256_max_ps(lowest, v));
  }
};

AMCT_INLINE void store_floats(float* p, __m256 v) { _mm256_storeu_ps(p, v); }

// Two of the three steps of a transpose: afterwards channels i and i + 4 lie in b[i] and b[i + 4], half of each in
// both.
AMCT_INLINE void transpose_two_steps(const __m256 (&a)[8], __m256 (&b)[8]) {
  for (int i = 0; i < 8; i += 4) {
    const __m256 low[2] = {_mm256_unpacklo_ps(a[i], a[i + 1]), _mm256_unpacklo_ps(a[i + 2], a[i + 3])};
    const __m256 high[2] = {_mm256_unpackhi_ps(a[i], a[i + 1]), _mm256_unpackhi_ps(a[i + 2], a[i + 3])};
    b[i] = _mm256_shuffle_ps(low[0], low[1], 0x44);
    b[i + 1] = _mm256_shuffle_ps(low[0], low[1], 0xee);
    b[i + 2] = _mm256_shuffle_ps(high[0], high[1], 0x44);
    b[i + 3] = _mm256_shuffle_ps(high[0], high[1], 0xee);
  }
}

// write_columns for sixteen channels from `first` on, in blocks of 8 x 8 transposed in registers; returns the first row
// that is left.
AMCT_INLINE int64_t write_columns_vec(const Epilogue& o, const int32_t* sums, int first, int64_t rows, float* y,
                                      int64_t stride) {
  const AddAndClamp finish(o);
  const int64_t whole = rows / 8 * 8;
  for (int from = first; from < first + kBlockChannels; from += kLanes) {
    const Dequantizer dequantize8(o, from);
    for (int64_t r = 0; r < whole; r += 8) {
      __m256 a[8], b[8];
      for (int i = 0; i < 8; ++i) a[i] = dequantize8(sums + (r + i) * kTileChannels + from);
      transpose_two_steps(a, b);
      const auto put = [&](int channel, __m256 v) __attribute__((always_inline)) {
        const int64_t at = (from + channel) * stride + r;
        store_floats(y + at, finish(v, o.addend == nullptr ? nullptr : o.addend + at));
      };
      for (int i = 0; i < 4; ++i) {
        put(i, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
        put(i + 4, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
      }
    }
  }
  return whole;
}

}  // namespace
}  // namespace amct_ext::cpu
