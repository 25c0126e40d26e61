#include "ops/weight.h"

#include "ops/autograd.h"
#include "ops/straight_through.h"
#include "ops/typed_op.h"

namespace amct_ext {

TORCH_LIBRARY_FRAGMENT(amct_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("arq_fake_quantize(Tensor w, int num_bits=8, int? channel_axis=None) -> (Tensor y, Tensor scale)", tags);
  m.def(
      "arq_fake_quantize_many(Tensor[] weights, int num_bits=8, int[] channel_axes=[]) -> (Tensor[] y, Tensor[] scale)",
      tags);
  m.def(
      "lsq_fake_quantize(Tensor w, Tensor scale, int num_bits=8, int? channel_axis=None, float? grad_factor=None) "
      "-> Tensor",
      tags);
  m.def(
      "lsq_fake_quantize_backward(Tensor grad, Tensor w, Tensor scale, int num_bits=8, int? channel_axis=None, "
      "float? grad_factor=None) -> Tensor",
      tags);
  m.def("quantize_weight(Tensor w, Tensor scale, int num_bits=8, int? channel_axis=None) -> Tensor", tags);
  m.def("search_weight_scale(Tensor w, int num_bits=8, int? channel_axis=None, Tensor? mask=None) -> Tensor", tags);
  m.def("repair_weight_scale_(Tensor w, Tensor(a!) scale, int num_bits=8, int? channel_axis=None) -> ()", tags);
  m.def("filter_norms(Tensor w, int axis=0) -> Tensor", tags);
}

std::tuple<Tensor, Tensor> arq_fake_quantize(const Tensor& w, int64_t num_bits, std::optional<int64_t> channel_axis) {
  return op<arq_fake_quantize>("arq_fake_quantize").call(w, num_bits, channel_axis);
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> arq_fake_quantize_many(at::TensorList weights, int64_t num_bits,
                                                                            at::IntArrayRef channel_axes) {
  return op<arq_fake_quantize_many>("arq_fake_quantize_many").call(weights, num_bits, channel_axes);
}

Tensor lsq_fake_quantize(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis,
                         std::optional<double> grad_factor) {
  return op<lsq_fake_quantize>("lsq_fake_quantize").call(w, scale, num_bits, channel_axis, grad_factor);
}

Tensor lsq_fake_quantize_backward(const Tensor& grad, const Tensor& w, const Tensor& scale, int64_t num_bits,
                                  std::optional<int64_t> channel_axis, std::optional<double> grad_factor) {
  return op<lsq_fake_quantize_backward>("lsq_fake_quantize_backward")
      .call(grad, w, scale, num_bits, channel_axis, grad_factor);
}

Tensor quantize_weight(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis) {
  return op<quantize_weight>("quantize_weight").call(w, scale, num_bits, channel_axis);
}

Tensor search_weight_scale(const Tensor& w, int64_t num_bits, std::optional<int64_t> channel_axis,
                           const std::optional<Tensor>& mask) {
  return op<search_weight_scale>("search_weight_scale").call(w, num_bits, channel_axis, mask);
}

void repair_weight_scale_(const Tensor& w, const Tensor& scale, int64_t num_bits, std::optional<int64_t> channel_axis) {
  op<repair_weight_scale_>("repair_weight_scale_").call(w, scale, num_bits, channel_axis);
}

Tensor filter_norms(const Tensor& w, int64_t axis) { return op<filter_norms>("filter_norms").call(w, axis); }

namespace {

// Straight through. `run` calls the op and returns y; it keeps the other results, which have no gradient.
struct ArqFunction : torch::autograd::Function<ArqFunction> {
  template <typename Run>
  static Variable forward(AutogradContext*, const Variable&, const Run& run) {
    return below_autograd(run);
  }

  static variable_list backward(AutogradContext*, const variable_list& grads) { return {grads[0], {}}; }
};

struct ArqManyFunction : torch::autograd::Function<ArqManyFunction> {
  static variable_list forward(AutogradContext* ctx, at::TensorList weights, int64_t num_bits,
                               const std::vector<int64_t>& channel_axes) {
    const at::AutoDispatchBelowADInplaceOrView guard;
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

struct LsqFunction : torch::autograd::Function<LsqFunction> {
  static Variable forward(AutogradContext* ctx, const Variable& w, const Variable& scale, int64_t num_bits,
                          std::optional<int64_t> channel_axis, std::optional<double> grad_factor) {
    const at::AutoDispatchBelowADInplaceOrView guard;
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

std::tuple<Tensor, Tensor> arq_fake_quantize_autograd(const Tensor& w, int64_t num_bits,
                                                      std::optional<int64_t> channel_axis) {
  Tensor scale;
  const auto run = [&] {
    auto results = arq_fake_quantize(w, num_bits, channel_axis);
    scale = std::move(std::get<1>(results));
    return std::move(std::get<0>(results));
  };
  Tensor y = under_functorch() ? with_derivatives_of(below_autograd(run), w) : ArqFunction::apply(w, run);
  return {std::move(y), std::move(scale)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> arq_fake_quantize_many_autograd(at::TensorList weights,
                                                                                     int64_t num_bits,
                                                                                     at::IntArrayRef channel_axes) {
  if (under_functorch()) {
    auto results = below_autograd([&] { return arq_fake_quantize_many(weights, num_bits, channel_axes); });
    std::vector<Tensor>& y = std::get<0>(results);
    for (size_t i = 0; i < y.size(); ++i) y[i] = with_derivatives_of(y[i], weights[i]);
    return results;
  }
  const auto results = ArqManyFunction::apply(weights, num_bits, channel_axes.vec());
  const auto scales = results.begin() + static_cast<int64_t>(weights.size());
  return {std::vector<Tensor>(results.begin(), scales), std::vector<Tensor>(scales, results.end())};
}

Tensor lsq_fake_quantize_autograd(const Tensor& w, const Tensor& scale, int64_t num_bits,
                                  std::optional<int64_t> channel_axis, std::optional<double> grad_factor) {
  if (!under_functorch()) return LsqFunction::apply(w, scale, num_bits, channel_axis, grad_factor);
  const Tensor y = below_autograd([&] { return lsq_fake_quantize(w, scale, num_bits, channel_axis, grad_factor); });
  return with_derivatives_of(y, LsqRule(w, scale, num_bits, channel_axis, grad_factor).forward(w, scale));
}

Tensor lsq_fake_quantize_backward_autograd(const Tensor& grad, const Tensor& w, const Tensor& scale, int64_t num_bits,
                                           std::optional<int64_t> channel_axis, std::optional<double> grad_factor) {
  Tensor d_scale =
      below_autograd([&] { return lsq_fake_quantize_backward(grad, w, scale, num_bits, channel_axis, grad_factor); });
  if (!needs_double_backward(grad)) return d_scale;
  return with_derivatives_of(d_scale, LsqRule(w, scale, num_bits, channel_axis, grad_factor).backward_of_scale(grad));
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, Autograd, m) {
  m.impl("arq_fake_quantize", arq_fake_quantize_autograd);
  m.impl("arq_fake_quantize_many", arq_fake_quantize_many_autograd);
  m.impl("lsq_fake_quantize", lsq_fake_quantize_autograd);
  m.impl("lsq_fake_quantize_backward", lsq_fake_quantize_backward_autograd);
  without_gradient(m, {"quantize_weight", "search_weight_scale", "repair_weight_scale_", "filter_norms"});
}

}  // namespace amct_ext
