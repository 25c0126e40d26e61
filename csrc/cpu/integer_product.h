// The integer product: loops on raw pointers, one set for every instruction set that has one of its own.
#pragma once

#include <cstdint>

namespace amct_ext::cpu {

// Packed weights: blocks of sixteen output channels; in a block, for every tap of the filter and every four input
// channels, sixteen times four codes.
constexpr int kColumns = 16, kQuadBytes = 4 * kColumns;
constexpr int kTileRows = 6, kTileBlocks = 4, kBlockColumns = kColumns * kTileBlocks;

// Positions (rows) times output channels (columns), up to kTileRows x kTileBlocks blocks.
struct Tile {
  const uint8_t* const* rows;  // per tap `rows_stride` pointers; 4 * quads bytes are read at each
  int64_t rows_stride, taps, quads;
  const int8_t* weights;
  int64_t block_stride;
  int32_t* sums;  // rows of kBlockColumns
};

// What is done to the sums of some output channels: minus zero point times weights, times scale, plus bias, rounded;
// then plus the addend (null, or laid out as y), then limited to the bounds (a NaN stays).
struct Output {
  int columns;
  const uint32_t* zeros;
  const double *scales, *biases;
  const float* addend;
  float lowest, highest;
};

struct ProductKernel {
  void (*sums)(const Tile&, int rows, int blocks);
  void (*write_rows)(const Output&, const int32_t* sums, int64_t rows, float* y, int64_t stride);     // y[row][column]
  void (*write_columns)(const Output&, const int32_t* sums, int64_t rows, float* y, int64_t stride);  // y[column][row]
};

}  // namespace amct_ext::cpu
