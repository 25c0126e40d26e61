// The product of codes over tensors: its operands, its tiles, and the epilogue of each tile.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "cpu/integer_product_level.h"
#include "cpu/integer_weight_split.h"

namespace amct_ext::cpu {

// A convolution over images with channels last; a matrix product is one over a single line of positions.
struct ConvShape {
  int64_t images, height, width, channels;  // of the input
  int64_t out_height, out_width, outputs;   // of the output
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  int64_t positions() const { return images * out_height * out_width; }
};

struct PackedWeights {
  at::Tensor packed;
  uint8_t zero;  // the code of zero
  int64_t quads;
  std::vector<uint32_t> zeros;
  std::vector<double> scales, biases;
};

constexpr int64_t kMaxRows = 96;  // positions of a work item: their sums stay in the L1 cache

ConvShape conv_shape(const char* op, const at::Tensor& codes, int64_t outputs, at::IntArrayRef kernel_size,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation);

ConvShape linear_shape(const char* op, const at::Tensor& codes, int64_t outputs);

PackedWeights packed_weights(const char* op, const ConvShape& s, const at::Tensor& packed, const at::Tensor& sums,
                             const at::Tensor& x_scale, const at::Tensor& x_offset, const at::Tensor& w_scale,
                             const std::optional<at::Tensor>& bias);

// The codes that a convolution reads. A convolution of few channels is made one over whole rows of its filter: the
// codes are copied, with their padding and up to a multiple of four channels, `s` and `w` changed accordingly.
at::Tensor conv_input(const at::Tensor& codes, ConvShape& s, PackedWeights& w);

// The codes in the given format, with some readable bytes beyond the end.
at::Tensor with_read_padding(const at::Tensor& codes, at::MemoryFormat format);

// The indirection buffer of positions [first, last): where each tap of each position is read,
// pointers[tap * stride + position - first]. Taps in the padding point to `zero_row`.
void fill_indirection(const ConvShape& s, const uint8_t* codes, const uint8_t* zero_row, int64_t first, int64_t last,
                      int64_t stride, const uint8_t** pointers);

struct ClampBounds {
  float lowest = -INFINITY, highest = INFINITY;
};

// The memory of a tile of the result: `runs` of `length` floats, the first at `at`, one every `stride`.
struct OutputWindow {
  int64_t at, runs, length, stride;

  // Prefetches part [step, step + 1) of `steps`: hardware prefetchers miss runs this short.
  void prefetch(const float* data, int64_t step, int64_t steps) const {
    constexpr int64_t kLine = 16;
    for (int64_t run = runs * step / steps; run < runs * (step + 1) / steps; ++run) {
      const float* from = data + at + run * stride;
      for (int64_t i = 0; i < length + kLine - 1; i += kLine) __builtin_prefetch(from + std::min(i, length - 1), 1, 2);
    }
  }
};

// The product, tile by tile: positions [first, last) and output channels [column, column + columns). window(first,
// last, column, columns) is the memory that the epilogue reads and writes in each of `outputs`; epilogue(parameters,
// sums, first, last, column) stores the result, sums being rows of kTileChannels.
template <typename WindowOf, typename StoreTile>
void tiled_product(const ConvShape& s, const uint8_t* codes, const PackedWeights& w, const ClampBounds& bounds,
                   std::initializer_list<const float*> outputs, const WindowOf& window, const StoreTile& epilogue) {
  const int64_t positions = s.positions();
  if (positions == 0 || s.outputs == 0) return;
  const ProductKernel& kernel = product_kernel();
  const int64_t taps = s.kernel[0] * s.kernel[1];
  const int64_t blocks = (s.outputs + kBlockChannels - 1) / kBlockChannels,
                wide = (blocks + kTileBlocks - 1) / kTileBlocks;
  const int64_t chunks = (positions + kMaxRows - 1) / kMaxRows, even = (positions + chunks - 1) / chunks;
  const int64_t rows = (even + kTileRows - 1) / kTileRows * kTileRows;
  const int64_t count = (positions + rows - 1) / rows;
  // Few positions: the output channels are shared out too.
  const int64_t wanted = 4 * at::get_num_threads();
  const int64_t groups = std::min(wide, std::max<int64_t>(1, (wanted + count - 1) / count));
  const std::vector<uint8_t> zero_row(4 * w.quads, w.zero);
  const SplitWeights weights(kernel, w.packed, blocks, taps, w.quads);
  at::parallel_for(0, count * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<const uint8_t*> pointers(taps * rows);
    alignas(64) int32_t sums[kMaxRows * kTileChannels];
    int64_t prepared = -1;
    for (int64_t work = begin; work < end; ++work) {
      const int64_t chunk = work / groups, group = work % groups;
      const int64_t first = chunk * rows, last = std::min(first + rows, positions);
      if (chunk != prepared) fill_indirection(s, codes, zero_row.data(), first, last, rows, pointers.data());
      prepared = chunk;
      for (int64_t b = wide * group / groups; b < wide * (group + 1) / groups; ++b) {
        const int64_t block = b * kTileBlocks, column = block * kBlockChannels;
        const int64_t end_block = std::min(block + kTileBlocks, blocks);
        const int columns = static_cast<int>(std::min<int64_t>(kTileChannels, s.outputs - column));
        const OutputWindow ahead = window(first, last, column, columns);
        for (int64_t from = block; from < end_block; from += kernel.tile_blocks) {
          const int64_t tile_blocks = std::min<int64_t>(kernel.tile_blocks, end_block - from);
          for (int64_t row = 0; row < last - first; row += kTileRows) {
            for (const float* data : outputs) {
              if (data != nullptr && from + tile_blocks == end_block) {
                ahead.prefetch(data, row / kTileRows, rows / kTileRows);
              }
            }
            Tile tile{pointers.data() + row,
                      rows,
                      taps,
                      w.quads,
                      {},
                      weights.remainders(from),
                      sums + row * kTileChannels + (from - block) * kBlockChannels};
            for (int64_t i = 0; i < tile_blocks; ++i) tile.weights[i] = weights.block(from + i);
            kernel.sums(tile, static_cast<int>(std::min<int64_t>(kTileRows, last - first - row)),
                        static_cast<int>(tile_blocks));
          }
        }
        const Epilogue parameters{columns, &w.zeros[column], &w.scales[column], &w.biases[column],
                                  nullptr, bounds.lowest,    bounds.highest};
        epilogue(parameters, sums, first, last, column);
      }
    }
  });
}

}  // namespace amct_ext::cpu
