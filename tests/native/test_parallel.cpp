// How tensors are cut into blocks, beyond 2^31 elements too: index arithmetic needs no memory.
#include <ATen/ATen.h>
#include <cpu/parallel.h>

#include <atomic>
#include <cstdio>

namespace {

using amct_ext::cpu::kBlock;

int failures = 0;

void expect(bool condition, const char* what) {
  if (!condition) {
    std::printf("FAILED: %s\n", what);
    ++failures;
  }
}

// Blocks reach the end, every element is in one of them, and none is larger than a block.
void test_blocks(int64_t n) {
  std::atomic<int64_t> covered{0}, last{0}, largest{0};
  amct_ext::cpu::for_blocks(n, [&](int64_t block, int64_t begin, int64_t end) {
    expect(begin == block * kBlock, "blocks begin where they should");
    covered += end - begin;
    last = std::max<int64_t>(last, end);
    largest = std::max<int64_t>(largest, end - begin);
  });
  expect(covered == n && last == n && largest <= kBlock, "blocks of a plain range");
}

// A tensor without memory of its own for every element: `rows` views of one row, `step` elements apart.
void test_walk(int64_t rows, int64_t size, int64_t step) {
  const amct_ext::cpu::Walk walk({rows, size}, {step, 1}, {size, 1});
  expect(walk.count * walk.length == rows * size, "a walk has all elements");
  std::atomic<int64_t> covered{0}, furthest{0}, written{0};
  std::atomic<bool> right{true};
  amct_ext::cpu::for_walk(walk, [&](int64_t block, int64_t from, int64_t to, int64_t n) {
    right = right && block < walk.blocks() && n <= kBlock && from == to / size * step + to % size;
    covered += n;
    furthest = std::max<int64_t>(furthest, from + n);
    written = std::max<int64_t>(written, to + n);
  });
  expect(right, "pieces of a walk are read where they lie");
  expect(covered == rows * size && written == rows * size, "a walk covers all elements");
  expect(furthest == (rows - 1) * step + size, "a walk ends where the tensor does");
}

void test_runs() {
  const at::Tensor x = at::empty({1}).expand({int64_t{1} << 20, 3, 1 << 12});
  const at::Tensor huge = at::empty(x.sizes(), x.options().device(at::kMeta));
  const amct_ext::AxisView view = amct_ext::axis_view(huge, 1);
  expect(view.outer == int64_t{1} << 20 && view.size == 3 && view.inner == 1 << 12, "view along an axis");
  expect(view.outer * view.size * view.inner == huge.numel(), "view have all elements");
}

}  // namespace

int main() {
  for (int64_t n : {int64_t{0}, int64_t{1}, kBlock, kBlock + 1, (int64_t{1} << 33) + 5}) test_blocks(n);
  test_walk(5, 300, 301);
  test_walk(3, 5 * kBlock + 3, 6 * kBlock);
  test_walk((int64_t{1} << 18) + 1, kBlock, kBlock + 64);
  test_walk(2, (int64_t{1} << 32) + 7, int64_t{1} << 33);
  test_walk((int64_t{1} << 22) + 3, 1 << 10, 1 << 11);
  test_runs();
  std::printf(failures ? "%d failed\n" : "all passed\n", failures);
  return failures != 0;
}
