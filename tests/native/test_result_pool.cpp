// The memory of large results that are freed: which request takes it over, how much of it may lie idle.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "cpu/result_pool.h"

namespace {

using amct_ext::cpu::Life;
using amct_ext::cpu::release_memory;
using amct_ext::cpu::reused_like;

constexpr int64_t kMiB = int64_t{1} << 20;

// A result of so many MiB.
at::Tensor result(int64_t size, Life life) { return reused_like(at::empty({size * kMiB}, at::kByte), life); }

// What a result of so many MiB leaves when it is freed: its address.
const void* freed(int64_t size, Life life) { return result(size, life).const_data_ptr(); }

class ResultPool : public testing::Test {
 protected:
  void SetUp() override { release_memory(); }
  void TearDown() override { release_memory(); }
};

TEST_F(ResultPool, HasTheLayoutOfItsModel) {
  const at::Tensor x = at::empty({8, 64, 32, 32}).contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor y = reused_like(x, Life::kLayer, at::kHalf);
  EXPECT_EQ(y.sizes(), x.sizes());
  EXPECT_EQ(y.strides(), x.strides());
  EXPECT_EQ(y.scalar_type(), at::kHalf);
  EXPECT_FALSE(y.is_alias_of(x));
}

TEST_F(ResultPool, ALayerTakesAnyBlockThatIsLargeEnough) {
  const void* const block = freed(4, Life::kLayer);
  EXPECT_EQ(result(3, Life::kLayer).const_data_ptr(), block);
  EXPECT_NE(result(5, Life::kLayer).const_data_ptr(), block);
}

TEST_F(ResultPool, AStepTakesABlockOfItsOwnSize) {
  const void* const block = freed(4, Life::kStep);
  EXPECT_NE(result(3, Life::kStep).const_data_ptr(), block);
  EXPECT_EQ(result(4, Life::kStep).const_data_ptr(), block);
}

TEST_F(ResultPool, LivesDoNotShareBlocks) {
  freed(4, Life::kStep);
  const at::Tensor y = result(4, Life::kLayer);
  EXPECT_EQ(release_memory(), 4 * kMiB);  // that of the step lies idle still
}

TEST_F(ResultPool, TheBlockFreedLastIsTakenFirst) {
  at::Tensor a = result(4, Life::kStep), b = result(4, Life::kStep);
  const void* const block = a.const_data_ptr();
  b.reset();
  a.reset();
  EXPECT_EQ(result(4, Life::kStep).const_data_ptr(), block);
}

TEST_F(ResultPool, ReleaseGivesBackWhatLiesIdle) {
  const at::Tensor used = result(2, Life::kLayer);
  freed(3, Life::kLayer);
  freed(4, Life::kStep);
  EXPECT_EQ(release_memory(), 7 * kMiB);
  EXPECT_EQ(release_memory(), 0);
}

TEST_F(ResultPool, OfLayersTwoBlocksLieIdleTheLargest) {
  {
    const at::Tensor a = result(2, Life::kLayer), b = result(1, Life::kLayer), c = result(3, Life::kLayer);
  }
  EXPECT_EQ(release_memory(), 5 * kMiB);
}

TEST_F(ResultPool, OfAStepTheOldestBlocksMakeRoom) {
  std::vector<at::Tensor> results;
  for (int i = 0; i < 5; ++i) results.push_back(result(64, Life::kStep));
  const void* const first = results.front().const_data_ptr();
  for (at::Tensor& y : results) y.reset();
  for (at::Tensor& y : results) {
    y = result(64, Life::kStep);
    EXPECT_TRUE(y.const_data_ptr() != first || &y == &results.back());  // if at all, it comes from the system again
  }
  for (at::Tensor& y : results) y.reset();
  EXPECT_EQ(release_memory(), 256 * kMiB);
}

TEST_F(ResultPool, SmallAndHugeResultsAreNotKept) {
  reused_like(at::empty({1000}), Life::kLayer);
  freed(257, Life::kLayer);
  EXPECT_EQ(release_memory(), 0);
}

TEST_F(ResultPool, NorAreThoseOfTensorsWithGaps) {
  reused_like(at::empty({1024, 2048}).narrow(1, 0, 1024), Life::kStep);
  EXPECT_EQ(release_memory(), 0);
}

TEST_F(ResultPool, ThreadsMayTakeAndFreeAtOnce) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < 200; ++i) {
        const at::Tensor y = result(1 + i % 3, i % 2 ? Life::kLayer : Life::kStep);
        y.view(-1)[0].fill_(t);
        EXPECT_EQ(y.view(-1)[0].item<int>(), t);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(release_memory(), (2 * 3 + 256) * kMiB);
}

}  // namespace
