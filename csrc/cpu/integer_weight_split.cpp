#include "cpu/integer_weight_split.h"

#include "cpu/parallel.h"
#include "cpu/result_pool.h"

namespace amct_ext::cpu {

SplitWeights::SplitWeights(const ProductKernel& kernel, const at::Tensor& packed, int64_t blocks, int64_t taps,
                           int64_t quads)
    : block_bytes_(taps * quads * kQuadBytes), weights_(static_cast<const int8_t*>(packed.const_data_ptr())) {
  if (kernel.split_weights == nullptr) return;
  safe_ = pooled_like(packed, Lifetime::kLayer);
  remainder_weights_ = pooled_like(packed, Lifetime::kLayer);  // pages that are not written cost nothing
  remainders_.resize(blocks * kMaxVectors);
  positions_.resize(blocks * kMaxVectors);
  const int8_t* from = weights_;
  for_rows(blocks, block_bytes_, [&](int64_t block) { split(kernel, from, block, taps, quads); });
  weights_ = static_cast<const int8_t*>(safe_.const_data_ptr());
}

void SplitWeights::split(const ProductKernel& kernel, const int8_t* packed, int64_t block, int64_t taps,
                         int64_t quads) {
  const int64_t count = taps * quads, at = block * block_bytes_;
  std::vector<int32_t> indices(kernel.vectors * count);
  int8_t* remainders = static_cast<int8_t*>(remainder_weights_.mutable_data_ptr()) + at;
  SplitOutput outputs[kMaxVectors] = {};
  for (int v = 0; v < kernel.vectors; ++v) {
    outputs[v] = {indices.data() + v * count, remainders + v * (block_bytes_ / kernel.vectors), 0};
  }
  kernel.split_weights(packed + at, count, static_cast<int8_t*>(safe_.mutable_data_ptr()) + at, outputs);
  for (int v = 0; v < kernel.vectors; ++v) {
    std::vector<SplitRemainder::Position>& positions = positions_[block * kMaxVectors + v];
    positions.reserve(outputs[v].count);
    for (int64_t i = 0; i < outputs[v].count; ++i) {
      const int64_t index = outputs[v].indices[i], tap = index / quads;
      positions.push_back({static_cast<int32_t>(tap), static_cast<int32_t>(index - tap * quads)});
    }
    remainders_[block * kMaxVectors + v] = {positions.data(), outputs[v].weights, outputs[v].count};
  }
}

}  // namespace amct_ext::cpu
