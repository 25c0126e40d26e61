#include "cpu/result_pool.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/parallel.h"

namespace amct_ext::cpu {
namespace {

constexpr size_t kSmallest = size_t{1} << 18;  // below, the allocator of the system keeps memory by itself
constexpr size_t kLargest = size_t{1} << 28;   // above, too much would lie idle

// What is kept, and which block serves a request.
struct Policy {
  bool exact;          // a block serves its own size alone, and the oldest makes room; else any that is large enough
                       // serves, and the smallest makes room, of equal ones the oldest
  size_t most_blocks;  // that lie idle
  size_t most_bytes;
};

// Activations: a layer's quantised input and a gradient beside it. Weights: those of all layers and their gradients.
constexpr Policy kPolicies[] = {{false, 2, 2 * kLargest}, {true, kLargest / kSmallest, kLargest}};

class Keeper;

struct Block {
  c10::DataPtr memory;
  size_t size = 0;
  Keeper* keeper = nullptr;
};

// Memory that lies idle. A lock that another thread holds counts as nothing found and no room, so that nobody waits,
// not even a process forked while it was held.
class Keeper final : public c10::Allocator {
 public:
  explicit Keeper(const Policy& policy) : policy_(policy) { idle_.reserve(policy.most_blocks + 1); }

  c10::DataPtr allocate(size_t size) override {
    std::unique_ptr<Block> block = take(size);
    if (block == nullptr) block.reset(new Block{c10::GetCPUAllocator()->allocate(size), size, this});
    void* data = block->memory.get();
    return {data, block.release(), &let_go, at::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // data and context are not the same pointer
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

  size_t release() {
    std::vector<Entry> all;
    if (const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); lock) {
      all.assign(idle_.begin(), idle_.end());  // the room reserved stays
      idle_.clear();
      bytes_ = 0;
    }
    size_t bytes = 0;
    for (const Entry& entry : all) {
      bytes += entry.size;
      delete entry.block;
    }
    return bytes;
  }

 private:
  struct Entry {
    size_t size;
    Block* block;
  };

  static void let_go(void* context) {
    Block* block = static_cast<Block*>(context);
    block->keeper->keep(std::unique_ptr<Block>(block));
  }

  // The one let go last of those that serve: it is most likely still in the cache.
  std::unique_ptr<Block> take(size_t size) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const auto found = std::find_if(idle_.rbegin(), idle_.rend(), [&](const Entry& entry) {
      return policy_.exact ? entry.size == size : entry.size >= size;
    });
    return found == idle_.rend() ? nullptr : removed(std::prev(found.base()));
  }

  void keep(std::unique_ptr<Block> block) {
    if (block->size < kSmallest || block->size > kLargest) return;  // a result that was resized
    // What has to make room goes back to the system here, without the lock.
    for (block = exchanged(std::move(block)); block; block = exchanged(nullptr)) {
    }
  }

  // Keeps a block, if any. Returns one that has to make room, or nullptr.
  std::unique_ptr<Block> exchanged(std::unique_ptr<Block> block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return block;
    if (block) {
      bytes_ += block->size;
      idle_.push_back({block->size, block.get()});
      block.release();
    }
    if (idle_.size() <= policy_.most_blocks && bytes_ <= policy_.most_bytes) return nullptr;
    if (policy_.exact) return removed(idle_.begin());
    return removed(
        std::min_element(idle_.begin(), idle_.end(), [](const Entry& a, const Entry& b) { return a.size < b.size; }));
  }

  std::unique_ptr<Block> removed(std::vector<Entry>::iterator entry) {
    std::unique_ptr<Block> block(entry->block);
    bytes_ -= entry->size;
    idle_.erase(entry);
    return block;
  }

  const Policy policy_;
  std::mutex mutex_;
  std::vector<Entry> idle_;  // the oldest first
  size_t bytes_ = 0;
};

// Never destroyed: tensors may outlive what is destroyed at exit.
Keeper& keeper(Life life) {
  static Keeper* const keepers[] = {new Keeper(kPolicies[0]), new Keeper(kPolicies[1])};
  return *keepers[static_cast<int>(life)];
}

}  // namespace

at::Tensor reused_like(const at::Tensor& x, Life life, std::optional<at::ScalarType> type) {
  const at::ScalarType element = type.value_or(x.scalar_type());
  const size_t size = x.numel() * c10::elementSize(element);
  if (size < kSmallest || size > kLargest || !x.is_non_overlapping_and_dense()) return result_like(x, element);
  return at::Tensor(at::detail::empty_strided_generic(x.sizes(), x.strides(), &keeper(life),
                                                      c10::DispatchKeySet(c10::DispatchKey::CPU), element));
}

size_t release_memory() { return keeper(Life::kLayer).release() + keeper(Life::kStep).release(); }

}  // namespace amct_ext::cpu
