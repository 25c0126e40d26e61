// Every kernel of the integer product that this processor can run, against plain loops: sums of random and of extreme
// codes in tiles of all sizes, split weights, and what is written of the sums. Needs no torch: built with
// csrc/cpu/integer_product_level.cpp and csrc/cpu/loops/integer_product.cpp, once per level
// (tests/native/test_native.py, .ci/aarch64-compile).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/integer_product_level.h"

namespace {

using namespace amct_ext::cpu;

std::mt19937 random_bits(11);

int below(int n) { return static_cast<int>(random_bits() % n); }
double normal(double width) { return std::normal_distribution<>(0, width)(random_bits); }

enum Codes { kUniform, kExtreme, kNormal, kLargest, kKinds };

int8_t weight(Codes kind, int channel) {
  switch (kind) {
    case kExtreme:
      return below(2) ? -128 : 127;
    case kNormal:
      return static_cast<int8_t>(std::clamp(normal(36), -128.0, 127.0));
    case kLargest:
      return channel % 2 ? -128 : 127;
    default:
      return static_cast<int8_t>(below(256) - 128);
  }
}

uint8_t activation(Codes kind) {
  return static_cast<uint8_t>(kind == kExtreme ? 255 * below(2) : kind == kLargest ? 255 : below(256));
}

class Comparison {
 public:
  explicit Comparison(const ProductKernel& kernel) : kernel_(kernel) {}

