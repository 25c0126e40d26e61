// Sums of products of 8-bit codes: unsigned activations, signed weights, 32-bit results.
#pragma once

#include <cstdint>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#include "cpu/product.h"
#include "quant_math.h"

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
AMCT_INLINE float dequantized(int32_t sum, uint32_t zero, double scale, double bias) {
  const int32_t total = static_cast<int32_t>(static_cast<uint32_t>(sum) - zero);
  return static_cast<float>(static_cast<double>(total) * scale + bias);
}

void write_rows(const Output& o, const int32_t* __restrict sums, int64_t rows, float* __restrict y, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* __restrict in = sums + r * kBlockColumns;
    float* __restrict out = y + r * stride;
    for (int c = 0; c < o.columns; ++c) out[c] = dequantized(in[c], o.zeros[c], o.scales[c], o.biases[c]);
  }
}

// Each channel a row of its own: sixteen positions of sixteen channels at a time turn in the first-level cache.
void write_columns(const Output& o, const int32_t* __restrict sums, int64_t rows, float* __restrict y, int64_t stride) {
  for (int first = 0; first < o.columns; first += kColumns) {
    const int count = o.columns - first < kColumns ? o.columns - first : kColumns;
    int64_t r = 0;
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
    if (count == kColumns) {
      for (; r + 16 <= rows; r += 16) {
        alignas(64) float turned[16][16];
        for (int i = 0; i < 16; ++i) {
          const int32_t* __restrict in = sums + (r + i) * kBlockColumns + first;
          for (int c = 0; c < kColumns; ++c) {
            turned[i][c] = dequantized(in[c], o.zeros[first + c], o.scales[first + c], o.biases[first + c]);
          }
        }
        __m512 a[16], b[16];
        for (int i = 0; i < 16; ++i) a[i] = _mm512_load_ps(turned[i]);
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
        for (int i = 0; i < 8; ++i) {
          const __m512 low = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
          const __m512 high = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
          _mm512_storeu_ps(y + (first + i) * stride + r, low);
          _mm512_storeu_ps(y + (first + i + 8) * stride + r, high);
        }
      }
    }
#endif
    for (; r < rows; ++r) {
      const int32_t* __restrict in = sums + r * kBlockColumns + first;
      for (int c = 0; c < count; ++c) {
        const int at = first + c;
        y[at * stride + r] = dequantized(in[c], o.zeros[at], o.scales[at], o.biases[at]);
      }
    }
  }
}

}  // namespace
}  // namespace amct_ext::cpu
