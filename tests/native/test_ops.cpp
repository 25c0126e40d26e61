// The ops from C++, without Python: forward, backward, search, mask.
#include <ATen/ATen.h>
#include <build_info.h>
#include <ops.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <cstdio>

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (!condition) {
    std::printf("FAILED: %s\n", what);
    ++failures;
  }
}

void test_gradients() {
  const at::Tensor x = at::randn({4, 8}).requires_grad_(), high = at::full({}, 1.5).requires_grad_(),
                   low = at::full({}, -1.0).requires_grad_(), none = at::full({}, NAN);
  const at::Tensor y = std::get<0>(amct_ext::ulq_fake_quantize(x, high, low, none, none));
  torch::autograd::backward({y.sum()}, {});
  const at::Tensor inside = (x.detach() <= 1.5) & (x.detach() >= -1.0);
  expect((y.detach() - x.detach()).masked_select(inside).abs().max().item<float>() <= 2.5f / 255,
         "error within a step");
  expect(x.grad().defined() && high.grad().defined() && low.grad().defined(), "gradients of input and clips");
}

void test_weights() {
  const at::Tensor w = at::randn({6, 8, 3, 3});
  const auto [y, scale, mask] = amct_ext::sparse_arq_fake_quantize_2to4(w, 1, 8, 0);
  const auto [again, again_scale] = amct_ext::sparse_arq_fake_quantize(w, amct_ext::mask_2to4(w), 8, 0);
  expect(at::equal(y, again) && at::equal(scale, again_scale), "fused equals separate");
  expect(at::equal(mask, amct_ext::unpack_mask(amct_ext::pack_mask(mask), w.sizes())), "mask survives packing");
}

void test_searches() {
  const auto [scale, offset, high, low] = amct_ext::search_clip_range(at::rand({1000}));
  expect(scale.item<float>() > 0 && offset.item<float>() == 0 && high.item<float>() > 0.6f, "range of uniform data");
  const at::Tensor errors = at::zeros({1, 16}, at::kDouble);
  amct_ext::shift_error_(at::full({2, 1}, 100000.0), at::ones({1}), errors);
  expect(amct_ext::best_shift(errors).item<int>() == 2, "100000 fits 16 bits after two shifts");
}

}  // namespace

int main() {
  std::printf("amct_ext %s, torch %s, %s\n", amct_ext::build_info().version.c_str(),
              amct_ext::build_info().torch.c_str(), amct_ext::build_info().simd.c_str());
  test_gradients();
  test_weights();
  test_searches();
  std::printf(failures ? "%d failed\n" : "all passed\n", failures);
  return failures != 0;
}
