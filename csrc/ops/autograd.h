// What the autograd rules of all families share.
//
// A rule calls its op below autograd, so every device is served, and its backward calls an op of this library again, so
// torch.compile sees both. Where a gradient is differentiated again, and under torch.func, which cannot run a Function
// written in C++, the rules are those of straight_through.h.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <initializer_list>

namespace amct_ext {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Whether a transform of torch.func (grad, vjp, jvp, vmap) is active.
inline bool under_functorch() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

// Whether a gradient computed from `grad` needs a graph itself.
inline bool needs_double_backward(const at::Tensor& grad) {
  return under_functorch() || (c10::GradMode::is_enabled() && grad.requires_grad());
}

// The result of `run`, whose ops record nothing.
template <typename Run>
auto below_autograd(const Run& run) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return run();
}

// Ops without a gradient: their results never require one, whatever the inputs do.
inline void without_gradient(torch::Library& m, std::initializer_list<const char*> names) {
  for (const char* name : names) m.impl(name, torch::CppFunction::makeFallthrough());
}

}  // namespace amct_ext
