#include "cpu/integer_conv_tiling.h"

#include <cstring>

#include "common/check.h"
#include "cpu/integer_codes.h"
#include "cpu/parallel.h"
#include "cpu/tensor_access.h"

namespace amct_ext::cpu {

using at::Tensor;

ConvShape conv_shape(const char* op, const Tensor& codes, int64_t outputs, at::IntArrayRef kernel_size,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_type(op, "codes", codes, at::kByte);
  TORCH_CHECK_VALUE(codes.dim() == 4, op, ": codes must have four dimensions, not ", codes.dim());
  TORCH_CHECK_VALUE(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                    ": kernel_size, stride, padding and dilation must hold two values each");
  ConvShape s{codes.size(0), codes.size(2), codes.size(3), codes.size(1), 0, 0, outputs, {}, {}, {}, {}};
  int64_t* out[2] = {&s.out_height, &s.out_width};
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK_VALUE(kernel_size[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0, op,
                      ": kernel_size, stride and dilation must be positive, padding not negative");
    s.kernel[i] = kernel_size[i];
    s.stride[i] = stride[i];
    s.padding[i] = padding[i];
    s.dilation[i] = dilation[i];
    const int64_t room = codes.size(2 + i) + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1;
    TORCH_CHECK_VALUE(room >= 0, op, ": the filter is larger than the padded input");
    *out[i] = room / stride[i] + 1;
  }
  return s;
}

ConvShape linear_shape(const char* op, const Tensor& codes, int64_t outputs) {
  check_type(op, "codes", codes, at::kByte);
  TORCH_CHECK_VALUE(codes.dim() >= 1, op, ": codes must have at least one dimension");
  const int64_t channels = codes.size(-1), rows = channels ? codes.numel() / channels : 0;
  return {1, 1, rows, channels, 1, rows, outputs, {1, 1}, {1, 1}, {0, 0}, {1, 1}};
}

PackedWeights packed_weights(const char* op, const ConvShape& s, const Tensor& packed, const Tensor& sums,
                             const Tensor& x_scale, const Tensor& x_offset, const Tensor& w_scale,
                             const std::optional<Tensor>& bias) {
  const int64_t quads = (s.channels + 3) / 4, blocks = (s.outputs + kBlockChannels - 1) / kBlockChannels;
  const std::vector<int64_t> expected{blocks, s.kernel[0] * s.kernel[1], quads, kBlockChannels, 4};
  TORCH_CHECK_VALUE(packed.sizes() == at::IntArrayRef(expected), op, ": packed must have shape ",
                    at::IntArrayRef(expected), ", not ", packed.sizes());
  TORCH_CHECK_VALUE(packed.is_contiguous() && sums.is_contiguous(), op, ": packed and sums must be contiguous");
  check_type(op, "packed", packed, at::kChar);
  check_type(op, "sums", sums, at::kInt);
  check_floating(op, "x_scale", x_scale);
  check_floating(op, "x_offset", x_offset);
  check_floating(op, "w_scale", w_scale);
  check_scalar(op, "x_scale", x_scale);
  check_scalar(op, "x_offset", x_offset);
  TORCH_CHECK_VALUE(w_scale.numel() == 1 || w_scale.numel() == s.outputs, op, ": w_scale must hold 1 or ", s.outputs,
                    " values, not shape ", w_scale.sizes());
  if (bias) {
    check_floating(op, "bias", *bias);
    TORCH_CHECK_VALUE(bias->numel() == s.outputs, op, ": bias must hold ", s.outputs, " values, not shape ",
                      bias->sizes());
  }
  const double scale = value_at(x_scale, 0), offset = value_at(x_offset, 0);
  // A NaN offset comes with a NaN scale, which decides the result.
  const int zero = offset >= -128 && offset <= 127 ? static_cast<int>(offset) + 128 : 0;
  const int shift = product_kernel().code_shift;
  const size_t padded = static_cast<size_t>(blocks * kBlockChannels);
  PackedWeights result{packed,
                       static_cast<uint8_t>(zero),
                       quads,
                       std::vector<uint32_t>(padded),
                       std::vector<double>(padded),
                       std::vector<double>(padded)};
  const Tensor factors = w_scale.contiguous(), terms = bias ? bias->contiguous() : Tensor();
  const int32_t* totals = static_cast<const int32_t*>(sums.const_data_ptr());
  for (int64_t c = 0; c < s.outputs; ++c) {
    result.zeros[c] = static_cast<uint32_t>(zero - shift) * static_cast<uint32_t>(totals[c]);
    result.scales[c] = scale * value_at(factors, factors.numel() == 1 ? 0 : c);
    if (bias) result.biases[c] = value_at(terms, c);
  }
  return result;
}

Tensor with_read_padding(const Tensor& codes, at::MemoryFormat format) {
  Tensor source = codes.contiguous(format);
  const int64_t past = (static_cast<int64_t>(source.storage().nbytes()) - source.storage_offset()) - source.numel();
  if (past >= 4) return source;
  const Tensor padded = at::empty({source.numel() + 4}, source.options());
  return padded.as_strided(source.sizes(), source.strides()).copy_(source);
}

namespace {

// What is copied for channels beyond the last meets weights of zero.
void copy_four(const uint8_t* from, uint8_t* to) { std::memcpy(to, from, 4); }

}  // namespace

Tensor conv_input(const Tensor& codes, ConvShape& s, PackedWeights& w) {
  constexpr int64_t kFewQuads = 4;
  Tensor source = with_read_padding(codes, at::MemoryFormat::ChannelsLast);
  const int64_t positions = s.images * s.height * s.width;
  if (w.quads > kFewQuads || s.kernel[1] == 1 || s.dilation[1] != 1 || positions == 0 || s.outputs == 0) return source;
  const int64_t height = s.height + 2 * s.padding[0], width = s.width + 2 * s.padding[1], channels = 4 * w.quads;
  const Tensor padded = empty_codes({s.images, channels, height, width}, codes.options());
  const uint8_t* from = static_cast<const uint8_t*>(source.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(padded.mutable_data_ptr());
  for_rows(s.images * height, width * channels, [&](int64_t line) {
    const int64_t image = line / height, row = line % height - s.padding[0];
    uint8_t* out = to + line * width * channels;
    std::memset(out, w.zero, width * channels);
    if (row < 0 || row >= s.height) return;
    const uint8_t* in = from + (image * s.height + row) * s.width * s.channels;
    out += s.padding[1] * channels;
    for (int64_t i = 0; i < s.width; ++i) {
      for (int64_t q = 0; q < w.quads; ++q) copy_four(in + i * s.channels + 4 * q, out + i * channels + 4 * q);
    }
  });
  s.height = height;
  s.width = width;
  s.channels = channels;
  w.quads *= s.kernel[1];
  s.kernel[1] = 1;
  s.padding[0] = s.padding[1] = 0;
  return padded;
}

// Positions of a row of the output are neighbours in the input, except those in the padding.
void fill_indirection(const ConvShape& s, const uint8_t* codes, const uint8_t* zero_row, int64_t first, int64_t last,
                      int64_t stride, const uint8_t** pointers) {
  const int64_t width = s.out_width, step = s.stride[1] * s.channels;
  for (int64_t begin = first; begin < last;) {
    const int64_t line = begin / width, from = begin % width, n = std::min(width - from, last - begin);
    const uint8_t* image = codes + line / s.out_height * s.height * s.width * s.channels;
    const uint8_t** out = pointers + (begin - first);
    for (int64_t i = 0; i < s.kernel[0]; ++i) {
      const int64_t row = line % s.out_height * s.stride[0] - s.padding[0] + i * s.dilation[0];
      const bool inside = row >= 0 && row < s.height;
      for (int64_t j = 0; j < s.kernel[1]; ++j, out += stride) {
        const int64_t column = from * s.stride[1] - s.padding[1] + j * s.dilation[1];
        // Positions [enter, leave) lie within the row.
        const auto until = [&](int64_t border) {
          return std::clamp<int64_t>((border - column + s.stride[1] - 1) / s.stride[1], 0, n);
        };
        const int64_t enter = !inside ? n : column >= 0 ? 0 : until(0);
        const int64_t leave = !inside ? n : column >= s.width ? enter : std::max(enter, until(s.width));
        const uint8_t* base = image + (row * s.width + column) * s.channels;
        std::fill(out, out + enter, zero_row);
        for (int64_t p = enter; p < leave; ++p) out[p] = base + p * step;
        std::fill(out + leave, out + n, zero_row);
      }
    }
    begin += n;
  }
}

}  // namespace amct_ext::cpu
