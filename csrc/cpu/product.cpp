// integer_conv2d, integer_conv2d_codes and integer_linear: the product of codes, its sums turned into floats in one
// rounding, and those into codes again.
#include "cpu/product.h"

#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/clips.h"
#include "cpu/codes.h"
#include "cpu/tensors.h"

namespace amct_ext::cpu {

extern const ProductKernel product_baseline;
#ifdef AMCT_X86_LEVELS
extern const ProductKernel product_vnni;
#endif

namespace {

using at::Tensor;

const ProductKernel& choose() {
#ifdef AMCT_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512vnni")) return product_vnni;
#endif
  return product_baseline;
}

const ProductKernel& product_kernel() {
  static const ProductKernel& chosen = choose();
  return chosen;
}

// A convolution over images with channels last; a matrix product is one over a single line of positions.
struct Shape {
  int64_t images, height, width, channels;  // of the input
  int64_t out_height, out_width, outputs;   // of the output
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  int64_t positions() const { return images * out_height * out_width; }
};

struct Weights {
  const int8_t* packed;
  uint8_t zero;  // the code of zero
  int64_t quads;
  std::vector<uint32_t> zeros;
  std::vector<double> scales, biases;
};

constexpr int64_t kRows = 96;  // positions of one piece of work: their sums stay in the first-level cache

Weights weights_of(const char* op, const Shape& s, const Tensor& packed, const Tensor& sums, const Tensor& x_scale,
                   const Tensor& x_offset, const Tensor& w_scale, const std::optional<Tensor>& bias) {
  const int64_t quads = (s.channels + 3) / 4, blocks = (s.outputs + kColumns - 1) / kColumns;
  const std::vector<int64_t> expected{blocks, s.kernel[0] * s.kernel[1], quads, kColumns, 4};
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
  // An offset that is no number comes with a scale that is none, which decides the result.
  const int zero = offset >= -128 && offset <= 127 ? static_cast<int>(offset) + 128 : 0;
  const size_t padded = static_cast<size_t>(blocks * kColumns);
  Weights result{static_cast<const int8_t*>(packed.const_data_ptr()),
                 static_cast<uint8_t>(zero),
                 quads,
                 std::vector<uint32_t>(padded),
                 std::vector<double>(padded),
                 std::vector<double>(padded)};
  const Tensor factors = w_scale.contiguous(), terms = bias ? bias->contiguous() : Tensor();
  const int32_t* totals = static_cast<const int32_t*>(sums.const_data_ptr());
  for (int64_t c = 0; c < s.outputs; ++c) {
    result.zeros[c] = static_cast<uint32_t>(zero) * static_cast<uint32_t>(totals[c]);
    result.scales[c] = scale * value_at(factors, factors.numel() == 1 ? 0 : c);
    if (bias) result.biases[c] = value_at(terms, c);
  }
  return result;
}

// The codes where the kernel may read them: channels last, and some bytes beyond the end.
Tensor readable(const Tensor& codes, at::MemoryFormat format) {
  const Tensor dense = codes.contiguous(format);
  const int64_t past = (static_cast<int64_t>(dense.storage().nbytes()) - dense.storage_offset()) - dense.numel();
  if (past >= 4) return dense;
  const Tensor room = at::empty({dense.numel() + 4}, dense.options());
  return room.as_strided(dense.sizes(), dense.strides()).copy_(dense);
}

// Where each tap of each position [first, last) is read: pointers[tap * stride + position - first]. Positions of a row
// of the output follow each other in the input, but for those beyond its borders.
void pointers_of(const Shape& s, const uint8_t* codes, const uint8_t* blank, int64_t first, int64_t last,
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
        std::fill(out, out + enter, blank);
        for (int64_t p = enter; p < leave; ++p) out[p] = base + p * step;
        std::fill(out + leave, out + n, blank);
      }
    }
    begin += n;
  }
}

struct Bounds {
  float lowest = -INFINITY, highest = INFINITY;
};

