// Autograd rules. Each forward and backward calls ops of this library below autograd, so every device is served and
// torch.compile sees both. Where a gradient is to be differentiated again, and under torch.func, whose levels know no
// Function in C++, the rules are those of straight_through.h.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops.h"
#include "ops/straight_through.h"

namespace amct_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Whether torch.func (grad, vjp, jvp, vmap) is at work.
bool transformed() { return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode); }

// Whether a gradient made of `grad` has to have a graph itself.
bool differentiated_again(const Tensor& grad) {
  return transformed() || (c10::GradMode::is_enabled() && grad.requires_grad());
}

template <typename Run>
auto below_autograd(const Run& run) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return run();
}

// What the ops on activations share. A graph takes time for everything that it knows of, which counts for small
// activations: so only y and what can have a gradient are its variables, and `run`, which calls the op and returns y
// and the clips that were used, keeps the other arguments and results to itself.
struct UlqFunction : torch::autograd::Function<UlqFunction> {
  template <typename Run>
  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& clip_max, const Variable& clip_min,
                          int64_t num_bits, const Run& run) {
    const std::tuple<Tensor, Tensor, Tensor> made = below_autograd(run);
    ctx->save_for_backward({x, std::get<1>(made), std::get<2>(made)});
    ctx->saved_data["num_bits"] = num_bits;
    if (clip_max.dim()) ctx->saved_data["max_shape"] = clip_max.sizes();
    if (clip_min.dim()) ctx->saved_data["min_shape"] = clip_min.sizes();
    ctx->set_materialize_grads(false);
    return std::get<0>(made);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(5);
    if (!grads[0].defined()) return results;
    const auto saved = ctx->get_saved_variables();
    const auto shaped = [&](Tensor value, const char* key) {
      const auto shape = ctx->saved_data.find(key);
      return shape == ctx->saved_data.end() ? value : value.view(shape->second.toDimVector());
    };
    auto [dx, d_max, d_min] =
        ulq_fake_quantize_backward(grads[0], saved[0], saved[1], saved[2], ctx->saved_data["num_bits"].toInt());
    results[0] = std::move(dx);
    results[1] = shaped(std::move(d_max), "max_shape");
    results[2] = shaped(std::move(d_min), "min_shape");
    return results;
  }
};

// Weights whose scales come from themselves: straight through.
struct ArqFunction : torch::autograd::Function<ArqFunction> {
  template <typename Run>
  static Variable forward(AutogradContext*, const Variable&, const Run& run) {
    return below_autograd(run);
  }

  static variable_list backward(AutogradContext*, const variable_list& grads) { return {grads[0], {}}; }
};

// Weights behind a mask, which `run` returns beside y.
struct MaskedFunction : torch::autograd::Function<MaskedFunction> {
  template <typename Run>
  static Variable forward(AutogradContext* ctx, const Variable&, const Run& run) {
    const std::tuple<Tensor, Tensor> made = below_autograd(run);
    ctx->save_for_backward({std::get<1>(made)});
    return std::get<0>(made);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {apply_mask(grads[0], ctx->get_saved_variables()[0]), {}};
  }
};

struct LsqFunction : torch::autograd::Function<LsqFunction> {
  static Variable forward(AutogradContext* ctx, const Variable& w, const Variable& scale, int64_t num_bits,
                          std::optional<int64_t> channel_axis, std::optional<double> grad_factor) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({w, scale});
    ctx->saved_data["num_bits"] = num_bits;
    ctx->saved_data["channel_axis"] = channel_axis;
    ctx->saved_data["grad_factor"] = grad_factor;
    return lsq_fake_quantize(w, scale, num_bits, channel_axis, grad_factor);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    Tensor d_scale;
    if (ctx->needs_input_grad(1)) {
      const auto saved = ctx->get_saved_variables();
      d_scale = lsq_fake_quantize_backward(grads[0], saved[0], saved[1], ctx->saved_data["num_bits"].toInt(),
                                           ctx->saved_data["channel_axis"].toOptional<int64_t>(),
                                           ctx->saved_data["grad_factor"].toOptional<double>());
    }
    return {grads[0], d_scale, {}, {}, {}};
  }
};

