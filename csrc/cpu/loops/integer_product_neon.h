// The vector parts of the integer product for NEON with dot products, and with products of 8-bit matrices (i8mm).
#pragma once

#include <arm_neon.h>

#include "common/quant_math.h"
#include "cpu/integer_product.h"

namespace amct_ext::cpu {
namespace {

constexpr int kLanes = 4, kVectors = 4, kKernelBlocks = 1;
constexpr bool kSplits = false;
constexpr decltype(ProductKernel::split_weights) kSplitWeights = nullptr;

#define AMCT_OWN_MICROKERNEL

// The codes at `x`, one row's, as the kernel multiplies them. Read: four bytes, repeated.
AMCT_INLINE uint8x16_t repeat4(const uint8_t* x) {
  uint32_t four;
  __builtin_memcpy(&four, x, 4);
  return vreinterpretq_u8_u32(vdupq_n_u32(four));
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int kCodeShift = 0;

// Two rows of eight codes.
AMCT_INLINE uint8x16_t pair_rows(const uint8_t* first, const uint8_t* second) {
  return vcombine_u8(vld1_u8(first), vld1_u8(second));
}
// The same of four codes each; the other four meet weights of zero.
AMCT_INLINE uint8x16_t pair_rows_of_four(const uint8_t* first, const uint8_t* second) {
  return vcombine_u8(vget_low_u8(repeat4(first)), vget_low_u8(repeat4(second)));
}

// Sums of two rows and two channels in a vector: sums[pair of rows][pair of channels].
template <int R>
AMCT_INLINE void add_matrices(int32x4_t (&sums)[R][8], const uint8x16_t (&x)[R], const int8_t* w, bool two_quads) {
  for (int v = 0; v < 4; ++v) {
    const int32x4_t low = vreinterpretq_s32_s8(vld1q_s8(w + 16 * v));
    const int32x4_t high = two_quads ? vreinterpretq_s32_s8(vld1q_s8(w + kQuadBytes + 16 * v)) : vdupq_n_s32(0);
    // Two channels of eight weights.
    const int8x16_t first = vreinterpretq_s8_s32(vzip1q_s32(low, high));
    const int8x16_t second = vreinterpretq_s8_s32(vzip2q_s32(low, high));
    for (int p = 0; p < R; ++p) {
      sums[p][2 * v] = vusmmlaq_s32(sums[p][2 * v], x[p], first);
      sums[p][2 * v + 1] = vusmmlaq_s32(sums[p][2 * v + 1], x[p], second);
    }
  }
}

// An odd number of rows: the last one is computed twice.
template <int R, int B>
void microkernel(const Tile& t) {
  constexpr int kPairs = (R + 1) / 2;
  int32x4_t sums[kPairs][8];
  for (auto& row : sums) {
    for (auto& sum : row) sum = vdupq_n_s32(0);
  }
  const int8_t* w = t.weights[0];
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const uint8_t* rows[2 * kPairs];
    for (int r = 0; r < 2 * kPairs; ++r) rows[r] = t.rows[tap * t.rows_stride + (r < R ? r : R - 1)];
    uint8x16_t x[kPairs];
    int64_t q = 0;
    for (; q + 2 <= t.quads; q += 2, w += 2 * kQuadBytes) {
      for (int p = 0; p < kPairs; ++p) x[p] = pair_rows(rows[2 * p] + 4 * q, rows[2 * p + 1] + 4 * q);
      add_matrices<kPairs>(sums, x, w, true);
    }
    if (q < t.quads) {
      for (int p = 0; p < kPairs; ++p) x[p] = pair_rows_of_four(rows[2 * p] + 4 * q, rows[2 * p + 1] + 4 * q);
      add_matrices<kPairs>(sums, x, w, false);
      w += kQuadBytes;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < 4; ++v) {
      const int32x4_t left = sums[r / 2][2 * v], right = sums[r / 2][2 * v + 1];
      const int64x2_t a = vreinterpretq_s64_s32(left), b = vreinterpretq_s64_s32(right);
      const int64x2_t row = r % 2 == 0 ? vzip1q_s64(a, b) : vzip2q_s64(a, b);
      vst1q_s32(t.sums + r * kTileChannels + 4 * v, vreinterpretq_s32_s64(row));
    }
  }
}
#else
// The instruction multiplies signed codes.
constexpr int kCodeShift = 128;

AMCT_INLINE int8x16_t as_signed(uint8x16_t x) { return vreinterpretq_s8_u8(veorq_u8(x, vdupq_n_u8(128))); }

// Products of quad `Lane` of sixteen codes.
template <int Lane, int R>
AMCT_INLINE void add_lane(int32x4_t (&sums)[R][4], const int8x16_t (&x)[R], const int8_t* w) {
  for (int v = 0; v < 4; ++v) {
    const int8x16_t four = vld1q_s8(w + Lane * kQuadBytes + 16 * v);
    for (int r = 0; r < R; ++r) sums[r][v] = vdotq_laneq_s32(sums[r][v], four, x[r], Lane);
  }
}

template <int R, int B>
void microkernel(const Tile& t) {
  int32x4_t sums[R][4];
  for (auto& row : sums) {
    for (auto& sum : row) sum = vdupq_n_s32(0);
  }
  const int8_t* w = t.weights[0];
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const uint8_t* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = t.rows[tap * t.rows_stride + r];
    int8x16_t x[R];
    int64_t q = 0;
    for (; q + 4 <= t.quads; q += 4, w += 4 * kQuadBytes) {
      for (int r = 0; r < R; ++r) x[r] = as_signed(vld1q_u8(rows[r] + 4 * q));
      add_lane<0, R>(sums, x, w);
      add_lane<1, R>(sums, x, w);
      add_lane<2, R>(sums, x, w);
      add_lane<3, R>(sums, x, w);
    }
    for (; q < t.quads; ++q, w += kQuadBytes) {
      for (int r = 0; r < R; ++r) x[r] = as_signed(repeat4(rows[r] + 4 * q));
      add_lane<0, R>(sums, x, w);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < 4; ++v) vst1q_s32(t.sums + r * kTileChannels + 4 * v, sums[r][v]);
  }
}
#endif

// dequantize() for four channels.
struct Dequantizer {
  uint32x4_t zeros;
  float64x2_t scales[2], biases[2];