Bounds bounds_of(std::optional<double> lowest, std::optional<double> highest) {
  Bounds bounds;
  if (lowest) bounds.lowest = static_cast<float>(*lowest);
  if (highest) bounds.highest = static_cast<float>(*highest);
  return bounds;
}

// Where a piece of the result lies: runs of so many floats, the first `at`, one every `stride`.
struct Window {
  int64_t at, runs, length, stride;

  // Asks for part [step, step + 1) of `steps`: nothing else tells the processor of pieces this short.
  void prefetch(const float* data, int64_t step, int64_t steps) const {
    constexpr int64_t kLine = 16;
    for (int64_t run = runs * step / steps; run < runs * (step + 1) / steps; ++run) {
      const float* from = data + at + run * stride;
      for (int64_t i = 0; i < length + kLine - 1; i += kLine) __builtin_prefetch(from + std::min(i, length - 1), 1, 2);
    }
  }
};

// Of positions [first, last): window(first, last, column, columns) is what is read and written for these output
// channels, in each of `touched`; finish(output, sums, first, last, column) does it, sums being rows of kBlockColumns.
template <typename Place, typename Finish>
void product(const Shape& s, const uint8_t* codes, const Weights& w, const Bounds& bounds,
             std::initializer_list<const float*> touched, const Place& window, const Finish& finish) {
  const int64_t positions = s.positions();
  if (positions == 0 || s.outputs == 0) return;
  const int64_t taps = s.kernel[0] * s.kernel[1], block_stride = taps * w.quads * kQuadBytes;
  const int64_t blocks = (s.outputs + kColumns - 1) / kColumns, wide = (blocks + kTileBlocks - 1) / kTileBlocks;
  const int64_t pieces = (positions + kRows - 1) / kRows, even = (positions + pieces - 1) / pieces;
  const int64_t rows = (even + kTileRows - 1) / kTileRows * kTileRows;
  const int64_t count = (positions + rows - 1) / rows;
  // Few positions: the output channels are shared out too.
  const int64_t wanted = 4 * at::get_num_threads();
  const int64_t groups = std::min(wide, std::max<int64_t>(1, (wanted + count - 1) / count));
  const std::vector<uint8_t> blank(4 * w.quads, w.zero);
  const auto sums_of = product_kernel().sums;
  at::parallel_for(0, count * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<const uint8_t*> pointers(taps * rows);
    alignas(64) int32_t sums[kRows * kBlockColumns];
    int64_t prepared = -1;
    for (int64_t work = begin; work < end; ++work) {
      const int64_t piece = work / groups, group = work % groups;
      const int64_t first = piece * rows, last = std::min(first + rows, positions);
      if (piece != prepared) pointers_of(s, codes, blank.data(), first, last, rows, pointers.data());
      prepared = piece;
      for (int64_t b = wide * group / groups; b < wide * (group + 1) / groups; ++b) {
        const int64_t block = b * kTileBlocks, column = block * kColumns;
        const int tile_blocks = static_cast<int>(std::min<int64_t>(kTileBlocks, blocks - block));
        const int columns = static_cast<int>(std::min<int64_t>(kBlockColumns, s.outputs - column));
        const Window ahead = window(first, last, column, columns);
        for (int64_t row = 0; row < last - first; row += kTileRows) {
          for (const float* data : touched) {
            if (data != nullptr) ahead.prefetch(data, row / kTileRows, rows / kTileRows);
          }
          const Tile tile{pointers.data() + row,     rows, taps, w.quads, w.packed + block * block_stride, block_stride,
                          sums + row * kBlockColumns};
          sums_of(tile, static_cast<int>(std::min<int64_t>(kTileRows, last - first - row)), tile_blocks);
        }
        const Output output{columns, &w.zeros[column], &w.scales[column], &w.biases[column],
                            nullptr, bounds.lowest,    bounds.highest};
        finish(output, sums, first, last, column);
      }
    }
  });
}

