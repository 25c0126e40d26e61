// A pool of the memory of large results: when one is freed, a later one of the same kind takes it over.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <optional>

namespace amct_ext::cpu {

// How long a result lives, which decides what memory is worth keeping. Without a pool it goes back to the system, and
// the next result waits for fresh pages, which the kernel zeroes and the cache does not hold.
enum class Lifetime {
  kLayer,  // one layer, as a quantised activation or its gradient: the next one comes at once and has another size
  kStep,   // until backward or the optimiser, as the quantised weights of all layers: sizes recur each step
};

// As at::empty_like (with `type`: of that type), for a dense tensor, in memory of an earlier result where the pool has
// some. Idle memory is bounded (result_pool.cpp). The contents are undefined.
at::Tensor pooled_like(const at::Tensor& x, Lifetime lifetime, std::optional<at::ScalarType> type = std::nullopt);

// Frees the idle memory; returns the number of bytes.
__attribute__((visibility("default"))) size_t release_memory();

}  // namespace amct_ext::cpu
