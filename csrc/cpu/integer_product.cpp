// The ops on codes: integer_conv2d and integer_linear, their sums turned into floats in one rounding, those floats into
// codes again (_codes), or the sums as they are (_accumulators).
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <tuple>

#include "common/check.h"
#include "cpu/activation_clips.h"
#include "cpu/integer_codes.h"
#include "cpu/integer_conv_tiling.h"
#include "cpu/tensor_access.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;

ClampBounds clamp_bounds(std::optional<double> lowest, std::optional<double> highest) {
  ClampBounds bounds;
  if (lowest) bounds.lowest = static_cast<float>(*lowest);
  if (highest) bounds.highest = static_cast<float>(*highest);
  return bounds;
}

// y and the addend (or null): channels last.
void product_nhwc(const ConvShape& s, const uint8_t* codes, const PackedWeights& w, const ClampBounds& bounds,
                  const float* addend, float* y) {
  const auto write = product_kernel().write_rows;
  const auto window = [&](int64_t first, int64_t last, int64_t column, int64_t columns) {
    return OutputWindow{first * s.outputs + column, last - first, columns, s.outputs};
  };
  const auto epilogue = [&](Epilogue output, const int32_t* sums, int64_t first, int64_t last, int64_t column) {
    const int64_t at = first * s.outputs + column;
    if (addend != nullptr) output.addend = addend + at;
    write(output, sums, last - first, y + at, s.outputs);
  };
  tiled_product(s, codes, w, bounds, {y, addend}, window, epilogue);
}

// y and the addend (or null): each channel a plane.
void product_nchw(const ConvShape& s, const uint8_t* codes, const PackedWeights& w, const ClampBounds& bounds,
                  const float* addend, float* y) {
  const auto write = product_kernel().write_columns;
  const int64_t plane = s.out_height * s.out_width;
  const auto start = [&](int64_t first, int64_t column) {
    return (first / plane * s.outputs + column) * plane + first % plane;
  };
  const auto window = [&](int64_t first, int64_t last, int64_t column, int64_t columns) {
    return OutputWindow{start(first, column), columns, std::min(last - first, plane - first % plane), plane};
  };
  const auto epilogue = [&](Epilogue output, const int32_t* sums, int64_t first, int64_t last, int64_t column) {
    for (int64_t from = first; from < last;) {
      const int64_t to = std::min(last, (from / plane + 1) * plane), at = start(from, column);
      if (addend != nullptr) output.addend = addend + at;
      write(output, sums + (from - first) * kTileChannels, to - from, y + at, plane);
      from = to;
    }
  };
  tiled_product(s, codes, w, bounds, {y, addend}, window, epilogue);
}

// y: codes, channels last. Returns whether a float was not finite.
bool product_codes(const ConvShape& s, const uint8_t* codes, const PackedWeights& w, const ClampBounds& bounds,
                   const UlqForwardParams& ulq, uint8_t* y) {
  constexpr int64_t kPositions = 16;  // positions whose floats are quantised at a time, in the L1 cache
  const auto write = product_kernel().write_rows;
  const auto quantize = loops().ulq_codes[0];
  std::atomic<bool> bad{false};
  const auto no_window = [](int64_t, int64_t, int64_t, int64_t) { return OutputWindow{}; };
  const auto epilogue = [&](const Epilogue& output, const int32_t* sums, int64_t first, int64_t last, int64_t column) {
    alignas(64) float floats[kPositions * kTileChannels];
    alignas(64) uint8_t made[kPositions * kTileChannels];
    const int64_t columns = output.columns;
    for (int64_t from = first; from < last; from += kPositions) {
      const int64_t n = std::min(kPositions, last - from);
      write(output, sums + (from - first) * kTileChannels, n, floats, columns);
      if (quantize(floats, made, n * columns, ulq)) bad.store(true, std::memory_order_relaxed);
      for (int64_t r = 0; r < n; ++r) std::memcpy(y + (from + r) * s.outputs + column, made + r * columns, columns);
    }
  };
  tiled_product(s, codes, w, bounds, {}, no_window, epilogue);
  return bad.load();
}

// The sums themselves, channels last. The difference with the zero point wraps as the sums do.
void product_accumulators(const ConvShape& s, const uint8_t* codes, const PackedWeights& w, int32_t* y) {
  const auto no_window = [](int64_t, int64_t, int64_t, int64_t) { return OutputWindow{}; };
  const auto epilogue = [&](const Epilogue& output, const int32_t* sums, int64_t first, int64_t last, int64_t column) {
    for (int64_t row = first; row < last; ++row, sums += kTileChannels) {
      int32_t* to = y + row * s.outputs + column;
      for (int c = 0; c < output.columns; ++c) {
        to[c] = static_cast<int32_t>(static_cast<uint32_t>(sums[c]) - output.zeros[c]);
      }
    }
  };
  tiled_product(s, codes, w, {}, {}, no_window, epilogue);
}

