// How tensors are cut into blocks, beyond 2^31 elements too: index arithmetic needs no memory.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#include "common/layout.h"
#include "cpu/strided_runs.h"

namespace {

using amct_ext::cpu::kBlock;

class Blocks : public testing::TestWithParam<int64_t> {};

TEST_P(Blocks, CoverAPlainRange) {
  const int64_t n = GetParam();
  std::atomic<int64_t> covered{0}, last{0}, largest{0}, misplaced{0};
  amct_ext::cpu::for_blocks(n, [&](int64_t block, int64_t begin, int64_t end) {
    misplaced += begin != block * kBlock;
    covered += end - begin;
    last = std::max<int64_t>(last, end);
    largest = std::max<int64_t>(largest, end - begin);
  });
  EXPECT_EQ(misplaced, 0);
  EXPECT_EQ(covered, n);
  EXPECT_EQ(last, n);
  EXPECT_LE(largest, kBlock);
}

INSTANTIATE_TEST_SUITE_P(Sizes, Blocks, testing::Values(0, 1, kBlock, kBlock + 1, (int64_t{1} << 33) + 5));

// `rows` rows of `size` elements, `step` elements apart, so that all rows can be views of little memory.
class StridedRunsOf : public testing::TestWithParam<std::tuple<int64_t, int64_t, int64_t>> {};

TEST_P(StridedRunsOf, ReadEveryElementWhereItLies) {
  const auto [rows, size, step] = GetParam();
  const amct_ext::cpu::StridedRuns runs({rows, size}, {step, 1}, {size, 1});
  EXPECT_EQ(runs.count * runs.length, rows * size);
  std::atomic<int64_t> covered{0}, furthest{0}, written{0};
  std::atomic<bool> right{true};
  const int64_t row_size = size, row_step = step;  // a structured binding cannot be captured by all compilers
  amct_ext::cpu::for_strided_runs(runs, [&](int64_t block, int64_t from, int64_t to, int64_t n) {
    right = right && block < runs.blocks() && n <= kBlock && from == to / row_size * row_step + to % row_size;
    covered += n;
    furthest = std::max<int64_t>(furthest, from + n);
    written = std::max<int64_t>(written, to + n);
  });
  EXPECT_TRUE(right);
  EXPECT_EQ(covered, rows * size);
  EXPECT_EQ(written, rows * size);
  EXPECT_EQ(furthest, (rows - 1) * step + size);
}

INSTANTIATE_TEST_SUITE_P(Shapes, StridedRunsOf,
                         testing::Values(std::tuple(5, 300, 301), std::tuple(3, 5 * kBlock + 3, 6 * kBlock),
                                         std::tuple((int64_t{1} << 18) + 1, kBlock, kBlock + 64),
                                         std::tuple(2, (int64_t{1} << 32) + 7, int64_t{1} << 33),
                                         std::tuple((int64_t{1} << 22) + 3, 1 << 10, 1 << 11)));

TEST(StridedRuns, ADenseTensorIsOneRun) {
  const amct_ext::cpu::StridedRuns runs({2, 3, 5}, {15, 1, 3}, {15, 1, 3});
  EXPECT_EQ(runs.count, 1);
  EXPECT_EQ(runs.length, 30);
}

TEST(StridedRuns, AnEmptyTensorHasNoBlocks) {
  EXPECT_EQ(amct_ext::cpu::StridedRuns({2, 0, 5}, {5, 5, 1}, {5, 5, 1}).blocks(), 0);
}

TEST(Coalesced, ShortRunsAreCopiedAndLongOnesAreNot) {
  using amct_ext::cpu::kMinRun;
  const at::Tensor x = at::rand({3, 2 * kMinRun});
  EXPECT_TRUE(amct_ext::cpu::coalesced(x).is_alias_of(x));
  EXPECT_TRUE(amct_ext::cpu::coalesced(x.narrow(1, 0, kMinRun)).is_alias_of(x));
  const at::Tensor narrow = x.narrow(1, 0, kMinRun - 1), copy = amct_ext::cpu::coalesced(narrow);
  EXPECT_FALSE(copy.is_alias_of(x));
  EXPECT_TRUE(at::equal(copy, narrow));
}

TEST(AxisView, OfAHugeTensor) {
  const at::Tensor huge = at::empty({int64_t{1} << 20, 3, 1 << 12}, at::device(at::kMeta));
  const amct_ext::AxisView view = amct_ext::axis_view(huge, 1);
  EXPECT_EQ(view.outer, int64_t{1} << 20);
  EXPECT_EQ(view.size, 3);
  EXPECT_EQ(view.inner, 1 << 12);
}

}  // namespace
