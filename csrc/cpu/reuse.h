// Memory of large results that are soon let go: the next one takes it over.
#pragma once

#include <ATen/core/Tensor.h>

namespace amct_ext::cpu {

// As at::empty_like, for a tensor without holes in memory that an earlier result of ours left, where there is such.
//
// A quantised activation lives for one layer, and its memory would go back to the system each time: the next one then
// waits for fresh pages, zeroed by the kernel, and finds none of them in the cache. What is kept idle is bounded
// (reuse.cpp). Contents are undefined, as those of at::empty_like.
at::Tensor reused_like(const at::Tensor& x);

}  // namespace amct_ext::cpu
