// Quantisation-aware training in C++, without Python: a small layer learns to imitate a float one while its weights are
// 2:4 sparse and its weights and inputs are 8-bit codes. Prints the loss of every step.
#include <amct_ext/common/build_info.h>
#include <amct_ext/ops.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdio>

int main() {
  const amct_ext::BuildInfo info = amct_ext::build_info();
  std::printf("amct_ext %s for torch %s, instruction set %s\n", info.version.c_str(), info.torch.c_str(),
              info.simd.c_str());
  torch::manual_seed(0);
  const torch::Tensor x = torch::rand({64, 8, 6, 6}), target = torch::conv2d(x, torch::randn({4, 8, 3, 3}));

  // What is trained: the weight, and the clips of the activation. They start at the range that the search finds.
  const auto [x_scale, x_offset, found_max, found_min] = amct_ext::search_clip_range(x, 8, /*with_offset=*/true);
  torch::Tensor weight = torch::randn({4, 8, 3, 3}).requires_grad_();
  torch::Tensor clip_max = found_max.clone().requires_grad_(), clip_min = found_min.clone().requires_grad_();
  torch::Tensor previous_max = torch::full({}, NAN), previous_min = torch::full({}, NAN);
  torch::optim::Adam optimizer(std::vector<torch::Tensor>{weight, clip_max, clip_min}, torch::optim::AdamOptions(0.05));

  float first = 0, last = 0;
  for (int step = 0; step < 20; ++step) {
    const auto [x_q, scale, offset, used_max, used_min, invalid] =
        amct_ext::ulq_fake_quantize(x, clip_max, clip_min, previous_max, previous_min);
    previous_max = used_max;
    previous_min = used_min;
    const auto [w_q, w_scale, mask] = amct_ext::sparse_arq_fake_quantize_2to4(weight, 1, 8, 0);
    const torch::Tensor loss = torch::mse_loss(torch::conv2d(x_q, w_q), target);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    last = loss.item<float>();
    if (step == 0) first = last;
    std::printf("step %2d: loss %.4f, scale of the input %.5f, valid: %s\n", step, last, scale.item<float>(),
                invalid.item<bool>() ? "no" : "yes");
  }

  // What a device gets: one byte per weight.
  const auto [w_q, w_scale, mask] = amct_ext::sparse_arq_fake_quantize_2to4(weight.detach(), 1, 8, 0);
  const torch::Tensor codes = amct_ext::quantize_weight(w_q, w_scale, 8, 0);
  const int64_t kept = mask.sum().item<int64_t>(), words = amct_ext::pack_mask(mask).numel();
  std::printf("%lld of %lld weights kept, codes from %d to %d, mask in %lld words\n", static_cast<long long>(kept),
              static_cast<long long>(codes.numel()), codes.min().item<int>(), codes.max().item<int>(),
              static_cast<long long>(words));
  const bool trained = last < first && 2 * kept == codes.numel();
  std::printf(trained ? "trained\n" : "not trained\n");
  return trained ? 0 : 1;
}
