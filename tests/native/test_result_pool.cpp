// The memory of large results that are freed: which request takes it over, how much of it may lie idle.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "cpu/result_pool.h"

namespace {

using amct_ext::cpu::Lifetime;
using amct_ext::cpu::pooled_like;
using amct_ext::cpu::release_memory;

constexpr int64_t kMiB = int64_t{1} << 20;

// A result of so many MiB.
at::Tensor result(int64_t size, Lifetime lifetime) {
  return pooled_like(at::empty({size * kMiB}, at::kByte), lifetime);
}

// What a result of so many MiB leaves when it is freed: its address.
const void* freed(int64_t size, Lifetime lifetime) { return result(size, lifetime).const_data_ptr(); }

class ResultPool : public testing::Test {
 protected:
  void SetUp() override { release_memory(); }
  void TearDown() override { release_memory(); }
};

TEST_F(ResultPool, HasTheLayoutOfItsModel) {
  const at::Tensor x = at::empty({8, 64, 32, 32}).contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor y = pooled_like(x, Lifetime::kLayer, at::kHalf);
  EXPECT_EQ(y.sizes(), x.sizes());
  EXPECT_EQ(y.strides(), x.strides());
  EXPECT_EQ(y.scalar_type(), at::kHalf);
  EXPECT_FALSE(y.is_alias_of(x));
}

TEST_F(ResultPool, ALayerTakesAnyBlockThatIsLargeEnough) {
  const void* const block = freed(4, Lifetime::kLayer);
  EXPECT_EQ(result(3, Lifetime::kLayer).const_data_ptr(), block);
  EXPECT_NE(result(5, Lifetime::kLayer).const_data_ptr(), block);
}

TEST_F(ResultPool, AStepTakesABlockOfItsOwnSize) {
  const void* const block = freed(4, Lifetime::kStep);
  EXPECT_NE(result(3, Lifetime::kStep).const_data_ptr(), block);
  EXPECT_EQ(result(4, Lifetime::kStep).const_data_ptr(), block);
}

TEST_F(ResultPool, LifetimesDoNotShareBlocks) {
  freed(4, Lifetime::kStep);
  const at::Tensor y = result(4, Lifetime::kLayer);
  EXPECT_EQ(release_memory(), 4 * kMiB);  // that of the step lies idle still
}

TEST_F(ResultPool, TheBlockFreedLastIsTakenFirst) {
  at::Tensor a = result(4, Lifetime::kStep), b = result(4, Lifetime::kStep);
  const void* const block = a.const_data_ptr();
  b.reset();
  a.reset();
  EXPECT_EQ(result(4, Lifetime::kStep).const_data_ptr(), block);
}

TEST_F(ResultPool, ReleaseGivesBackWhatLiesIdle) {
  const at::Tensor used = result(2, Lifetime::kLayer);
  freed(3, Lifetime::kLayer);
  freed(4, Lifetime::kStep);
  EXPECT_EQ(release_memory(), 7 * kMiB);
  EXPECT_EQ(release_memory(), 0);
}

TEST_F(ResultPool, LayersKeepTheTwoLargestBlocks) {
  {
    const at::Tensor a = result(2, Lifetime::kLayer), b = result(1, Lifetime::kLayer), c = result(3, Lifetime::kLayer);
  }
  EXPECT_EQ(release_memory(), 5 * kMiB);
}

TEST_F(ResultPool, StepsEvictTheOldestBlocks) {
  std::vector<at::Tensor> results;
  results.reserve(5);
  for (int i = 0; i < 5; ++i) results.push_back(result(64, Lifetime::kStep));
  const void* const first = results.front().const_data_ptr();
  for (at::Tensor& y : results) y.reset();
  for (at::Tensor& y : results) {
    y = result(64, Lifetime::kStep);
    EXPECT_TRUE(y.const_data_ptr() != first || &y == &results.back());  // if at all, it comes from the system again
  }
  for (at::Tensor& y : results) y.reset();
  EXPECT_EQ(release_memory(), 256 * kMiB);
}

TEST_F(ResultPool, SmallAndHugeResultsAreNotKept) {
  pooled_like(at::empty({1000}), Lifetime::kLayer);
  freed(257, Lifetime::kLayer);
  EXPECT_EQ(release_memory(), 0);
}

TEST_F(ResultPool, NorAreThoseOfTensorsWithGaps) {
  pooled_like(at::empty({1024, 2048}).narrow(1, 0, 1024), Lifetime::kStep);
  EXPECT_EQ(release_memory(), 0);
}

TEST_F(ResultPool, ThreadsMayTakeAndFreeAtOnce) {
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < 200; ++i) {
        const at::Tensor y = result(1 + i % 3, i % 2 ? Lifetime::kLayer : Lifetime::kStep);
        y.view(-1)[0].fill_(t);
        EXPECT_EQ(y.view(-1)[0].item<int>(), t);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(release_memory(), (2 * 3 + 256) * kMiB);
}

}  // namespace
