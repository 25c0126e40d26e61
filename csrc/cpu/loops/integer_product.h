// Sums of products of 8-bit codes: unsigned activations, signed weights, 32-bit results.
#pragma once

#include <cstdint>

// The file of an instruction set has sixteen sums in a vector (Sums). Each step adds four products to every one: four
// neighbouring activations (broadcast4) times the four weights of each output channel (load_quads). No intermediate
// result saturates on any instruction set.
#if defined(__AVX512VNNI__)
#include "cpu/loops/integer_product_vnni.h"
#else
#include "cpu/loops/integer_product_generic.h"
#endif

namespace amct_ext::cpu {
namespace {

// R positions times B blocks of sixteen output channels.
template <int R, int B>
void microkernel(const Tile& t) {
  Sums sums[R][B];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) sums[r][b] = zero_sums();
  }
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const uint8_t* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = t.rows[tap * t.rows_stride + r];
    const int8_t* weights = t.weights + tap * t.quads * kQuadBytes;
    for (int64_t q = 0; q < t.quads; ++q) {
      Quads w[B];
      for (int b = 0; b < B; ++b) w[b] = load_quads(weights + b * t.block_stride + q * kQuadBytes);
      for (int r = 0; r < R; ++r) {
        const auto x = broadcast4(rows[r] + 4 * q);
        for (int b = 0; b < B; ++b) sums[r][b] = add_dot4(sums[r][b], x, w[b]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b)
      __builtin_memcpy(t.sums + r * kTileChannels + b * kBlockChannels, &sums[r][b], sizeof(Sums));
  }
}

template <int R>
void tile_rows(const Tile& t, int blocks) {
  switch (blocks) {
    case 4:
      return microkernel<R, 4>(t);
    case 3:
      return microkernel<R, 3>(t);
    case 2:
      return microkernel<R, 2>(t);
    default:
      return microkernel<R, 1>(t);
  }
}

void compute_tile(const Tile& t, int rows, int blocks) {
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
AMCT_INLINE float dequantize(const Epilogue& o, int32_t sum, int c) {
  const int32_t total = static_cast<int32_t>(static_cast<uint32_t>(sum) - o.zeros[c]);
  return static_cast<float>(static_cast<double>(total) * o.scales[c] + o.biases[c]);
}

AMCT_INLINE float add_and_clamp(const Epilogue& o, float v, const float* addend) {
  if (addend != nullptr) v += *addend;
  v = v < o.lowest ? o.lowest : v;
  return v > o.highest ? o.highest : v;
}

void write_rows(const Epilogue& o, const int32_t* __restrict sums, int64_t rows, float* __restrict y, int64_t stride) {
  const int first = write_rows_vec(o, sums, rows, y, stride);
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* __restrict in = sums + r * kTileChannels;
    for (int c = first; c < o.columns; ++c) {
      const int64_t at = r * stride + c;
      y[at] = add_and_clamp(o, dequantize(o, in[c], c), o.addend == nullptr ? nullptr : o.addend + at);
    }
  }
}

// Each channel is a row of the result.
void write_columns(const Epilogue& o, const int32_t* __restrict sums, int64_t rows, float* __restrict y,
                   int64_t stride) {
  for (int first = 0; first < o.columns; first += kBlockChannels) {
    const int count = o.columns - first < kBlockChannels ? o.columns - first : kBlockChannels;
    int64_t r = 0;
    if (count == kBlockChannels) r = write_columns_vec(o, sums, first, rows, y, stride);
    for (; r < rows; ++r) {
      const int32_t* __restrict in = sums + r * kTileChannels;
      for (int c = first; c < first + count; ++c) {
        const int64_t at = c * stride + r;
        y[at] = add_and_clamp(o, dequantize(o, in[c], c), o.addend == nullptr ? nullptr : o.addend + at);
      }
    }
  }
}

}  // namespace
}  // namespace amct_ext::cpu
