// Memory of large results that are let go: later ones of the same kind take it over.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <optional>

namespace amct_ext::cpu {

// How long a result lives, which says what of its memory is worth keeping. Without that it goes back to the system and
// the next result waits for fresh pages, zeroed by the kernel, and finds none of them in the cache.
enum class Life {
  kLayer,  // one layer, as a quantised activation or its gradient: the next one is of another size and comes at once
  kStep,   // until backward or the optimiser, with those of all layers, as a quantised weight: sizes recur each step
};

// As at::empty_like (`type`: of that type instead), for a dense tensor, in memory that an earlier result left,
// where there is such. What lies idle is bounded (reuse.cpp). Contents are undefined, as those of at::empty_like.
at::Tensor reused_like(const at::Tensor& x, Life life, std::optional<at::ScalarType> type = std::nullopt);

// Gives what lies idle back to the system; the number of bytes.
__attribute__((visibility("default"))) size_t release_memory();

}  // namespace amct_ext::cpu
