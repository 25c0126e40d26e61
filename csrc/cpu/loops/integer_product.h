// Sums of products of 8-bit codes: unsigned activations, signed weights, 32-bit results.
#pragma once

#include <cstdint>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#include "common/quant_math.h"
#include "cpu/integer_product.h"

namespace amct_ext::cpu {
namespace {

// A register of sixteen sums. Each step adds four products to every one: four neighbouring activations times the four
// weights of each output channel. No intermediate result saturates on any instruction set.
#if defined(__AVX512VNNI__)
using Sums = __m512i;
using Quads = __m512i;
AMCT_INLINE Sums no_sums() { return _mm512_setzero_si512(); }
AMCT_INLINE Quads load_quads(const int8_t* w) { return _mm512_loadu_si512(w); }
AMCT_INLINE Quads spread(const uint8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}
AMCT_INLINE Sums multiply_add(Sums sums, Quads x, Quads w) { return _mm512_dpbusd_epi32(sums, x, w); }
#else
struct Sums {
  int32_t lane[kColumns];
};
struct Quads {
  const int8_t* w;
};
struct Four {
  const uint8_t* x;
};
AMCT_INLINE Sums no_sums() { return {}; }
AMCT_INLINE Quads load_quads(const int8_t* w) { return {w}; }
AMCT_INLINE Four spread(const uint8_t* x) { return {x}; }
AMCT_INLINE Sums multiply_add(Sums sums, Four x, Quads w) {
  for (int c = 0; c < kColumns; ++c) {
    int32_t sum = 0;
    for (int k = 0; k < 4; ++k) sum += int32_t{x.x[k]} * int32_t{w.w[4 * c + k]};
    sums.lane[c] += sum;
  }
  return sums;
}
#endif

template <int R, int B>
void tile(const Tile& t) {
  Sums sums[R][B];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) sums[r][b] = no_sums();
  }
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const uint8_t* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = t.rows[tap * t.rows_stride + r];
    const int8_t* weights = t.weights + tap * t.quads * kQuadBytes;
    for (int64_t q = 0; q < t.quads; ++q) {
      Quads w[B];
      for (int b = 0; b < B; ++b) w[b] = load_quads(weights + b * t.block_stride + q * kQuadBytes);
      for (int r = 0; r < R; ++r) {
        const auto x = spread(rows[r] + 4 * q);
        for (int b = 0; b < B; ++b) sums[r][b] = multiply_add(sums[r][b], x, w[b]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) __builtin_memcpy(t.sums + r * kBlockColumns + b * kColumns, &sums[r][b], sizeof(Sums));
  }
}

template <int R>
void tile_rows(const Tile& t, int blocks) {
  switch (blocks) {
    case 4:
      return tile<R, 4>(t);
    case 3:
      return tile<R, 3>(t);
    case 2:
      return tile<R, 2>(t);
    default:
      return tile<R, 1>(t);
  }
}

void sums_of(const Tile& t, int rows, int blocks) {
  switch (rows) {
    case 6:
      return tile_rows<6>(t, blocks);
    case 5:
      return tile_rows<5>(t, blocks);
    case 4:
      return tile_rows<4>(t, blocks);
    case 3:
      return tile_rows<3>(t, blocks);
    case 2:
      return tile_rows<2>(t, blocks);
    default:
      return tile_rows<1>(t, blocks);
  }
}

// Sums to floats: one rounding, at the end. The difference with the zero point wraps as the sums do.
AMCT_INLINE float dequantized(const Output& o, int32_t sum, int c) {
  const int32_t total = static_cast<int32_t>(static_cast<uint32_t>(sum) - o.zeros[c]);
  return static_cast<float>(static_cast<double>(total) * o.scales[c] + o.biases[c]);
}

AMCT_INLINE float finished(const Output& o, float v, const float* addend) {
  if (addend != nullptr) v += *addend;
  v = v < o.lowest ? o.lowest : v;
  return v > o.highest ? o.highest : v;
}

#if defined(__AVX512VNNI__)
// The same for sixteen channels at a time, whose factors stay in registers.
struct Factors {
  __m512i zeros;
  __m512d scales[2], biases[2];

