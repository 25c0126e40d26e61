// Every instruction set that this processor has, against the baseline: loops on weights, masks and activations, on
// random rows of all lengths. Needs no torch: built with csrc/cpu/loops/table.cpp, once per level
// (tests/native/test_native.py).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cpu/loop_table.h"

namespace amct_ext::cpu {
extern const LoopTable loops_baseline, loops_v3, loops_v4, loops_v4bf16;
}

namespace {

using namespace amct_ext::cpu;
using Bytes = std::vector<char>;

constexpr int kSizes[kElements] = {4, 8, 2, 2};
std::mt19937 random_bits(7);

int below(int n) { return static_cast<int>(random_bits() % n); }
double normal(double width) { return std::normal_distribution<>(0, width)(random_bits); }

// Ordinary, on ties of round scales and of masks, tiny, not finite, of one sign, mostly zeros.
enum Kind { kOrdinary, kTies, kTiny, kNotFinite, kNegative, kZeros, kKinds };

double value(Kind kind) {
  switch (kind) {
    case kTies:
      return (below(520) - 260) * 0.125;
    case kTiny:
      return normal(1e-6);
    case kNotFinite:
      return below(8) == 0 ? NAN : below(9) == 0 ? INFINITY : normal(10);
    case kNegative:
      return -std::fabs(normal(3));
    case kZeros:
      return below(4) == 0 ? normal(1) : below(3) ? 0.0 : -0.0;
    default:
      return normal(1);
  }
}

// Half formats are cut off, not rounded: any value will do.
Bytes row(int element, int64_t n, Kind kind) {
  Bytes data(n * kSizes[element]);
  for (int64_t i = 0; i < n; ++i) {
    const double v = value(kind);
    const float single = static_cast<float>(v);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    const uint16_t brain = std::isnan(v) ? 0x7fc0 : static_cast<uint16_t>(bits >> 16);
    const int exponent = static_cast<int>(bits >> 23 & 0xff) - 112;
    uint16_t half = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (!std::isfinite(v)) {
      half |= std::isnan(v) ? 0x7e00 : 0x7c00;
    } else if (exponent > 0) {
      half |= static_cast<uint16_t>(exponent << 10 | (bits >> 13 & 0x3ff));
    }
    char* to = &data[i * kSizes[element]];
    if (element == kFloat32) std::memcpy(to, &single, 4);
    if (element == kFloat64) std::memcpy(to, &v, 8);
    if (element == kBFloat16) std::memcpy(to, &brain, 2);
    if (element == kFloat16) std::memcpy(to, &half, 2);
  }
  return data;
}

// All NaN alike: which one a processor returns is its own affair.
void plain_nan(int element, Bytes& data) {
  constexpr uint64_t infinity[kElements] = {0x7f800000u, 0x7ff0000000000000u, 0x7f80u, 0x7c00u};
  const int size = kSizes[element];
  for (size_t i = 0; i + size <= data.size(); i += size) {
    uint64_t bits = 0;
    std::memcpy(&bits, &data[i], size);
    if ((bits & ~(uint64_t{1} << (8 * size - 1))) > infinity[element]) std::memset(&data[i], 0x7f, size);
  }
}

// What is written: `size` bytes of results, and a margin that must stay as it is.
Bytes written(size_t size, const std::function<void(char*)>& run) {
  Bytes out(size + 64, 0x55);
  run(out.data());
  return out;
}

Bytes as_bytes(Range range) {
  double ends[2] = {range.max + 0.0, range.min + 0.0};  // zero has no sign here
  Bytes bytes(sizeof(ends));
  std::memcpy(bytes.data(), ends, sizeof(ends));
  plain_nan(kFloat64, bytes);
  return bytes;
}

Bytes as_bytes(const UlqSums& sums) {
  Bytes bytes(sizeof(sums));
  std::memcpy(bytes.data(), &sums, sizeof(sums));
  plain_nan(kFloat64, bytes);
  return bytes;
}

class Comparison {
 public:
  explicit Comparison(const LoopTable& level) : level_(level) {}

  void round() {
    const int e = below(kElements);
    const int64_t n = 1 + below(300);
    const auto kind = static_cast<Kind>(below(kKinds));
    const Bytes w = row(e, n, kind), next = row(e, n, kind);
    std::vector<uint8_t> mask(n);
    for (auto& keep : mask) keep = below(2);
    const double scales[] = {0.25, 0.03125, 1e-8, 1e20, std::fabs(normal(0.1)) + 1e-7};
    const int bits = 2 + below(15);
    const double levels = 1 << (bits - 1), scale = static_cast<float>(scales[below(5)]);
    const SymmetricParams p{scale, -levels, levels - 1};
    const size_t size = n * kSizes[e];
    where_ = "element " + std::to_string(e) + ", n " + std::to_string(n) + ", kind " + std::to_string(kind) +
             ", scale " + std::to_string(scale) + ", bits " + std::to_string(bits);

    values("quantize", e, size, [&](const LoopTable& k, char* y) { k.quantize[e](w.data(), y, n, p); });
    values("quantize in place", e, size, [&](const LoopTable& k, char* y) {
      std::memcpy(y, w.data(), size);
      k.quantize[e](y, y, n, p);
    });
    values("quantize_and_range", e, size,
           [&](const LoopTable& k, char* y) { k.quantize_and_range[e](w.data(), y, n, p, next.data()); });
    values("masked_quantize", e, size,
           [&](const LoopTable& k, char* y) { k.masked_quantize[e](w.data(), mask.data(), y, n, p); });
    if (bits <= 8) {
      values("codes", kBFloat16, n,
             [&](const LoopTable& k, char* y) { k.quantize_codes[e](w.data(), reinterpret_cast<int8_t*>(y), n, p); });
    }
    Bytes unused(size + 64);
    const Range alone = loops_baseline.range[e](next.data(), n);
    same("range beside", as_bytes(alone),
         as_bytes(level_.quantize_and_range[e](w.data(), unused.data(), n, p, next.data())));
    same("range", as_bytes(alone), as_bytes(level_.range[e](next.data(), n)));
    same("masked_range", as_bytes(loops_baseline.masked_range[e](w.data(), mask.data(), n)),
         as_bytes(level_.masked_range[e](w.data(), mask.data(), n)));

    activations(e, w, next, p);

    const int64_t sizes[] = {1, 1, 3, 8, 9, 16, 25}, inner = sizes[below(7)], count = n / inner;
    if (count) planes(e, w, count, inner);
  }

