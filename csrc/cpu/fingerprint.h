// What memory holds, in 64 bits: tells that it was written to, also past autograd's version counters.
#pragma once

#include <cstddef>
#include <cstdint>

#define AMCT_API __attribute__((visibility("default")))

namespace amct_ext::cpu {

// Of `pieces` pieces of 64 bytes, one out of every equal part, and of all bytes where that is no more. A change of a
// single 8-byte word of what is read always shows, any other with a chance of 1 - 2^-64.
AMCT_API uint64_t fingerprint(const void* data, size_t bytes, size_t pieces);

}  // namespace amct_ext::cpu