struct ArqManyFunction : torch::autograd::Function<ArqManyFunction> {
  static variable_list forward(AutogradContext* ctx, at::TensorList weights, int64_t num_bits,
                               const std::vector<int64_t>& channel_axes) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, scale] = arq_fake_quantize_many(weights, num_bits, channel_axes);
    ctx->mark_non_differentiable(scale);
    ctx->set_materialize_grads(false);
    ctx->saved_data["count"] = static_cast<int64_t>(weights.size());
    variable_list results(y.begin(), y.end());
    results.insert(results.end(), scale.begin(), scale.end());
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const int64_t count = ctx->saved_data["count"].toInt();
    variable_list results(grads.begin(), grads.begin() + count);
    results.resize(count + 2);
    return results;
  }
};

// y of an op on activations; `run` as UlqFunction wants it.
template <typename Run>
Tensor ulq_applied(const Tensor& x, const Tensor& clip_max, const Tensor& clip_min, int64_t num_bits, const Run& run) {
  if (!transformed()) return UlqFunction::apply(x, clip_max, clip_min, num_bits, run);
  const auto [y, used_max, used_min] = below_autograd(run);
  return straight(y, UlqRule(x, used_max, used_min, num_bits).forward(x, clip_max, clip_min));
}

template <typename Run>
Tensor arq_applied(const Tensor& w, const Run& run) {
  return transformed() ? straight(below_autograd(run), w) : ArqFunction::apply(w, run);
}

template <typename Run>
Tensor masked_applied(const Tensor& w, const Run& run) {
  if (!transformed()) return MaskedFunction::apply(w, run);
  const auto [y, mask] = below_autograd(run);
  return straight(y, at::where(mask, w, at::zeros_like(w)));
}

Tensor masked(const Tensor& w, const Tensor& mask) {
  return masked_applied(w, [&] { return std::tuple(apply_mask(w, mask), mask); });
}

std::tuple<Tensor, Tensor> sparsify(const Tensor& w, int64_t axis) {
  std::tuple<Tensor, Tensor> results;
  std::get<0>(results) = masked_applied(w, [&] { return results = sparsify_2to4(w, axis); });
  return results;
}

std::tuple<Tensor, Tensor> sparse_arq(const Tensor& w, const Tensor& mask, int64_t num_bits,
                                      std::optional<int64_t> channel_axis) {
  Tensor scale;
  Tensor y = masked_applied(w, [&] {
    auto made = sparse_arq_fake_quantize(w, mask, num_bits, channel_axis);
    scale = std::move(std::get<1>(made));
    return std::tuple(std::move(std::get<0>(made)), mask);
  });
  return {std::move(y), std::move(scale)};
}