// y and the addend (or null): channels last.
void into_rows(const Shape& s, const uint8_t* codes, const Weights& w, const Bounds& bounds, const float* addend,
               float* y) {
  const auto write = product_kernel().write_rows;
  const auto window = [&](int64_t first, int64_t last, int64_t column, int64_t columns) {
    return Window{first * s.outputs + column, last - first, columns, s.outputs};
  };
  const auto finish = [&](Output output, const int32_t* sums, int64_t first, int64_t last, int64_t column) {
    const int64_t at = first * s.outputs + column;
    if (addend != nullptr) output.addend = addend + at;
    write(output, sums, last - first, y + at, s.outputs);
  };
  product(s, codes, w, bounds, {y, addend}, window, finish);
}

// y and the addend (or null): each channel a plane.
void into_planes(const Shape& s, const uint8_t* codes, const Weights& w, const Bounds& bounds, const float* addend,
                 float* y) {
  const auto write = product_kernel().write_columns;
  const int64_t plane = s.out_height * s.out_width;
  const auto start = [&](int64_t first, int64_t column) {
    return (first / plane * s.outputs + column) * plane + first % plane;
  };
  const auto window = [&](int64_t first, int64_t last, int64_t column, int64_t columns) {
    return Window{start(first, column), columns, std::min(last - first, plane - first % plane), plane};
  };
  const auto finish = [&](Output output, const int32_t* sums, int64_t first, int64_t last, int64_t column) {
    for (int64_t from = first; from < last;) {
      const int64_t to = std::min(last, (from / plane + 1) * plane), at = start(from, column);
      if (addend != nullptr) output.addend = addend + at;
      write(output, sums + (from - first) * kBlockColumns, to - from, y + at, plane);
      from = to;
    }
  };
  product(s, codes, w, bounds, {y, addend}, window, finish);
}

// y: codes, channels last. Returns whether a float was not finite.
bool into_codes(const Shape& s, const uint8_t* codes, const Weights& w, const Bounds& bounds, const UlqForward& ulq,
                uint8_t* y) {
  constexpr int64_t kFew = 16;  // floats of so many positions stay close to the sums
  const auto write = product_kernel().write_rows;
  const auto quantize = kernels().ulq_codes[0];
  std::atomic<bool> bad{false};
  const auto nowhere = [](int64_t, int64_t, int64_t, int64_t) { return Window{}; };
  const auto finish = [&](const Output& output, const int32_t* sums, int64_t first, int64_t last, int64_t column) {
    alignas(64) float floats[kFew * kBlockColumns];
    alignas(64) uint8_t made[kFew * kBlockColumns];
    const int64_t columns = output.columns;
    for (int64_t from = first; from < last; from += kFew) {
      const int64_t n = std::min(kFew, last - from);
      write(output, sums + (from - first) * kBlockColumns, n, floats, columns);
      if (quantize(floats, made, n * columns, ulq)) bad.store(true, std::memory_order_relaxed);
      for (int64_t r = 0; r < n; ++r) std::memcpy(y + (from + r) * s.outputs + column, made + r * columns, columns);
    }
  };
  product(s, codes, w, bounds, {}, nowhere, finish);
  return bad.load();
}

