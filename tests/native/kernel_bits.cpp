// Prints a hash of what every loop computes, for each element type: the same text on every processor, or loops differ.
// Needs no torch: built with csrc/cpu/loop_table.cpp and csrc/cpu/loops/table.cpp alone (.ci/aarch64-compile).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/quant_math.h"
#include "cpu/loop_table.h"

namespace {

using namespace amct_ext::cpu;

constexpr int64_t kCount = 5003;
constexpr int kSizes[kElements] = {4, 8, 2, 2};
const char* const kNames[kElements] = {"float32", "float64", "bfloat16", "float16"};

struct Random {
  uint64_t state;
  uint64_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 16;
  }
};

// Values of either sign around 1, some far smaller; sign, exponent and fraction are drawn as bits.
std::vector<uint8_t> values(Element element, uint64_t seed) {
  constexpr int exponents[kElements] = {127, 1023, 127, 15}, fractions[kElements] = {23, 52, 7, 10};
  Random random{seed};
  const int size = kSizes[element], fraction = fractions[element];
  std::vector<uint8_t> data(kCount * size);
  for (int64_t i = 0; i < kCount; ++i) {
    const uint64_t exponent = exponents[element] - (random.next() % 8 == 0 ? random.next() % 14 : random.next() % 3);
    const uint64_t part = ((random.next() << 32) ^ random.next()) & ((uint64_t{1} << fraction) - 1);
    const uint64_t sign = (random.next() & 1) << (8 * size - 1);
    const uint64_t bits = random.next() % 16 == 0 ? sign : sign | exponent << fraction | part;
    std::memcpy(&data[i * size], &bits, size);
  }
  return data;
}