  AMCT_INLINE Dequantizer(const Epilogue& o, int first)
      : zeros(vld1q_u32(o.zeros + first)),
        scales{vld1q_f64(o.scales + first), vld1q_f64(o.scales + first + 2)},
        biases{vld1q_f64(o.biases + first), vld1q_f64(o.biases + first + 2)} {}

  AMCT_INLINE float32x4_t operator()(const int32_t* sums) const {
    const int32x4_t total = vreinterpretq_s32_u32(vsubq_u32(vreinterpretq_u32_s32(vld1q_s32(sums)), zeros));
    const float64x2_t low = vcvtq_f64_s64(vmovl_s32(vget_low_s32(total))), high = vcvtq_f64_s64(vmovl_high_s32(total));
    const float32x2_t first = vcvt_f32_f64(vaddq_f64(vmulq_f64(low, scales[0]), biases[0]));
    return vcvt_high_f32_f64(first, vaddq_f64(vmulq_f64(high, scales[1]), biases[1]));
  }
};

// add_and_clamp() for four values.
struct AddAndClamp {
  float32x4_t lowest, highest;

  AMCT_INLINE explicit AddAndClamp(const Epilogue& o)
      : lowest(vdupq_n_f32(o.lowest)), highest(vdupq_n_f32(o.highest)) {}

  AMCT_INLINE float32x4_t operator()(float32x4_t v, const float* addend) const {
    if (addend != nullptr) v = vaddq_f32(v, vld1q_f32(addend));
    v = vbslq_f32(vcltq_f32(v, lowest), lowest, v);
    return vbslq_f32(vcgtq_f32(v, highest), highest, v);
  }
};

AMCT_INLINE void store_floats(float* p, float32x4_t v) { vst1q_f32(p, v); }

// write_columns for sixteen channels from `first` on, in blocks of 4 x 4 transposed in registers; returns the first row
// that is left.
AMCT_INLINE int64_t write_columns_vec(const Epilogue& o, const int32_t* sums, int first, int64_t rows, float* y,
                                      int64_t stride) {
  const AddAndClamp finish(o);
  const int64_t whole = rows / 4 * 4;
  for (int from = first; from < first + kBlockChannels; from += kLanes) {
    const Dequantizer dequantize4(o, from);
    for (int64_t r = 0; r < whole; r += 4) {
      float32x4_t a[4];
      for (int i = 0; i < 4; ++i) a[i] = dequantize4(sums + (r + i) * kTileChannels + from);
      const float64x2_t even[2] = {vreinterpretq_f64_f32(vtrn1q_f32(a[0], a[1])),
                                   vreinterpretq_f64_f32(vtrn1q_f32(a[2], a[3]))};
      const float64x2_t odd[2] = {vreinterpretq_f64_f32(vtrn2q_f32(a[0], a[1])),
                                  vreinterpretq_f64_f32(vtrn2q_f32(a[2], a[3]))};
      const float32x4_t b[4] = {
          vreinterpretq_f32_f64(vzip1q_f64(even[0], even[1])), vreinterpretq_f32_f64(vzip1q_f64(odd[0], odd[1])),
          vreinterpretq_f32_f64(vzip2q_f64(even[0], even[1])), vreinterpretq_f32_f64(vzip2q_f64(odd[0], odd[1]))};
      for (int i = 0; i < 4; ++i) {
        const int64_t at = (from + i) * stride + r;
        store_floats(y + at, finish(b[i], o.addend == nullptr ? nullptr : o.addend + at));
      }
    }
  }
  return whole;
}

}  // namespace
}  // namespace amct_ext::cpu