  AMCT_INLINE Factors(const Output& o, int first)
      : zeros(_mm512_loadu_si512(o.zeros + first)),
        scales{_mm512_loadu_pd(o.scales + first), _mm512_loadu_pd(o.scales + first + 8)},
        biases{_mm512_loadu_pd(o.biases + first), _mm512_loadu_pd(o.biases + first + 8)} {}

  AMCT_INLINE __m512 dequantized(const int32_t* sums) const {
    const __m512i total = _mm512_sub_epi32(_mm512_loadu_si512(sums), zeros);
    const __m512d low = _mm512_cvtepi32_pd(_mm512_castsi512_si256(total)),
                  high = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(total, 1));
    const __m256 first = _mm512_cvtpd_ps(_mm512_add_pd(_mm512_mul_pd(low, scales[0]), biases[0])),
                 second = _mm512_cvtpd_ps(_mm512_add_pd(_mm512_mul_pd(high, scales[1]), biases[1]));
    return _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
  }
};

struct Bounds {
  __m512 lowest, highest;

  AMCT_INLINE explicit Bounds(const Output& o) : lowest(_mm512_set1_ps(o.lowest)), highest(_mm512_set1_ps(o.highest)) {}

  // Of the two operands the second is returned where one is a NaN.
  AMCT_INLINE __m512 finished(__m512 v, const float* addend) const {
    if (addend != nullptr) v = _mm512_add_ps(v, _mm512_loadu_ps(addend));
    return _mm512_min_ps(highest, _mm512_max_ps(lowest, v));
  }
};
#endif

void write_rows(const Output& o, const int32_t* __restrict sums, int64_t rows, float* __restrict y, int64_t stride) {
  int first = 0;
#if defined(__AVX512VNNI__)
  const Bounds bounds(o);
  for (; first + kColumns <= o.columns; first += kColumns) {
    const Factors factors(o, first);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * stride + first;
      const __m512 v = factors.dequantized(sums + r * kBlockColumns + first);
      _mm512_storeu_ps(y + at, bounds.finished(v, o.addend == nullptr ? nullptr : o.addend + at));
    }
  }
#endif
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* __restrict in = sums + r * kBlockColumns;
    for (int c = first; c < o.columns; ++c) {
      const int64_t at = r * stride + c;
      y[at] = finished(o, dequantized(o, in[c], c), o.addend == nullptr ? nullptr : o.addend + at);
    }
  }
}

// Each channel a row of its own: sixteen positions of sixteen channels at a time turn in registers.
void write_columns(const Output& o, const int32_t* __restrict sums, int64_t rows, float* __restrict y, int64_t stride) {
  for (int first = 0; first < o.columns; first += kColumns) {
    const int count = o.columns - first < kColumns ? o.columns - first : kColumns;
    int64_t r = 0;
#if defined(__AVX512VNNI__)
    if (count == kColumns) {
      const Factors factors(o, first);
      const Bounds bounds(o);
      for (; r + 16 <= rows; r += 16) {
        __m512 a[16], b[16];
        for (int i = 0; i < 16; ++i) a[i] = factors.dequantized(sums + (r + i) * kBlockColumns + first);
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
        const auto store = [&](int channel, __m512 v) __attribute__((always_inline)) {
          const int64_t at = (first + channel) * stride + r;
          _mm512_storeu_ps(y + at, bounds.finished(v, o.addend == nullptr ? nullptr : o.addend + at));
        };
        for (int i = 0; i < 8; ++i) {
          store(i, _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
          store(i + 8, _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
        }
      }
    }
#endif
    for (; r < rows; ++r) {
      const int32_t* __restrict in = sums + r * kBlockColumns;
      for (int c = first; c < first + count; ++c) {
        const int64_t at = c * stride + r;
        y[at] = finished(o, dequantized(o, in[c], c), o.addend == nullptr ? nullptr : o.addend + at);
      }
    }
  }
}

}  // namespace
}  // namespace amct_ext::cpu
