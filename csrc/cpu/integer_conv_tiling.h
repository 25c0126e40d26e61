// The product of codes over tensors: its operands, the pieces it is cut into, and what is done to the sums of each.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "cpu/integer_product.h"

namespace amct_ext::cpu {

const ProductKernel& product_kernel();

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

Shape conv_shape(const char* op, const at::Tensor& codes, int64_t outputs, at::IntArrayRef kernel_size,
                 at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation);

Shape linear_shape(const char* op, const at::Tensor& codes, int64_t outputs);

Weights weights_of(const char* op, const Shape& s, const at::Tensor& packed, const at::Tensor& sums,
                   const at::Tensor& x_scale, const at::Tensor& x_offset, const at::Tensor& w_scale,
                   const std::optional<at::Tensor>& bias);

// The codes where the kernel may read them: channels last, and some bytes beyond the end.
at::Tensor readable(const at::Tensor& codes, at::MemoryFormat format);

// Where each tap of each position [first, last) is read: pointers[tap * stride + position - first].
void pointers_of(const Shape& s, const uint8_t* codes, const uint8_t* blank, int64_t first, int64_t last,
                 int64_t stride, const uint8_t** pointers);

struct Bounds {
  float lowest = -INFINITY, highest = INFINITY;
};

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

}  // namespace amct_ext::cpu
