// KeepMask as a vector: all ones in the lanes of what is dropped.
#pragma once

#include "simd/mask_bytes.h"

namespace amct_ext::cpu {
namespace {

template <typename V>
AMCT_INLINE bool any_lane(V lanes) {
  return any(lanes);
}

template <int kBytes>
struct KeepMask {
  using Lanes = typename VecTypes<kBytes>::Signed;
  using Keep = Lanes;
  static constexpr bool kMaskedMemory = false;
  static AMCT_INLINE Lanes equal(Lanes a, Lanes b) { return a == b; }
  static AMCT_INLINE Lanes greater(Lanes a, Lanes b) { return a > b; }
  static AMCT_INLINE Keep at_least(Lanes m, Lanes limit) { return limit > m; }
  static AMCT_INLINE Keep from_lanes(Lanes v) { return ~v; }
  static AMCT_INLINE Lanes apply(Lanes v, Keep dropped) { return v & ~dropped; }
  static AMCT_INLINE void store(uint8_t* to, Keep dropped) { store_mask_bytes<kBytes>(to, dropped); }
  static AMCT_INLINE void store4(uint8_t* to, const Keep* dropped, int64_t stride) {
    store4_mask_bytes<kBytes>(to, dropped, stride);
  }
};

}  // namespace
}  // namespace amct_ext::cpu
