// The C++ functions of ops.h, without Python: forward, gradients, errors, search, masks, integer products.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "common/build_info.h"
#include "ops.h"

namespace {

// A value for the previous clips of a first forward.
at::Tensor none() { return at::full({}, NAN); }

TEST(Ops, BuildInfoNamesTheInstructionSets) {
  const amct_ext::BuildInfo info = amct_ext::build_info();
  EXPECT_NE(info.simd_levels.find(info.simd), std::string::npos);
  EXPECT_NE(info.product_levels.find(info.product), std::string::npos);
}

TEST(Ops, ActivationHasGradientsOfInputAndClips) {
  const at::Tensor x = at::randn({4, 8}).requires_grad_(), high = at::full({}, 1.5).requires_grad_(),
                   low = at::full({}, -1.0).requires_grad_();
  const at::Tensor y = std::get<0>(amct_ext::ulq_fake_quantize(x, high, low, none(), none()));
  torch::autograd::backward({y.sum()}, {});
  const at::Tensor inside = (x.detach() <= 1.5) & (x.detach() >= -1.0);
  EXPECT_LE((y.detach() - x.detach()).masked_select(inside).abs().max().item<float>(), 2.5f / 255);
  EXPECT_TRUE(x.grad().defined() && high.grad().defined() && low.grad().defined());
}

TEST(Ops, ErrorsHaveTheTypesOfPython) {
  const at::Tensor x = at::randn({4}), clip = at::ones({});
  EXPECT_THROW(amct_ext::ulq_fake_quantize(x.to(at::kInt), clip, -clip, none(), none()), c10::TypeError);
  EXPECT_THROW(amct_ext::ulq_fake_quantize(x, clip, -clip, none(), none(), 17), c10::ValueError);
  EXPECT_THROW(amct_ext::arq_fake_quantize(x, 8, 1), c10::IndexError);
}

TEST(Ops, FusedSparsityEqualsItsSteps) {
  const at::Tensor w = at::randn({6, 8, 3, 3});
  const auto [y, scale, mask] = amct_ext::sparse_arq_fake_quantize_2to4(w, 1, 8, 0);
  const auto [again, again_scale] = amct_ext::sparse_arq_fake_quantize(w, amct_ext::mask_2to4(w), 8, 0);
  EXPECT_TRUE(at::equal(y, again));
  EXPECT_TRUE(at::equal(scale, again_scale));
}

TEST(Ops, MaskCountsItsStepsInPlace) {
  const at::Tensor w = at::randn({4, 8}), mask = at::zeros({4, 8}, at::kBool), step = at::zeros({}, at::kLong);
  amct_ext::refresh_mask_(w, mask, step, 0);
  EXPECT_TRUE(at::equal(mask, amct_ext::mask_2to4(w)));
  EXPECT_EQ(step.item<int>(), 1);
}

TEST(Ops, SearchFindsTheRangeOfUniformData) {
  const auto [scale, offset, high, low] = amct_ext::search_clip_range(at::rand({1000}));
  EXPECT_GT(scale.item<float>(), 0);
  EXPECT_EQ(offset.item<float>(), 0);
  EXPECT_GT(high.item<float>(), 0.6f);
}

TEST(Ops, TwoShiftsMake100000FitInto16Bits) {
  const at::Tensor errors = at::zeros({1, 16}, at::kDouble);
  amct_ext::shift_error_(at::full({2, 1}, 100000.0), at::ones({1}), errors);
  EXPECT_EQ(amct_ext::best_shift(errors).item<int>(), 2);
}

TEST(Ops, IntegerLinearEqualsItsSums) {
  const at::Tensor x = at::randn({5, 12}), w = at::randn({7, 12}), clip = at::ones({});
  const auto [codes, x_scale, x_offset, high, low, invalid] = amct_ext::ulq_quantize(x, clip, -clip, none(), none());
  const at::Tensor w_scale = std::get<1>(amct_ext::arq_fake_quantize(w, 8, 0));
  const auto [packed, sums] = amct_ext::pack_weight(w, w_scale);
  const at::Tensor y = amct_ext::integer_linear(codes, x_scale, x_offset, packed, sums, w_scale);
  const at::Tensor accumulators = amct_ext::integer_linear_accumulators(codes, x_offset, packed, sums);
  EXPECT_TRUE(at::allclose(y, accumulators * (x_scale * w_scale)));
}

}  // namespace
