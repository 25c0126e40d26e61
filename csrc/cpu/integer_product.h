// The integer product: loops on raw pointers, one table for each instruction set that has its own.
#pragma once

#include <cstdint>

namespace amct_ext::cpu {

// Packed weights: blocks of sixteen output channels; in a block, for every tap of the filter and every four input
// channels (a quad), sixteen times four codes.
constexpr int kBlockChannels = 16, kQuadBytes = 4 * kBlockChannels;
constexpr int kTileRows = 6, kTileBlocks = 4, kTileChannels = kBlockChannels * kTileBlocks;

// Positions (rows) times output channels (columns), up to kTileRows x kTileBlocks blocks.
struct Tile {
  const uint8_t* const* rows;  // indirection buffer: per tap `rows_stride` pointers; 4 * quads bytes are read at each
  int64_t rows_stride, taps, quads;
  const int8_t* weights;
  int64_t block_stride;
  int32_t* sums;  // rows of kTileChannels
};

// What is done to the sums of some output channels: minus zero point times weights, times scale, plus bias, rounded to
// float; then plus the addend (null, or in the layout of y), then clamped (NaN stays).
struct Epilogue {
  int columns;
  const uint32_t* zeros;  // zero point times the sum of the weights
  const double *scales, *biases;
  const float* addend;
  float lowest, highest;
};

struct ProductKernel {
  void (*sums)(const Tile&, int rows, int blocks);
  // y[row][column] and y[column][row]
  void (*write_rows)(const Epilogue&, const int32_t* sums, int64_t rows, float* y, int64_t stride);
  void (*write_columns)(const Epilogue&, const int32_t* sums, int64_t rows, float* y, int64_t stride);
};

}  // namespace amct_ext::cpu