Shape conv_shape(const char* op, const Tensor& codes, int64_t outputs, at::IntArrayRef kernel_size,
                 at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_type(op, "codes", codes, at::kByte);
  TORCH_CHECK_VALUE(codes.dim() == 4, op, ": codes must have four dimensions, not ", codes.dim());
  TORCH_CHECK_VALUE(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                    ": kernel_size, stride, padding and dilation must hold two values each");
  Shape s{codes.size(0), codes.size(2), codes.size(3), codes.size(1), 0, 0, outputs, {}, {}, {}, {}};
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

Tensor conv2d(const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed,
              const Tensor& sums, const Tensor& w_scale, const std::optional<Tensor>& bias, at::IntArrayRef kernel_size,
              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool channels_last,
              const std::optional<Tensor>& addend, std::optional<double> lowest, std::optional<double> highest) {
  const char* op = "integer_conv2d";
  const Shape s = conv_shape(op, codes, sums.numel(), kernel_size, stride, padding, dilation);
  const Weights w = weights_of(op, s, packed, sums, x_scale, x_offset, w_scale, bias);
  const Tensor source = readable(codes, at::MemoryFormat::ChannelsLast);
  const auto layout = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  Tensor y = at::empty({s.images, s.outputs, s.out_height, s.out_width}, codes.options().dtype(at::kFloat), layout);
  Tensor more;
  if (addend) {
    check_type(op, "addend", *addend, at::kFloat);
    TORCH_CHECK_VALUE(addend->sizes() == y.sizes(), op, ": addend must have the shape of the result, ", y.sizes(),
                      ", not ", addend->sizes());
    more = addend->contiguous(layout);
  }
  (channels_last ? into_rows : into_planes)(
      s, static_cast<const uint8_t*>(source.const_data_ptr()), w, bounds_of(lowest, highest),
      addend ? static_cast<const float*>(more.const_data_ptr()) : nullptr, static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv2d_codes(
    const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed, const Tensor& sums,
    const Tensor& w_scale, const std::optional<Tensor>& bias, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, std::optional<double> lowest, std::optional<double> highest,
    const Tensor& clip_max, const Tensor& clip_min, const Tensor& prev_clip_max, const Tensor& prev_clip_min,
    int64_t num_bits, bool fixed_min) {
  const char* op = "integer_conv2d_codes";
  check_bits(op, num_bits, 8);
  const Shape s = conv_shape(op, codes, sums.numel(), kernel_size, stride, padding, dilation);
  const Weights w = weights_of(op, s, packed, sums, x_scale, x_offset, w_scale, bias);
  const Tensor source = readable(codes, at::MemoryFormat::ChannelsLast);
  const Tensor floats = at::empty({0}, codes.options().dtype(at::kFloat));  // the type that is rounded
  const Clips used = used_clips(op, floats, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min);
  Tensor y = room_for_codes({s.images, s.outputs, s.out_height, s.out_width}, codes.options());
  const bool bad = into_codes(s, static_cast<const uint8_t*>(source.const_data_ptr()), w, bounds_of(lowest, highest),
                              used.parameters(num_bits), static_cast<uint8_t*>(y.mutable_data_ptr()));
  return with_clips(std::move(y), used, clip_max, bad || !used.valid());
}

Tensor linear(const Tensor& codes, const Tensor& x_scale, const Tensor& x_offset, const Tensor& packed,
              const Tensor& sums, const Tensor& w_scale, const std::optional<Tensor>& bias) {
  const char* op = "integer_linear";
  check_type(op, "codes", codes, at::kByte);
  TORCH_CHECK_VALUE(codes.dim() >= 1, op, ": codes must have at least one dimension");
  const int64_t channels = codes.size(-1), rows = channels ? codes.numel() / channels : 0;
  const Shape s{1, 1, rows, channels, 1, rows, sums.numel(), {1, 1}, {1, 1}, {0, 0}, {1, 1}};
  const Weights w = weights_of(op, s, packed, sums, x_scale, x_offset, w_scale, bias);
  const Tensor source = readable(codes, at::MemoryFormat::Contiguous);
  std::vector<int64_t> sizes = codes.sizes().vec();
  sizes.back() = s.outputs;
  Tensor y = at::empty(sizes, codes.options().dtype(at::kFloat));
  into_rows(s, static_cast<const uint8_t*>(source.const_data_ptr()), w, {}, nullptr,
            static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("integer_conv2d", conv2d);
  m.impl("integer_conv2d_codes", conv2d_codes);
  m.impl("integer_linear", linear);
}

}  // namespace
}  // namespace amct_ext::cpu
