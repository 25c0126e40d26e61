// ulq_quantize and pack_weight: activations and weights as 8-bit codes in the layout that the integer product reads.
#include "cpu/integer_codes.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/quant_math.h"
#include "cpu/activation_clips.h"
#include "cpu/integer_product.h"
#include "cpu/parallel.h"
#include "cpu/tensor_access.h"
#include "cpu/weight_scales.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

// Positions and channels of an image transposed at a time: their codes stay in the L1 cache. A plane of up to kMaxPlane
// positions is not cut.
constexpr int64_t kPositions = 128, kMaxPlane = 256, kChannels = 64;

// Codes of an image from NCHW to NHWC.
template <typename Loop>
void codes_channels_last(const char* x, uint8_t* y, int64_t images, int64_t channels, int64_t plane, size_t size,
                         const Loop& loop) {
  const int64_t stride = plane <= kMaxPlane ? plane : kPositions, chunks = (plane + stride - 1) / stride;
  const auto transpose = loops().transpose_bytes;
  for_rows(images * chunks, channels * stride, [&](int64_t row) {
    const int64_t image = row / chunks, first = row % chunks * stride, n = std::min(stride, plane - first);
    alignas(64) uint8_t codes[kChannels * kMaxPlane];
    uint8_t* to = y + (image * plane + first) * channels;
    for (int64_t c = 0; c < channels; c += kChannels) {
      const int64_t count = std::min(kChannels, channels - c), whole = count / 16 * 16;
      const char* from = x + ((image * channels + c) * plane + first) * static_cast<int64_t>(size);
      if (n == plane) {
        loop(from, codes, count * plane);  // small planes lie one behind the other
      } else {
        for (int64_t i = 0; i < count; ++i) loop(element_ptr(from, i * plane, size), codes + i * stride, n);
      }
      transpose(codes, stride, static_cast<int>(whole), to + c, channels, n);
      for (int64_t p = 0; p < n; ++p) {
        for (int64_t i = whole; i < count; ++i) to[p * channels + c + i] = codes[i * stride + p];
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ulq_quantize(const Tensor& x, const Tensor& clip_max,
                                                                        const Tensor& clip_min,
                                                                        const Tensor& prev_clip_max,
                                                                        const Tensor& prev_clip_min, int64_t num_bits,
                                                                        bool fixed_min) {
  const char* op = "ulq_quantize";
  check_floating(op, "x", x);
  check_bits(op, num_bits, 8);
  const Clips clips = resolve_clips(op, x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
  const UlqForwardParams params = clips.params(num_bits);
  std::atomic<bool> bad{!clips.valid()};
  const auto element_loop = loops().ulq_codes[element_of(x)];
  const auto loop = [&](const void* in, uint8_t* out, int64_t n) {
    if (element_loop(in, out, n, params)) bad.store(true, std::memory_order_relaxed);
  };

  const bool image = x.dim() == 4;
  Tensor codes = empty_codes(x.sizes(), x.options());
  uint8_t* out = static_cast<uint8_t*>(codes.mutable_data_ptr());
  if (image && !x.is_contiguous(at::MemoryFormat::ChannelsLast) && x.numel() > 0) {
    const Tensor source = x.contiguous();
    codes_channels_last(static_cast<const char*>(source.const_data_ptr()), out, x.size(0), x.size(1),
                        x.size(2) * x.size(3), x.element_size(), loop);
  } else {
    const Tensor source = image ? x : x.contiguous();
    const void* in = source.const_data_ptr();
    for_blocks(x.numel(), [&](int64_t, int64_t begin, int64_t end) {
      loop(element_ptr(in, begin, x.element_size()), out + begin, end - begin);
    });
  }
  return ulq_outputs(std::move(codes), clips, clip_max, bad.load());
}

std::tuple<Tensor, Tensor> pack_weight(const Tensor& w, const Tensor& scale, int64_t num_bits) {
  const char* op = "pack_weight";
  check_floating(op, "w", w);
  check_bits(op, num_bits, 8);
  check_floating(op, "scale", scale);
  TORCH_CHECK_VALUE(w.dim() >= 2, op, ": w must have at least two dimensions, not ", w.dim());
  const int64_t outputs = w.size(0), inputs = w.size(1);
  TORCH_CHECK_VALUE(scale.numel() == 1 || scale.numel() == outputs, op, ": scale must hold 1 or ", outputs,
                    " values for a weight of shape ", w.sizes(), ", not shape ", scale.sizes());
  int64_t taps = 1;
  for (int64_t axis = 2; axis < w.dim(); ++axis) taps *= w.size(axis);
  const int64_t quads = (inputs + 3) / 4, blocks = (outputs + kBlockChannels - 1) / kBlockChannels;
  const Tensor source = w.contiguous(), factors = scale.contiguous();
  Tensor packed = at::empty({blocks, taps, quads, kBlockChannels, 4}, w.options().dtype(at::kChar));
  Tensor sums = at::zeros({outputs}, w.options().dtype(at::kInt));
  const math::CodeRange range = math::code_range(static_cast<int>(num_bits));
  const auto loop = loops().quantize_codes[element_of(w)];
  const void* in = source.const_data_ptr();
  int8_t* out = static_cast<int8_t*>(packed.mutable_data_ptr());
  int32_t* totals = static_cast<int32_t*>(sums.mutable_data_ptr());
  const int64_t row = inputs * taps;
  for_rows(blocks, kBlockChannels * row, [&](int64_t block) {
    const int64_t first = block * kBlockChannels, count = std::min<int64_t>(kBlockChannels, outputs - first);
    int8_t* to = out + block * taps * quads * kQuadBytes;
    if (count < kBlockChannels || inputs % 4) std::fill_n(to, taps * quads * kQuadBytes, int8_t{0});
    std::vector<int8_t> codes(row);
    for (int64_t c = 0; c < count; ++c) {
      const double floored = floor_scale(value_at(factors, scale.numel() == 1 ? 0 : first + c), w);
      loop(element_ptr(in, (first + c) * row, w.element_size()), codes.data(), row,
           {floored, range.lowest, range.highest});
      int32_t total = 0;
      for (int64_t i = 0; i < row; ++i) total += codes[i];
      totals[first + c] = total;
      for (int64_t tap = 0; tap < taps; ++tap) {
        int8_t* lane = to + tap * quads * kQuadBytes + c * 4;
        int64_t q = 0;
        for (; 4 * q + 4 <= inputs; ++q) {
          const int8_t* from = codes.data() + 4 * q * taps + tap;
          const int8_t four[4] = {from[0], from[taps], from[2 * taps], from[3 * taps]};
          std::memcpy(lane + q * kQuadBytes, four, 4);
        }
        for (int64_t i = 4 * q; i < inputs; ++i) lane[q * kQuadBytes + i % 4] = codes[i * taps + tap];
      }
    }
  });
  return {std::move(packed), std::move(sums)};
}

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("ulq_quantize", ulq_quantize);
  m.impl("pack_weight", pack_weight);
}

}  // namespace
}  // namespace amct_ext::cpu
