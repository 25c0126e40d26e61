// Sums of products of 8-bit codes: unsigned activations, signed weights, 32-bit results.
#pragma once

#include <cstdint>

// The file of an instruction set has kLanes sums in a vector (Sums), kVectors of them in a block. Each step adds four
// products to every sum: four neighbouring activations (broadcast4) times the four weights of each output channel
// (load_quads). With kSplits the weights must be split first (ProductKernel).
#if defined(__AVX512BW__)
#include "cpu/loops/integer_product_avx512.h"
#elif defined(__AVX2__)
#include "cpu/loops/integer_product_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "cpu/loops/integer_product_neon.h"
#else
#include "cpu/loops/integer_product_generic.h"
#endif

namespace amct_ext::cpu {
namespace {

constexpr int64_t kVectorBytes = kQuadBytes / kVectors;

#if !defined(AMCT_OWN_MICROKERNEL)
// The second summands of split weights.
template <int R, int V>
AMCT_INLINE void add_remainders(const Tile& t, Sums (&sums)[R][V]) {
  for (int v = 0; v < V; ++v) {
    const SplitRemainder& rest = t.remainders[v / kVectors * kMaxVectors + v % kVectors];
    for (int64_t i = 0; i < rest.count; ++i) {
      const uint8_t* const* rows = t.rows + rest.positions[i].tap * t.rows_stride;
      const int64_t at = 4 * int64_t{rest.positions[i].quad};
      const auto w = load_quads(rest.weights + i * kVectorBytes);
      for (int r = 0; r < R; ++r) sums[r][v] = add_dot4(sums[r][v], broadcast4(rows[r] + at), w);
    }
  }
}

// R positions times B blocks of sixteen output channels.
template <int R, int B>
void microkernel(const Tile& t) {
  constexpr int kSums = B * kVectors;
  Sums sums[R][kSums];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kSums; ++v) sums[r][v] = zero_sums();
  }
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const uint8_t* rows[R];
    const int8_t* weights[B];
    for (int r = 0; r < R; ++r) rows[r] = t.rows[tap * t.rows_stride + r];
    for (int b = 0; b < B; ++b) weights[b] = t.weights[b] + tap * t.quads * kQuadBytes;
    for (int64_t q = 0; q < t.quads; ++q) {
      Quads w[kSums];
      for (int v = 0; v < kSums; ++v) {
        w[v] = load_quads(weights[v / kVectors] + q * kQuadBytes + v % kVectors * kVectorBytes);
      }
      for (int r = 0; r < R; ++r) {
        const auto x = broadcast4(rows[r] + 4 * q);
        for (int v = 0; v < kSums; ++v) sums[r][v] = add_dot4(sums[r][v], x, w[v]);
      }
    }
  }
  if constexpr (kSplits) {
    if (t.remainders != nullptr) add_remainders<R, kSums>(t, sums);
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kSums; ++v)
      __builtin_memcpy(t.sums + r * kTileChannels + v * kLanes, &sums[r][v], sizeof(Sums));
  }
}
#endif

template <int R>
void tile_rows(const Tile& t, int blocks) {
  if constexpr (kKernelBlocks >= 4) {
    if (blocks == 4) return microkernel<R, 4>(t);
  }
  if constexpr (kKernelBlocks >= 3) {
    if (blocks == 3) return microkernel<R, 3>(t);
  }
  if constexpr (kKernelBlocks >= 2) {
    if (blocks == 2) return microkernel<R, 2>(t);
  }
  return microkernel<R, 1>(t);
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

#if !defined(AMCT_OWN_WRITE_ROWS)
// write_rows for the channels that fill vectors; returns the first that is left.
AMCT_INLINE int write_rows_vec(const Epilogue& o, const int32_t* sums, int64_t rows, float* y, int64_t stride) {
  int first = 0;
  const AddAndClamp finish(o);
  for (; first + kLanes <= o.columns; first += kLanes) {
    const Dequantizer dequantize_vec(o, first);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * stride + first;
      const auto v = dequantize_vec(sums + r * kTileChannels + first);
      store_floats(y + at, finish(v, o.addend == nullptr ? nullptr : o.addend + at));
    }
  }
  return first;
}
#endif

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