std::tuple<Tensor, Tensor, Tensor> sparse_arq_2to4(const Tensor& w, int64_t axis, int64_t num_bits,
                                                   std::optional<int64_t> channel_axis) {
  Tensor scale, mask;
  Tensor y = masked_applied(w, [&] {
    auto made = sparse_arq_fake_quantize_2to4(w, axis, num_bits, channel_axis);
    std::tie(std::ignore, scale, mask) = made;
    return std::tuple(std::move(std::get<0>(made)), mask);
  });
  return {std::move(y), std::move(scale), std::move(mask)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> arq_many(at::TensorList weights, int64_t num_bits,
                                                              at::IntArrayRef channel_axes) {
  if (transformed()) {
    auto made = below_autograd([&] { return arq_fake_quantize_many(weights, num_bits, channel_axes); });
    std::vector<Tensor>& y = std::get<0>(made);
    for (size_t i = 0; i < y.size(); ++i) y[i] = straight(y[i], weights[i]);
    return made;
  }
  const auto r = ArqManyFunction::apply(weights, num_bits, channel_axes.vec());
  const auto middle = r.begin() + static_cast<int64_t>(weights.size());
  return {std::vector<Tensor>(r.begin(), middle), std::vector<Tensor>(middle, r.end())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq(const Tensor& x, const Tensor& clip_max,
                                                               const Tensor& clip_min, const Tensor& prev_clip_max,
                                                               const Tensor& prev_clip_min, int64_t num_bits,
                                                               bool fixed_min) {
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> results;
  const auto run = [&] {
    results = ulq_fake_quantize(x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
    return std::tuple(std::move(std::get<0>(results)), std::get<3>(results), std::get<4>(results));
  };
  std::get<0>(results) = ulq_applied(x, clip_max, clip_min, num_bits, run);
  return results;
}

// The state is written below autograd, as an optimiser writes parameters: what backward needs is saved apart from it.
std::tuple<Tensor, Tensor, Tensor> ulq_update(const Tensor& x, const Tensor& clip_max, const Tensor& clip_min,
                                              const Tensor& prev_clip_max, const Tensor& prev_clip_min,
                                              const Tensor& scale, const Tensor& offset, const Tensor& invalid,
                                              int64_t num_bits, bool fixed_min) {
  std::tuple<Tensor, Tensor, Tensor> results;
  const auto run = [&] {
    results = ulq_fake_quantize_(x, clip_max, clip_min, prev_clip_max, prev_clip_min, scale, offset, invalid, num_bits,
                                 fixed_min);
    for (const Tensor* state : {&clip_max, &clip_min, &prev_clip_max, &prev_clip_min, &scale, &offset, &invalid}) {
      state->unsafeGetTensorImpl()->bump_version();
    }
    return results;
  };
  std::get<0>(results) = ulq_applied(x, clip_max, clip_min, num_bits, run);
  return results;
}

std::tuple<Tensor, Tensor> arq(const Tensor& w, int64_t num_bits, std::optional<int64_t> channel_axis) {
  Tensor scale;
  Tensor y = arq_applied(w, [&] {
    auto made = arq_fake_quantize(w, num_bits, channel_axis);
    scale = std::move(std::get<1>(made));
    return std::move(std::get<0>(made));
  });
  return {std::move(y), std::move(scale)};
}

Tensor lsq(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis,
           std::optional<double> grad_factor) {
  if (!transformed()) return LsqFunction::apply(w, scale, num_bits, channel_axis, grad_factor);
  const Tensor y = below_autograd([&] { return lsq_fake_quantize(w, scale, num_bits, channel_axis, grad_factor); });
  return straight(y, LsqRule(w, scale, num_bits, channel_axis, grad_factor).forward(w, scale));
}

std::tuple<Tensor, Tensor, Tensor> ulq_backward(const Tensor& grad, const Tensor& x, const Tensor& clip_max,
                                                const Tensor& clip_min, int64_t num_bits) {
  const auto made = below_autograd([&] { return ulq_fake_quantize_backward(grad, x, clip_max, clip_min, num_bits); });
  if (!differentiated_again(grad)) return made;
  const auto [dx, d_max, d_min] = UlqRule(x, clip_max, clip_min, num_bits).backward(grad);
  const auto& [x_bits, max_bits, min_bits] = made;
  return {straight(x_bits, dx), straight(max_bits, d_max), straight(min_bits, d_min)};
}

Tensor lsq_backward(const Tensor& grad, const Tensor& w, const Tensor& scale, int64_t num_bits,
                    std::optional<int64_t> channel_axis, std::optional<double> grad_factor) {
  const Tensor made =
      below_autograd([&] { return lsq_fake_quantize_backward(grad, w, scale, num_bits, channel_axis, grad_factor); });
  if (!differentiated_again(grad)) return made;
  return straight(made, LsqRule(w, scale, num_bits, channel_axis, grad_factor).backward_of_scale(grad));
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, Autograd, m) {
  m.impl("ulq_fake_quantize", ulq);
  m.impl("ulq_fake_quantize_", ulq_update);
  m.impl("arq_fake_quantize", arq);
  m.impl("lsq_fake_quantize", lsq);
  m.impl("apply_mask", masked);
  m.impl("sparsify_2to4", sparsify);
  m.impl("sparse_arq_fake_quantize", sparse_arq);
  m.impl("sparse_arq_fake_quantize_2to4", sparse_arq_2to4);
  m.impl("arq_fake_quantize_many", arq_many);
  m.impl("ulq_fake_quantize_backward", ulq_backward);
  m.impl("lsq_fake_quantize_backward", lsq_backward);
  // No gradient: their results never require one, whatever the inputs do.
  for (const char* name :
       {"quantize_weight", "mask_2to4", "filter_norms", "search_clip_range", "range_histogram_",
        "search_clip_range_histogram", "shift_error_", "best_shift", "ulq_quantize", "pack_weight", "integer_conv2d",
        "integer_conv2d_codes", "integer_linear", "integer_conv2d_accumulators", "integer_linear_accumulators"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace amct_ext
