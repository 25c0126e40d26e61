// Packed weights in the form that a product kernel takes: as they are, or split where it would saturate.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/integer_product.h"

namespace amct_ext::cpu {

class SplitWeights {
 public:
  // `packed`: contiguous, blocks of `taps` times `quads` quads.
  SplitWeights(const ProductKernel& kernel, const at::Tensor& packed, int64_t blocks, int64_t taps, int64_t quads);

  const int8_t* block(int64_t index) const { return weights_ + index * block_bytes_; }
  // Of the blocks from `index` on; null where no kernel splits.
  const SplitRest* rests(int64_t index) const { return rests_.empty() ? nullptr : &rests_[index * kMaxVectors]; }

 private:
  void split(const ProductKernel& kernel, const int8_t* packed, int64_t block, int64_t taps, int64_t quads);

  int64_t block_bytes_;
  const int8_t* weights_;
  at::Tensor safe_, second_;  // the summands
  std::vector<SplitRest> rests_;
  std::vector<std::vector<SplitRest::Place>> places_;
};

}  // namespace amct_ext::cpu
