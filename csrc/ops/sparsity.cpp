#include "ops/sparsity.h"

#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "ops/autograd.h"
#include "ops/straight_through.h"
#include "ops/typed_op.h"

namespace amct_ext {

TORCH_LIBRARY_FRAGMENT(amct_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("mask_2to4(Tensor w, int axis=1) -> Tensor", tags);
  m.def("refresh_mask_(Tensor w, Tensor(a!) mask, Tensor(b!) step, int update_freq, int axis=1) -> ()", tags);
  m.def("pack_mask(Tensor mask) -> Tensor", tags);
  m.def("unpack_mask(Tensor words, SymInt[] shape) -> Tensor", tags);
  m.def("apply_mask(Tensor w, Tensor mask) -> Tensor", tags);
  m.def("sparsify_2to4(Tensor w, int axis=1) -> (Tensor y, Tensor mask)", tags);
  m.def(
      "sparse_arq_fake_quantize(Tensor w, Tensor mask, int num_bits=8, int? channel_axis=None) "
      "-> (Tensor y, Tensor scale)",
      tags);
  m.def(
      "sparse_arq_fake_quantize_2to4(Tensor w, int axis=1, int num_bits=8, int? channel_axis=None) "
      "-> (Tensor y, Tensor scale, Tensor mask)",
      tags);
  m.def("apply_mask_sr_ste(Tensor w, Tensor mask, float decay=2e-4) -> Tensor", tags);
  m.def(
      "sparse_arq_fake_quantize_sr_ste(Tensor w, Tensor mask, int num_bits=8, int? channel_axis=None, "
      "float decay=2e-4) -> (Tensor y, Tensor scale)",
      tags);
  m.def("sr_ste_backward(Tensor grad, Tensor w, Tensor mask, float decay=2e-4) -> Tensor", tags);
}

Tensor mask_2to4(const Tensor& w, int64_t axis) { return op<mask_2to4>("mask_2to4").call(w, axis); }

void refresh_mask_(const Tensor& w, const Tensor& mask, const Tensor& step, int64_t update_freq, int64_t axis) {
  op<refresh_mask_>("refresh_mask_").call(w, mask, step, update_freq, axis);
}

Tensor pack_mask(const Tensor& mask) { return op<pack_mask>("pack_mask").call(mask); }

Tensor unpack_mask(const Tensor& words, at::IntArrayRef shape) {
  using Symbolic = Tensor(const Tensor&, c10::SymIntArrayRef);
  return op<unpack_mask, Symbolic>("unpack_mask").call(words, c10::fromIntArrayRefSlow(shape));
}

Tensor apply_mask(const Tensor& w, const Tensor& mask) { return op<apply_mask>("apply_mask").call(w, mask); }

std::tuple<Tensor, Tensor> sparsify_2to4(const Tensor& w, int64_t axis) {
  return op<sparsify_2to4>("sparsify_2to4").call(w, axis);
}

std::tuple<Tensor, Tensor> sparse_arq_fake_quantize(const Tensor& w, const Tensor& mask, int64_t num_bits,
                                                    std::optional<int64_t> channel_axis) {
  return op<sparse_arq_fake_quantize>("sparse_arq_fake_quantize").call(w, mask, num_bits, channel_axis);
}

std::tuple<Tensor, Tensor, Tensor> sparse_arq_fake_quantize_2to4(const Tensor& w, int64_t axis, int64_t num_bits,
                                                                 std::optional<int64_t> channel_axis) {
  return op<sparse_arq_fake_quantize_2to4>("sparse_arq_fake_quantize_2to4").call(w, axis, num_bits, channel_axis);
}

Tensor apply_mask_sr_ste(const Tensor& w, const Tensor& mask, double decay) {
  return op<apply_mask_sr_ste>("apply_mask_sr_ste").call(w, mask, decay);
}

std::tuple<Tensor, Tensor> sparse_arq_fake_quantize_sr_ste(const Tensor& w, const Tensor& mask, int64_t num_bits,
                                                           std::optional<int64_t> channel_axis, double decay) {
  return op<sparse_arq_fake_quantize_sr_ste>("sparse_arq_fake_quantize_sr_ste")
      .call(w, mask, num_bits, channel_axis, decay);
}

Tensor sr_ste_backward(const Tensor& grad, const Tensor& w, const Tensor& mask, double decay) {
  return op<sr_ste_backward>("sr_ste_backward").call(grad, w, mask, decay);
}

namespace {

// The gradient is masked as the weight was. `run` calls the op, keeps its other results and returns {y, mask}.
struct MaskedFunction : torch::autograd::Function<MaskedFunction> {
  template <typename Run>
  static Variable forward(AutogradContext* ctx, const Variable&, const Run& run) {
    const std::tuple<Tensor, Tensor> results = below_autograd(run);
    ctx->save_for_backward({std::get<1>(results)});
    return std::get<0>(results);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {apply_mask(grads[0], ctx->get_saved_variables()[0]), {}};
  }
};

// y of `run`, which is as MaskedFunction wants it, with its gradient.
template <typename Run>
Tensor differentiable_y(const Tensor& w, const Run& run) {
  if (!under_functorch()) return MaskedFunction::apply(w, run);
  const auto [y, mask] = below_autograd(run);
  return with_derivatives_of(y, at::where(mask, w, at::zeros_like(w)));
}

Tensor apply_mask_autograd(const Tensor& w, const Tensor& mask) {
  return differentiable_y(w, [&] { return std::tuple(apply_mask(w, mask), mask); });
}

std::tuple<Tensor, Tensor> sparsify_2to4_autograd(const Tensor& w, int64_t axis) {
  std::tuple<Tensor, Tensor> results;
  std::get<0>(results) = differentiable_y(w, [&] { return results = sparsify_2to4(w, axis); });
  return results;
}

std::tuple<Tensor, Tensor> sparse_arq_fake_quantize_autograd(const Tensor& w, const Tensor& mask, int64_t num_bits,
                                                             std::optional<int64_t> channel_axis) {
  Tensor scale;
  Tensor y = differentiable_y(w, [&] {
    auto results = sparse_arq_fake_quantize(w, mask, num_bits, channel_axis);
    scale = std::move(std::get<1>(results));
    return std::tuple(std::move(std::get<0>(results)), mask);
  });
  return {std::move(y), std::move(scale)};
}

std::tuple<Tensor, Tensor, Tensor> sparse_arq_fake_quantize_2to4_autograd(const Tensor& w, int64_t axis,
                                                                          int64_t num_bits,
                                                                          std::optional<int64_t> channel_axis) {
  Tensor scale, mask;
  Tensor y = differentiable_y(w, [&] {
    auto results = sparse_arq_fake_quantize_2to4(w, axis, num_bits, channel_axis);
    std::tie(std::ignore, scale, mask) = results;
    return std::tuple(std::move(std::get<0>(results)), mask);
  });
  return {std::move(y), std::move(scale), std::move(mask)};
}

// The gradient passes, and masked weights decay. `run` calls the op, keeps its other results and returns y.
struct SrSteFunction : torch::autograd::Function<SrSteFunction> {
  template <typename Run>
  static Variable forward(AutogradContext* ctx, const Variable& w, const Tensor& mask, double decay, const Run& run) {
    ctx->save_for_backward({w, mask});
    ctx->saved_data["decay"] = decay;
    return below_autograd(run);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    return {sr_ste_backward(grads[0], saved[0], saved[1], ctx->saved_data["decay"].toDouble()), {}, {}, {}};
  }
};

// A decay is the gradient of no function of the result, so under torch.func the gradient passes without it.
template <typename Run>
Tensor sr_ste_y(const Tensor& w, const Tensor& mask, double decay, const Run& run) {
  if (under_functorch()) return with_derivatives_of(below_autograd(run), w);
  return SrSteFunction::apply(w, mask, decay, run);
}

Tensor apply_mask_sr_ste_autograd(const Tensor& w, const Tensor& mask, double decay) {
  return sr_ste_y(w, mask, decay, [&] { return apply_mask_sr_ste(w, mask, decay); });
}

std::tuple<Tensor, Tensor> sparse_arq_fake_quantize_sr_ste_autograd(const Tensor& w, const Tensor& mask,
                                                                    int64_t num_bits,
                                                                    std::optional<int64_t> channel_axis, double decay) {
  Tensor scale;
  Tensor y = sr_ste_y(w, mask, decay, [&] {
    auto results = sparse_arq_fake_quantize_sr_ste(w, mask, num_bits, channel_axis, decay);
    scale = std::move(std::get<1>(results));
    return std::move(std::get<0>(results));
  });
  return {std::move(y), std::move(scale)};
}

Tensor sr_ste_backward_autograd(const Tensor& grad, const Tensor& w, const Tensor& mask, double decay) {
  Tensor d_w = below_autograd([&] { return sr_ste_backward(grad, w, mask, decay); });
  if (!needs_double_backward(grad) && !needs_double_backward(w)) return d_w;
  return with_derivatives_of(d_w, grad.add(at::where(mask, at::zeros_like(w), w), decay));
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, Autograd, m) {
  m.impl("apply_mask", apply_mask_autograd);
  m.impl("sparsify_2to4", sparsify_2to4_autograd);
  m.impl("sparse_arq_fake_quantize", sparse_arq_fake_quantize_autograd);
  m.impl("sparse_arq_fake_quantize_2to4", sparse_arq_fake_quantize_2to4_autograd);
  m.impl("apply_mask_sr_ste", apply_mask_sr_ste_autograd);
  m.impl("sparse_arq_fake_quantize_sr_ste", sparse_arq_fake_quantize_sr_ste_autograd);
  m.impl("sr_ste_backward", sr_ste_backward_autograd);
  without_gradient(m, {"mask_2to4"});
}

}  // namespace amct_ext
