#include "cpu/reuse.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <array>
#include <mutex>

#include "cpu/tensors.h"

namespace amct_ext::cpu {
namespace {

constexpr size_t kSmallest = size_t{1} << 18;  // below, the allocator of the system keeps memory by itself
constexpr size_t kLargest = size_t{1} << 28;   // above, too much would lie idle
constexpr size_t kKept = 2;                    // a layer's quantised input, and a gradient beside it

struct Block {
  c10::DataPtr memory;
  size_t size = 0;
};

// Blocks that lie idle, the one let go last in front: it is most likely still in the cache.
class Idle {
 public:
  // A block of at least `size` bytes, or nullptr.
  Block* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found =
        std::find_if(blocks_.begin(), blocks_.end(), [&](const Block* b) { return b && b->size >= size; });
    if (found == blocks_.end()) return nullptr;
    Block* block = *found;
    std::move(found + 1, blocks_.end(), found);
    blocks_.back() = nullptr;
    return block;
  }

  // Keeps the block. Returns the one that has to make room, or nullptr: the smallest, of equal ones the oldest.
  Block* keep(Block* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto size = [](const Block* b) { return b ? b->size : 0; };
    auto leaves = blocks_.begin();
    for (auto it = leaves; it != blocks_.end(); ++it) {
      if (size(*it) <= size(*leaves)) leaves = it;
    }
    if (size(*leaves) > block->size) return block;
    std::rotate(blocks_.begin(), leaves, leaves + 1);
    std::swap(blocks_.front(), block);
    return block;
  }

 private:
  std::mutex mutex_;
  std::array<Block*, kKept> blocks_{};
};

Idle& idle() {
  static Idle* const blocks = new Idle;  // never destroyed: tensors may outlive what is destroyed at exit
  return *blocks;
}

void let_go(void* context) { delete idle().keep(static_cast<Block*>(context)); }

class Reusing final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    Block* block = idle().take(size);
    if (block == nullptr) block = new Block{c10::GetCPUAllocator()->allocate(size), size};
    return {block->memory.get(), block, &let_go, at::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // data and context are not the same pointer
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

Reusing* reusing() {
  static Reusing* const allocator = new Reusing;  // storages refer to it as long as they live
  return allocator;
}

}  // namespace

at::Tensor reused_like(const at::Tensor& x) {
  const size_t size = x.numel() * x.element_size();
  if (size < kSmallest || size > kLargest || !x.is_non_overlapping_and_dense()) return result_like(x);
  return at::Tensor(at::detail::empty_strided_generic(x.sizes(), x.strides(), reusing(),
                                                      c10::DispatchKeySet(c10::DispatchKey::CPU), x.scalar_type()));
}

}  // namespace amct_ext::cpu
