#include "ops/activation.h"

#include "ops/autograd.h"
#include "ops/straight_through.h"
#include "ops/typed_op.h"

namespace amct_ext {

TORCH_LIBRARY_FRAGMENT(amct_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "ulq_fake_quantize(Tensor x, Tensor clip_max, Tensor clip_min, Tensor prev_clip_max, Tensor prev_clip_min, "
      "int num_bits=8, bool fixed_min=False) "
      "-> (Tensor y, Tensor scale, Tensor offset, Tensor clip_max, Tensor clip_min, Tensor invalid)",
      tags);
  m.def(
      "ulq_fake_quantize_(Tensor x, Tensor(a!) clip_max, Tensor(b!) clip_min, Tensor(c!) prev_clip_max, "
      "Tensor(d!) prev_clip_min, Tensor(e!) scale, Tensor(f!) offset, Tensor(g!) invalid, int num_bits=8, "
      "bool fixed_min=False) -> (Tensor y, Tensor used_max, Tensor used_min)",
      tags);
  m.def(
      "ulq_fake_quantize_backward(Tensor grad, Tensor x, Tensor clip_max, Tensor clip_min, int num_bits=8) "
      "-> (Tensor dx, Tensor d_clip_max, Tensor d_clip_min)",
      tags);
  m.def(
      "ulq_clip_gradients(Tensor grad, Tensor x, Tensor clip_max, Tensor clip_min, int num_bits=8) "
      "-> (Tensor d_clip_max, Tensor d_clip_min)",
      tags);
  m.def(
      "ulq_relu_backward(Tensor grad, Tensor y, Tensor? addend, Tensor clip_max, Tensor clip_min, int num_bits=8) "
      "-> Tensor",
      tags);
  m.def(
      "batch_norm_statistics_(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps) "
      "-> (Tensor mean, Tensor invstd)",
      tags);
  m.def(
      "batch_norm_activation(Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, str activation, "
      "float? lowest, float? highest, Tensor? addend=None) -> Tensor",
      tags);
  m.def(
      "batch_norm_activation_backward(Tensor grad, Tensor x, Tensor mean, Tensor invstd, Tensor? weight, "
      "Tensor? bias, str activation, float? lowest, float? highest, bool training=True) "
      "-> (Tensor dx, Tensor d_weight, Tensor d_bias)",
      tags);
  m.def(
      "batch_norm_ulq(Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, str activation, "
      "float? lowest, float? highest, Tensor clip_max, Tensor clip_min, Tensor prev_clip_max, Tensor prev_clip_min, "
      "int num_bits=8, bool fixed_min=False) "
      "-> (Tensor y, Tensor scale, Tensor offset, Tensor clip_max, Tensor clip_min, Tensor invalid)",
      tags);
  m.def(
      "batch_norm_ulq_backward(Tensor grad, Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, "
      "str activation, float? lowest, float? highest, Tensor clip_max, Tensor clip_min, int num_bits=8, "
      "bool training=True) -> (Tensor dx, Tensor d_weight, Tensor d_bias, Tensor d_clip_max, Tensor d_clip_min)",
      tags);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_fake_quantize(const Tensor& x, const Tensor& clip_max,
                                                                             const Tensor& clip_min,
                                                                             const Tensor& prev_clip_max,
                                                                             const Tensor& prev_clip_min,
                                                                             int64_t num_bits, bool fixed_min) {
  return op<ulq_fake_quantize>("ulq_fake_quantize")
      .call(x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
}

std::tuple<Tensor, Tensor, Tensor> ulq_fake_quantize_(const Tensor& x, const Tensor& clip_max, const Tensor& clip_min,
                                                      const Tensor& prev_clip_max, const Tensor& prev_clip_min,
                                                      const Tensor& scale, const Tensor& offset, const Tensor& invalid,
                                                      int64_t num_bits, bool fixed_min) {
  return op<ulq_fake_quantize_>("ulq_fake_quantize_")
      .call(x, clip_max, clip_min, prev_clip_max, prev_clip_min, scale, offset, invalid, num_bits, fixed_min);
}

std::tuple<Tensor, Tensor, Tensor> ulq_fake_quantize_backward(const Tensor& grad, const Tensor& x,
                                                              const Tensor& clip_max, const Tensor& clip_min,
                                                              int64_t num_bits) {
  return op<ulq_fake_quantize_backward>("ulq_fake_quantize_backward").call(grad, x, clip_max, clip_min, num_bits);
}

std::tuple<Tensor, Tensor> ulq_clip_gradients(const Tensor& grad, const Tensor& x, const Tensor& clip_max,
                                              const Tensor& clip_min, int64_t num_bits) {
  return op<ulq_clip_gradients>("ulq_clip_gradients").call(grad, x, clip_max, clip_min, num_bits);
}

Tensor ulq_relu_backward(const Tensor& grad, const Tensor& y, const std::optional<Tensor>& addend,
                         const Tensor& clip_max, const Tensor& clip_min, int64_t num_bits) {
  return op<ulq_relu_backward>("ulq_relu_backward").call(grad, y, addend, clip_max, clip_min, num_bits);
}

std::tuple<Tensor, Tensor> batch_norm_statistics_(const Tensor& x, const std::optional<Tensor>& running_mean,
                                                  const std::optional<Tensor>& running_var, double momentum,
                                                  double eps) {
  return op<batch_norm_statistics_>("batch_norm_statistics_").call(x, running_mean, running_var, momentum, eps);
}

Tensor batch_norm_activation(const Tensor& x, const Tensor& mean, const Tensor& invstd,
                             const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                             c10::string_view activation, std::optional<double> lowest, std::optional<double> highest,
                             const std::optional<Tensor>& addend) {
  return op<batch_norm_activation>("batch_norm_activation")
      .call(x, mean, invstd, weight, bias, activation, lowest, highest, addend);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_activation_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& invstd, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, c10::string_view activation, std::optional<double> lowest,
    std::optional<double> highest, bool training) {
  return op<batch_norm_activation_backward>("batch_norm_activation_backward")
      .call(grad, x, mean, invstd, weight, bias, activation, lowest, highest, training);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_ulq(
    const Tensor& x, const Tensor& mean, const Tensor& invstd, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, c10::string_view activation, std::optional<double> lowest,
    std::optional<double> highest, const Tensor& clip_max, const Tensor& clip_min, const Tensor& prev_clip_max,
    const Tensor& prev_clip_min, int64_t num_bits, bool fixed_min) {
  return op<batch_norm_ulq>("batch_norm_ulq")
      .call(x, mean, invstd, weight, bias, activation, lowest, highest, clip_max, clip_min, prev_clip_max,
            prev_clip_min, num_bits, fixed_min);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_ulq_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& invstd, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, c10::string_view activation, std::optional<double> lowest,
    std::optional<double> highest, const Tensor& clip_max, const Tensor& clip_min, int64_t num_bits, bool training) {
  return op<batch_norm_ulq_backward>("batch_norm_ulq_backward")
      .call(grad, x, mean, invstd, weight, bias, activation, lowest, highest, clip_max, clip_min, num_bits, training);
}

namespace {

// Both forwards. What a graph node knows of costs time, which counts for small activations. So only y and what can have
// a gradient are variables of the node. `run` calls the op, keeps its other results and returns {y, used_max,
// used_min}.
struct UlqFunction : torch::autograd::Function<UlqFunction> {
  template <typename Run>
  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& clip_max, const Variable& clip_min,
                          int64_t num_bits, const Run& run) {
    const std::tuple<Tensor, Tensor, Tensor> results = below_autograd(run);
    ctx->save_for_backward({x, std::get<1>(results), std::get<2>(results)});
    ctx->saved_data["num_bits"] = num_bits;
    if (clip_max.dim()) ctx->saved_data["max_shape"] = clip_max.sizes();
    if (clip_min.dim()) ctx->saved_data["min_shape"] = clip_min.sizes();
    ctx->set_materialize_grads(false);
    return std::get<0>(results);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(5);
    if (!grads[0].defined()) return results;
    const auto saved = ctx->get_saved_variables();
    const auto in_shape = [&](Tensor value, const char* key) {
      const auto shape = ctx->saved_data.find(key);
      if (shape != ctx->saved_data.end()) value = value.view(shape->second.toDimVector());
      return value;
    };
    auto [dx, d_max, d_min] =
        ulq_fake_quantize_backward(grads[0], saved[0], saved[1], saved[2], ctx->saved_data["num_bits"].toInt());
    results[0] = std::move(dx);
    results[1] = in_shape(std::move(d_max), "max_shape");
    results[2] = in_shape(std::move(d_min), "min_shape");
    return results;
  }
};

// y of `run`, which is as UlqFunction wants it, with its gradients.
template <typename Run>
Tensor differentiable_y(const Tensor& x, const Tensor& clip_max, const Tensor& clip_min, int64_t num_bits,
                        const Run& run) {
  if (!under_functorch()) return UlqFunction::apply(x, clip_max, clip_min, num_bits, run);
  const auto [y, used_max, used_min] = below_autograd(run);
  return with_derivatives_of(y, UlqRule(x, used_max, used_min, num_bits).forward(x, clip_max, clip_min));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_fake_quantize_autograd(
    const Tensor& x, const Tensor& clip_max, const Tensor& clip_min, const Tensor& prev_clip_max,
    const Tensor& prev_clip_min, int64_t num_bits, bool fixed_min) {
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> results;
  const auto run = [&] {
    results = ulq_fake_quantize(x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
    return std::tuple(std::move(std::get<0>(results)), std::get<3>(results), std::get<4>(results));
  };
  std::get<0>(results) = differentiable_y(x, clip_max, clip_min, num_bits, run);
  return results;
}

// The state is written below autograd, as an optimiser writes parameters: what backward needs is saved apart from it.
std::tuple<Tensor, Tensor, Tensor> ulq_fake_quantize_inplace_autograd(const Tensor& x, const Tensor& clip_max,
                                                                      const Tensor& clip_min,
                                                                      const Tensor& prev_clip_max,
                                                                      const Tensor& prev_clip_min, const Tensor& scale,
                                                                      const Tensor& offset, const Tensor& invalid,
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
  std::get<0>(results) = differentiable_y(x, clip_max, clip_min, num_bits, run);
  return results;
}

std::tuple<Tensor, Tensor, Tensor> ulq_fake_quantize_backward_autograd(const Tensor& grad, const Tensor& x,
                                                                       const Tensor& clip_max, const Tensor& clip_min,
                                                                       int64_t num_bits) {
  auto results = below_autograd([&] { return ulq_fake_quantize_backward(grad, x, clip_max, clip_min, num_bits); });
  if (!needs_double_backward(grad)) return results;
  const auto [dx, d_max, d_min] = UlqRule(x, clip_max, clip_min, num_bits).backward(grad);
  const auto& [dx_bits, max_bits, min_bits] = results;
  return {with_derivatives_of(dx_bits, dx), with_derivatives_of(max_bits, d_max), with_derivatives_of(min_bits, d_min)};
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, Autograd, m) {
  m.impl("ulq_fake_quantize", ulq_fake_quantize_autograd);
  m.impl("ulq_fake_quantize_", ulq_fake_quantize_inplace_autograd);
  m.impl("ulq_fake_quantize_backward", ulq_fake_quantize_backward_autograd);
  without_gradient(m, {"ulq_clip_gradients", "ulq_relu_backward", "batch_norm_statistics_", "batch_norm_activation",
                       "batch_norm_activation_backward", "batch_norm_ulq", "batch_norm_ulq_backward"});
}

}  // namespace amct_ext