Tensor integer_conv2d(const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed,
                      const Tensor& sums, const Tensor& w_scale, const std::optional<Tensor>& bias,
                      at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation, bool channels_last, const std::optional<Tensor>& addend,
                      std::optional<double> lowest, std::optional<double> highest) {
  const char* op = "integer_conv2d";
  ConvShape s = conv_shape(op, codes, sums.numel(), kernel_size, stride, padding, dilation);
  PackedWeights w = packed_weights(op, s, packed, sums, x_scale, x_offset, w_scale, bias);
  const Tensor source = conv_input(codes, s, w);
  const auto layout = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  Tensor y = at::empty({s.images, s.outputs, s.out_height, s.out_width}, codes.options().dtype(at::kFloat), layout);
  Tensor more;
  if (addend) {
    check_type(op, "addend", *addend, at::kFloat);
    TORCH_CHECK_VALUE(addend->sizes() == y.sizes(), op, ": addend must have the shape of the result, ", y.sizes(),
                      ", not ", addend->sizes());
    more = addend->contiguous(layout);
  }
  (channels_last ? product_nhwc : product_nchw)(
      s, static_cast<const uint8_t*>(source.const_data_ptr()), w, clamp_bounds(lowest, highest),
      addend ? static_cast<const float*>(more.const_data_ptr()) : nullptr, static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> integer_conv2d_codes(
    const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed, const Tensor& sums,
    const Tensor& w_scale, const std::optional<Tensor>& bias, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, std::optional<double> lowest, std::optional<double> highest,
    const Tensor& clip_max, const Tensor& clip_min, const Tensor& prev_clip_max, const Tensor& prev_clip_min,
    int64_t num_bits, bool fixed_min) {
  const char* op = "integer_conv2d_codes";
  check_bits(op, num_bits, 8);
  ConvShape s = conv_shape(op, codes, sums.numel(), kernel_size, stride, padding, dilation);
  PackedWeights w = packed_weights(op, s, packed, sums, x_scale, x_offset, w_scale, bias);
  const Tensor source = conv_input(codes, s, w);
  const Tensor floats = at::empty({0}, codes.options().dtype(at::kFloat));  // the type that is quantised
  const Clips clips = resolve_clips(op, floats, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
  Tensor y = empty_codes({s.images, s.outputs, s.out_height, s.out_width}, codes.options());
  const bool bad =
      product_codes(s, static_cast<const uint8_t*>(source.const_data_ptr()), w, clamp_bounds(lowest, highest),
                    clips.params(num_bits), static_cast<uint8_t*>(y.mutable_data_ptr()));
  return ulq_outputs(std::move(y), clips, clip_max, bad || !clips.valid());
}

Tensor integer_linear(const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed,
                      const Tensor& sums, const Tensor& w_scale, const std::optional<Tensor>& bias) {
  const char* op = "integer_linear";
  const ConvShape s = linear_shape(op, codes, sums.numel());
  const PackedWeights w = packed_weights(op, s, packed, sums, x_scale, x_offset, w_scale, bias);
  const Tensor source = with_read_padding(codes, at::MemoryFormat::Contiguous);
  std::vector<int64_t> sizes = codes.sizes().vec();
  sizes.back() = s.outputs;
  Tensor y = at::empty(sizes, codes.options().dtype(at::kFloat));
  product_nhwc(s, static_cast<const uint8_t*>(source.const_data_ptr()), w, {}, nullptr,
               static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

Tensor integer_conv2d_accumulators(const Tensor& codes, const Tensor& x_offset, const Tensor& packed,
                                   const Tensor& sums, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                   at::IntArrayRef padding, at::IntArrayRef dilation) {
  const char* op = "integer_conv2d_accumulators";
  ConvShape s = conv_shape(op, codes, sums.numel(), kernel_size, stride, padding, dilation);
  const Tensor one = at::ones({}, at::kFloat);
  PackedWeights w = packed_weights(op, s, packed, sums, one, x_offset, one, {});
  const Tensor source = conv_input(codes, s, w);
  Tensor y = at::empty({s.images, s.outputs, s.out_height, s.out_width}, codes.options().dtype(at::kInt),
                       at::MemoryFormat::ChannelsLast);
  product_accumulators(s, static_cast<const uint8_t*>(source.const_data_ptr()), w,
                       static_cast<int32_t*>(y.mutable_data_ptr()));
  return y;
}

Tensor integer_linear_accumulators(const Tensor& codes, const Tensor& x_offset, const Tensor& packed,
                                   const Tensor& sums) {
  const char* op = "integer_linear_accumulators";
  const ConvShape s = linear_shape(op, codes, sums.numel());
  const Tensor one = at::ones({}, at::kFloat);
  const PackedWeights w = packed_weights(op, s, packed, sums, one, x_offset, one, {});
  const Tensor source = with_read_padding(codes, at::MemoryFormat::Contiguous);
  std::vector<int64_t> sizes = codes.sizes().vec();
  sizes.back() = s.outputs;
  Tensor y = at::empty(sizes, codes.options().dtype(at::kInt));
  product_accumulators(s, static_cast<const uint8_t*>(source.const_data_ptr()), w,
                       static_cast<int32_t*>(y.mutable_data_ptr()));
  return y;
}

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("integer_conv2d_accumulators", integer_conv2d_accumulators);
  m.impl("integer_linear_accumulators", integer_linear_accumulators);
  m.impl("integer_conv2d", integer_conv2d);
  m.impl("integer_conv2d_codes", integer_conv2d_codes);
  m.impl("integer_linear", integer_linear);
}

}  // namespace
}  // namespace amct_ext::cpu