  int failures() const { return failures_; }

 private:
  using Loop = std::function<void(const LoopTable&, char*)>;

  // Clips on both sides, on one or on none; `upper` and `lower` lie half a step beyond them.
  void activations(int e, const Bytes& x, const Bytes& grad, const SymmetricParams& p) {
    const size_t size = x.size();
    const int64_t n = size / kSizes[e];
    const double offset = below(2) ? 0 : below(200) - 100, half = static_cast<float>(p.scale / 2);
    const UlqForwardParams forward{p.scale, offset, p.lowest, p.highest};
    bool bad[2];
    values("ulq_forward", e, size,
           [&](const LoopTable& k, char* y) { bad[&k == &level_] = k.ulq_forward[e](x.data(), y, n, forward); });
    if (bad[0] != bad[1]) same("ulq_forward, not finite", {char(bad[0])}, {char(bad[1])});
    const double ends[] = {0, 1e30, std::fabs(normal(2))}, top = static_cast<float>(ends[below(3)]),
                 bottom = -static_cast<float>(ends[below(3)]);
    const UlqBackwardParams backward{p.scale, top, bottom, static_cast<float>(top + half),
                                     static_cast<float>(bottom - half)};
    UlqSums sums[2];
    values("ulq_backward", e, size, [&](const LoopTable& k, char* dx) {
      k.ulq_backward[e](grad.data(), x.data(), dx, n, backward, sums[&k == &level_]);
    });
    same("sums of ulq_backward", as_bytes(sums[0]), as_bytes(sums[1]));
  }

  void planes(int e, const Bytes& w, int64_t count, int64_t inner) {
    const size_t kept = count * inner, size = kept * kSizes[e];
    where_ += ", inner " + std::to_string(inner);
    const auto bytes = [](auto* at) { return reinterpret_cast<uint8_t*>(at); };
    const Bytes mask = written(kept, [&](char* m) { loops_baseline.mask_plane[e](w.data(), bytes(m), count, inner); });
    same("mask_plane", mask, written(kept, [&](char* m) { level_.mask_plane[e](w.data(), bytes(m), count, inner); }));
    const Bytes y = written(size, [&](char* to) {
      loops_baseline.apply_mask[e](w.data(), reinterpret_cast<const uint8_t*>(mask.data()), to, kept);
    });
    Bytes made(kept + 64, 0x55);
    same("sparsify_plane", y,
         written(size, [&](char* to) { level_.sparsify_plane[e](w.data(), bytes(made.data()), to, count, inner); }));
    same("the mask of sparsify_plane", mask, made);
    Bytes unused(size + 64);
    same("sparsify_and_range", as_bytes(loops_baseline.range[e](y.data(), kept)),
         as_bytes(level_.sparsify_and_range[e](w.data(), bytes(made.data()), unused.data(), count, inner)));
  }

  void values(const char* loop, int element, size_t size, const Loop& run) {
    Bytes expected = written(size, [&](char* y) { run(loops_baseline, y); });
    Bytes found = written(size, [&](char* y) { run(level_, y); });
    if (loop != std::string("codes")) {
      plain_nan(element, expected);
      plain_nan(element, found);
    }
    same(loop, expected, found);
  }

  void same(const char* loop, const Bytes& expected, const Bytes& found) {
    if (expected == found) return;
    if (failures_++ < 10) std::printf("%s: %s differs from the baseline (%s)\n", level_.level, loop, where_.c_str());
  }

  const LoopTable& level_;
  std::string where_;
  int failures_ = 0;
};

}  // namespace

int main() {
  int failures = 0;
  const auto compare = [&](const LoopTable& level) {
    Comparison comparison(level);
    for (int i = 0; i < 20000; ++i) comparison.round();
    std::printf("%s: %s\n", level.level, comparison.failures() ? "differs" : "as the baseline");
    failures += comparison.failures();
  };
#if defined(AMCT_EMULATED)  // loops of level v4 that run anywhere
  compare(loops_v4);
#else
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3")) compare(loops_v3);
  if (__builtin_cpu_supports("x86-64-v4")) {
    compare(loops_v4);
    if (__builtin_cpu_supports("avx512bf16")) compare(loops_v4bf16);
  }
#endif
  return failures != 0;
}