class Hash {
 public:
  void bytes(const void* data, size_t size) {
    for (size_t i = 0; i < size; ++i) state_ = (state_ ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211u;
  }
  template <typename T>
  void all(const std::vector<T>& data) {
    static_assert(std::is_integral_v<T> || std::is_same_v<T, double> || std::is_same_v<T, WideSum>);
    bytes(data.data(), data.size() * sizeof(T));
  }
  void number(double v) { bytes(&v, sizeof(v)); }
  void print(const char* loop, int element) const {
    std::printf("%s %s %016llx\n", loop, kNames[element], static_cast<unsigned long long>(state_));
  }

 private:
  uint64_t state_ = 14695981039346656037u;
};

void weights(const LoopTable& k, int e, const std::vector<uint8_t>& x, const std::vector<uint8_t>& grad) {
  std::vector<uint8_t> y(x.size()), mask(kCount);
  std::vector<int8_t> codes(kCount);
  const SymmetricParams symmetric{0.0123, -128, 127};
  Hash hash;
  const Range range = k.range[e](x.data(), kCount), extremes = k.range_with_zero[e](x.data(), kCount);
  for (double v : {range.max, range.min, extremes.max, extremes.min}) hash.number(v);
  k.quantize[e](x.data(), y.data(), kCount, symmetric);
  hash.all(y);
  k.quantize_codes[e](x.data(), codes.data(), kCount, symmetric);
  hash.all(codes);
  hash.number(k.lsq_backward[e](grad.data(), x.data(), kCount, symmetric));
  hash.number(k.sum_squares[e](x.data(), kCount));
  std::vector<double> sums(2 * amct_ext::math::kScaleFactors + 2);
  k.scale_fits[e](x.data(), nullptr, kCount, {0.31, -8, 7}, sums.data());
  k.squares_left[e](x.data(), kCount, symmetric, sums.data() + 2 * amct_ext::math::kScaleFactors);
  hash.all(sums);
  hash.print("weight", e);

  Hash sparse;
  for (int64_t inner : {1, 9}) {
    k.mask_plane[e](x.data(), mask.data(), kCount / inner / 4 * 4, inner);
    sparse.all(mask);
  }
  const Range masked = k.masked_range[e](x.data(), mask.data(), kCount);
  sparse.number(masked.max);
  sparse.number(masked.min);
  k.masked_quantize[e](x.data(), mask.data(), y.data(), kCount, symmetric);
  sparse.all(y);
  k.apply_mask[e](x.data(), mask.data(), y.data(), kCount);
  sparse.all(y);
  k.sr_ste_backward[e](grad.data(), x.data(), mask.data(), y.data(), kCount, 0.1);
  sparse.all(y);
  std::vector<double> fits(2 * amct_ext::math::kScaleFactors);
  k.scale_fits[e](x.data(), mask.data(), kCount, {0.31, -8, 7}, fits.data());
  sparse.all(fits);
  sparse.print("sparse", e);
}

void activations(const LoopTable& k, int e, const std::vector<uint8_t>& x, const std::vector<uint8_t>& grad) {
  std::vector<uint8_t> y(x.size());
  Hash hash;
  for (double scale : {0.0117, 0.5}) {
    const bool bad = k.ulq_forward[e](x.data(), y.data(), kCount, {scale, -3, -128, 127});
    hash.all(y);
    hash.number(bad);
    UlqSums sums;
    k.ulq_backward[e](grad.data(), x.data(), y.data(), kCount, {scale, 1.1, -0.9, 1.1, -0.9}, sums);
    hash.all(y);
    for (double v : {sums.rounding_error, sums.above, sums.below}) hash.number(v);
  }
  hash.print("activation", e);
}

void batch_norms(const LoopTable& k, const std::vector<uint8_t>& x_bytes, const std::vector<uint8_t>& grad_bytes) {
  const auto *x = reinterpret_cast<const float*>(x_bytes.data()),
             *grad = reinterpret_cast<const float*>(grad_bytes.data());
  std::vector<uint8_t> y(x_bytes.size());
  auto* out = reinterpret_cast<float*>(y.data());
  constexpr int64_t channels = 37, rows = kCount / channels;
  std::vector<float> arrays[5];
  for (int i = 0; i < 5; ++i) arrays[i].assign(grad + 100 * i, grad + 100 * i + channels + 64);
  const BatchNormRows row{arrays[0].data(), arrays[1].data(), arrays[2].data(), arrays[3].data(), arrays[4].data()};
  const BatchNormChannel channel{0.7f, -0.2f, 0.1f, 0.03f, 0.4f};
  const UlqForwardParams forward{0.0117, -3, -128, 127};
  const UlqBackwardParams backward{0.0117, 1.1, -0.9, 1.1, -0.9};
  Hash hash;
  hash.number(k.sum_values(x, kCount));
  hash.number(k.sum_squared_distances(x, kCount, 0.3f));
  for (const ActivationParams& a :
       {ActivationParams{ActivationFunction::kClamp, 0, 6}, ActivationParams{ActivationFunction::kHardswish, 0, 0}}) {
    k.batch_norm_ulq_plane(x, out, kCount, 0.7f, -0.2f, a, forward);
    hash.all(y);
    k.batch_norm_ulq_rows(x, out, rows, channels, row.factor, row.shift, a, forward);
    hash.all(y);
    k.batch_norm_plane(x, grad, out, kCount, 0.7f, -0.2f, a);
    hash.all(y);
    k.batch_norm_rows(x, nullptr, out, rows, channels, row.factor, row.shift, a);
    hash.all(y);
    for (const UlqBackwardParams* quantizer : {&backward, static_cast<const UlqBackwardParams*>(nullptr)}) {
      BatchNormSums sums;
      UlqSums clips;
      std::vector<double> gradient(channels), product(channels);
      k.batch_norm_sums_plane(grad, x, kCount, channel, a, quantizer, sums, clips);
      k.batch_norm_sums_rows(grad, x, rows, channels, row, a, quantizer, gradient.data(), product.data(), clips);
      for (double v : {sums.gradient, sums.product, clips.rounding_error, clips.above, clips.below}) hash.number(v);
      hash.all(gradient);
      hash.all(product);
      k.batch_norm_dx_plane(grad, x, out, kCount, channel, a, quantizer);
      hash.all(y);
      k.batch_norm_dx_rows(grad, x, out, rows, channels, row, a, quantizer);
      hash.all(y);
    }
  }
  hash.print("batch norm", kFloat32);
}

void searches(const LoopTable& k, int e, const std::vector<uint8_t>& x) {
  Hash hash;
  std::vector<uint64_t> bins(size_t{1} << kMaxBinBits);
  k.histogram[e](x.data(), kCount, std::ldexp(1.0, kMaxBinBits + kFractionBits - 2), bins.data());
  hash.all(bins);
  constexpr int dropped_bits = 13;
  std::vector<int64_t> relative_bins(2 << (32 - dropped_bits));
  k.range_histogram[e](x.data(), kCount, uint32_t{127 - 24} << 23, dropped_bits, relative_bins.data());
  hash.all(relative_bins);
  std::vector<int64_t> signed_bins(4 << (32 - dropped_bits));
  k.signed_range_histogram[e](x.data(), kCount, uint32_t{127 - 24} << 23, dropped_bits, signed_bins.data(),
                              2 << (32 - dropped_bits));
  hash.all(signed_bins);
  const Candidate candidates[] = {{0.01f, 0, 1.27f, -128, 127}, {0.0131f, -5, 1.6f, -128, 127}};
  std::vector<double> sums(4);
  k.losses[e](x.data(), kCount, candidates, 2, sums.data());
  k.offset_losses[e](x.data(), kCount, candidates, 2, sums.data() + 2);
  hash.all(sums);
  std::vector<WideSum> errors(16);
  for (double scale : {1e-3, 1e-5, 3e-8}) hash.number(k.shift_errors[e](x.data(), kCount, scale, errors.data()));
  hash.all(errors);
  hash.print("search", e);
}

}  // namespace

int main() {
  for (int e = 0; e < kElements; ++e) {
    const auto x = values(static_cast<Element>(e), 1), grad = values(static_cast<Element>(e), 2);
    activations(loops(), e, x, grad);
    weights(loops(), e, x, grad);
    searches(loops(), e, x);
    if (e == kFloat32) batch_norms(loops(), x, grad);
  }
}