  void tile(int rows, int blocks, int64_t taps, int64_t quads, Codes kind) {
    where_ = std::to_string(rows) + " rows, " + std::to_string(blocks) + " blocks, " + std::to_string(taps) +
             " taps, " + std::to_string(quads) + " quads, codes " + std::to_string(kind);
    const int64_t count = taps * quads, bytes = count * kQuadBytes, stride = rows + below(3);
    std::vector<uint8_t> codes(static_cast<size_t>(taps * stride * 4 * quads));
    for (auto& code : codes) code = activation(kind);
    std::vector<const uint8_t*> pointers(static_cast<size_t>(taps * stride));
    for (size_t i = 0; i < pointers.size(); ++i) pointers[i] = codes.data() + (i * 7 % pointers.size()) * 4 * quads;
    std::vector<int8_t> weights(static_cast<size_t>(blocks * bytes));
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = weight(kind, static_cast<int>(i / 4 % kBlockChannels));

    std::vector<int32_t> sums(kTileRows * kTileChannels, kUntouched);
    const Split split(kernel_, weights, blocks, taps, quads);
    expect(split.exact, "split weights are not the weights");
    Tile t{pointers.data(), stride, taps, quads, {}, split.remainders.empty() ? nullptr : split.remainders.data(),
           sums.data()};
    for (int b = 0; b < blocks; ++b) t.weights[b] = split.safe.data() + b * bytes;
    kernel_.sums(t, rows, blocks);
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < kTileChannels; ++c) {
        int64_t sum = r < rows && c < blocks * kBlockChannels ? 0 : kUntouched;
        for (int64_t i = 0; sum != kUntouched && i < 4 * count; ++i) {
          const int64_t tap = i / 4 / quads, at = i - tap * 4 * quads;
          const int64_t w = weights[c / kBlockChannels * bytes + i / 4 * kQuadBytes + c % kBlockChannels * 4 + i % 4];
          sum += (pointers[tap * stride + r][at] - kernel_.code_shift) * w;
        }
        expect(sums[r * kTileChannels + c] == static_cast<int32_t>(sum), "sums differ");
      }
    }
  }

  void results(int rows, int columns, bool with_addend) {
    where_ = std::to_string(rows) + " rows, " + std::to_string(columns) + " columns";
    std::vector<int32_t> sums(rows * kTileChannels);
    for (auto& sum : sums) sum = static_cast<int32_t>(random_bits());
    std::vector<uint32_t> zeros(kTileChannels);
    std::vector<double> scales(kTileChannels), biases(kTileChannels);
    for (int c = 0; c < kTileChannels; ++c) {
      zeros[c] = static_cast<uint32_t>(random_bits());
      scales[c] = below(20) ? normal(1e-8) : NAN;
      biases[c] = normal(5);
    }
    const int64_t stride = 97;
    std::vector<float> addend(stride * stride);
    for (auto& value : addend) value = static_cast<float>(normal(3));
    const bool bounded = below(2);
    const Epilogue o{columns,
                     zeros.data(),
                     scales.data(),
                     biases.data(),
                     with_addend ? addend.data() : nullptr,
                     bounded ? -1.0F : -INFINITY,
                     bounded ? 6.0F : INFINITY};
    std::vector<float> by_row(stride * stride, 0.5F), by_column = by_row, expected_row = by_row,
                                                      expected_column = by_row;
    kernel_.write_rows(o, sums.data(), rows, by_row.data(), stride);
    kernel_.write_columns(o, sums.data(), rows, by_column.data(), stride);
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c) {
        const auto total = static_cast<int32_t>(static_cast<uint32_t>(sums[r * kTileChannels + c]) - zeros[c]);
        const float v = static_cast<float>(static_cast<double>(total) * scales[c] + biases[c]);
        const auto finish = [&](int64_t at) {
          float sum = with_addend ? v + addend[at] : v;
          sum = sum < o.lowest ? o.lowest : sum;
          return sum > o.highest ? o.highest : sum;
        };
        expected_row[r * stride + c] = finish(r * stride + c);
        expected_column[c * stride + r] = finish(c * stride + r);
      }
    }
    expect(same(by_row, expected_row), "rows differ");
    expect(same(by_column, expected_column), "columns differ");
  }

  int failures() const { return failures_; }

 private:
  static constexpr int32_t kUntouched = 0x55555555;

  struct Split {
    std::vector<int8_t> safe, second;
    std::vector<std::vector<SplitRemainder::Position>> positions;
    std::vector<SplitRemainder> remainders;
    bool exact = true;

    Split(const ProductKernel& kernel, const std::vector<int8_t>& weights, int blocks, int64_t taps, int64_t quads)
        : safe(weights) {
      if (kernel.split_weights == nullptr) return;
      const int64_t count = taps * quads, bytes = count * kQuadBytes, vector_bytes = kQuadBytes / kernel.vectors;
      second.resize(weights.size());
      positions.resize(blocks * kMaxVectors);
      remainders.resize(blocks * kMaxVectors);
      std::vector<int8_t> sum(weights.size());
      for (int b = 0; b < blocks; ++b) {
        std::vector<int32_t> indices(kMaxVectors * count);
        SplitOutput outputs[kMaxVectors] = {};
        for (int v = 0; v < kernel.vectors; ++v) {
          outputs[v] = {&indices[v * count], &second[b * bytes + v * count * vector_bytes], 0};
        }
        kernel.split_weights(&weights[b * bytes], count, &safe[b * bytes], outputs);
        std::copy_n(&safe[b * bytes], bytes, &sum[b * bytes]);
        for (int v = 0; v < kernel.vectors; ++v) {
          auto& list = positions[b * kMaxVectors + v];
          for (int64_t i = 0; i < outputs[v].count; ++i) {
            const int32_t index = outputs[v].indices[i];
            list.push_back({static_cast<int32_t>(index / quads), static_cast<int32_t>(index % quads)});
            const int8_t* from = outputs[v].weights + i * vector_bytes;
            exact &= pairs_are_small(from, vector_bytes);
            int8_t* to = &sum[b * bytes + index * kQuadBytes + v * vector_bytes];
            for (int64_t k = 0; k < vector_bytes; ++k) to[k] = static_cast<int8_t>(to[k] + from[k]);
          }
          remainders[b * kMaxVectors + v] = {list.data(), outputs[v].weights, outputs[v].count};
        }
      }
      exact &= sum == weights && pairs_are_small(safe.data(), static_cast<int64_t>(safe.size()));
    }

    static bool pairs_are_small(const int8_t* w, int64_t n) {
      for (int64_t i = 0; i < n; i += 2) {
        if (std::abs(w[i] + w[i + 1]) > kMaxPairSum) return false;
      }
      return true;
    }
  };

  static bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), [](float x, float y) {
      return (std::isnan(x) && std::isnan(y)) || std::memcmp(&x, &y, sizeof(x)) == 0;
    });
  }

  void expect(bool good, const char* what) {
    if (!good && failures_++ < 10) std::printf("%s: %s (%s)\n", kernel_.level, what, where_.c_str());
  }

  const ProductKernel& kernel_;
  std::string where_;
  int failures_ = 0;
};

int failures_of(const ProductKernel& kernel) {
  Comparison comparison(kernel);
  for (int kind = 0; kind < kKinds; ++kind) {
    for (int rows = 1; rows <= kTileRows; ++rows) {
      for (int blocks = 1; blocks <= kernel.tile_blocks; ++blocks) {
        for (int i = 0; i < 8; ++i)
          comparison.tile(rows, blocks, 1 + below(9), 1 + below(40), static_cast<Codes>(kind));
      }
    }
    comparison.tile(1, 1, 1, 16448, static_cast<Codes>(kind));  // 65792 products: 32 bits hold one more
  }
  for (int i = 0; i < 400; ++i) comparison.results(1 + below(96), 1 + below(kTileChannels), below(2));
  return comparison.failures();
}

}  // namespace

int main() {
  int failures = 0;
  for (const ProductKernel* kernel : usable_product_kernels()) {
    const int found = failures_of(*kernel);
    std::printf("%s: %s\n", kernel->level, found ? "differs" : "exact");
    failures += found;
  }
  return failures != 0;
}
