// A hash of memory in 64 bits: tells that it was written to, also past autograd's version counters.
#pragma once

#include <cstddef>
#include <cstdint>

#define AMCT_API __attribute__((visibility("default")))

namespace amct_ext::cpu {

// Reads `stripes` stripes of 64 bytes, one of each of as many equal parts, or all bytes where those are no more. A
// change of a single 8-byte word of what is read always shows, any other with probability 1 - 2^-64.
AMCT_API uint64_t fingerprint(const void* data, size_t bytes, size_t stripes);

}  // namespace amct_ext::cpu
