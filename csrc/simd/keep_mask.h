// KeepMask<kBytes>: which lanes of a vector of kBytes-sized elements are kept, in the form the instruction set compares
// into. KeepMask::Lanes is what comparing gives, KeepMask::Keep says what is kept:
//   equal(a, b), greater(a, b)   lanes where the comparison is true
//   at_least(m, limit)           keep where m >= limit
//   from_lanes(v)                keep where a lane of v is all ones
//   apply(v, keep)               v, +0 where not kept
//   store, store4                one mask, or four `stride` apart, as bytes of 0 or 1
// Where kMaskedMemory is true: load_some and store_some touch only the memory of some lanes.
#pragma once

#include "simd/vec.h"

#if AMCT_VEC_BYTES == 64
#include "simd/keep_mask_avx512.h"
#else
#include "simd/keep_mask_generic.h"
#endif
