// Packed weights in the form that a product kernel takes: as they are, or split where it would saturate.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/integer_product.h"

namespace amct_ext::cpu {

// Holds pointers into itself.
class SplitWeights {
 public:
  // `packed`: contiguous, blocks of `taps` times `quads` quads.
  SplitWeights(const ProductKernel& kernel, const at::Tensor& packed, int64_t blocks, int64_t taps, int64_t quads);
  SplitWeights(const SplitWeights&) = delete;
  SplitWeights& operator=(const SplitWeights&) = delete;

  const int8_t* block(int64_t index) const { return weights_ + index * block_bytes_; }
  // Of the blocks from `index` on; null where no kernel splits.
  const SplitRemainder* remainders(int64_t index) const {
    return remainders_.empty() ? nullptr : &remainders_[index * kMaxVectors];
  }

 private:
  void split(const ProductKernel& kernel, const int8_t* packed, int64_t block, int64_t taps, int64_t quads);

  int64_t block_bytes_;
  const int8_t* weights_;
  at::Tensor safe_, remainder_weights_;  // the summands
  std::vector<SplitRemainder> remainders_;
  std::vector<std::vector<SplitRemainder::Position>> positions_;
};

}  // namespace amct_ext::cpu
