// The integer product: loops on raw pointers, one table for each instruction set that has its own.
#pragma once

#include <cstdint>

namespace amct_ext::cpu {

// Packed weights, the same for every instruction set: blocks of sixteen output channels; in a block, for every tap of
// the filter and every four input channels (a quad), sixteen times four codes.
constexpr int kBlockChannels = 16, kQuadBytes = 4 * kBlockChannels;
constexpr int kTileRows = 6, kTileBlocks = 4, kTileChannels = kBlockChannels * kTileBlocks;
constexpr int kMaxVectors = 2;  // vectors of sums in a block, for instruction sets that split weights

// Kernels that add two products in 16 bits take the weights of a pair as they are up to this magnitude of their sum:
// 255 * 128 < 2^15. Larger pairs are split into two summands, which are halves (ProductKernel::split_weights).
constexpr int kMaxPairSum = 128;

// The second summand of the weights that were split, for the channels of one vector: `count` quads.
struct SplitRemainder {
  struct Position {
    int32_t tap, quad;
  };
  const Position* positions;
  const int8_t* weights;
  int64_t count;
};

// Positions (rows) times output channels (columns), up to kTileRows x kTileBlocks blocks.
struct Tile {
  const uint8_t* const* rows;  // indirection buffer: per tap `rows_stride` pointers; 4 * quads bytes are read at each
  int64_t rows_stride, taps, quads;
  const int8_t* weights[kTileBlocks];
  const SplitRemainder* remainders;  // kMaxVectors for each block; null without split weights
  int32_t* sums;                     // rows of kTileChannels
};

// What is done to the sums of some output channels: minus zero point times weights, times scale, plus bias, rounded to
// float; then plus the addend (null, or in the layout of y), then clamped (NaN stays).
struct Epilogue {
  int columns;
  const uint32_t* zeros;  // zero point, less the kernel's code_shift, times the sum of the weights
  const double *scales, *biases;
  const float* addend;
  float lowest, highest;
};

// Where split_weights puts the second summands of a vector's weights. Indices count the quads of a block.
struct SplitOutput {
  int32_t* indices;
  int8_t* weights;
  int64_t count;
};

struct ProductKernel {
  const char* level;
  int tile_blocks;  // of a tile
  int vectors;      // vectors of sums in a block
  int code_shift;   // what the kernel takes from each activation: it returns sums of (code - code_shift) * weight
  void (*sums)(const Tile&, int rows, int blocks);
  // y[row][column] and y[column][row]
  void (*write_rows)(const Epilogue&, const int32_t* sums, int64_t rows, float* y, int64_t stride);
  void (*write_columns)(const Epilogue&, const int32_t* sums, int64_t rows, float* y, int64_t stride);
  // Splits the weights of a block in two summands where the kernel would saturate: the first go to `safe`, the second
  // to `remainders`, one for each vector. Null: the kernel takes any weights.
  void (*split_weights)(const int8_t* weights, int64_t quads, int8_t* safe, SplitOutput* remainders);
};

}  // namespace amct_ext::cpu
