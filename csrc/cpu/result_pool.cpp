#include "cpu/result_pool.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/tensor_access.h"

namespace amct_ext::cpu {
namespace {

constexpr size_t kSmallest = size_t{1} << 18;  // below, the allocator of the system reuses memory itself
constexpr size_t kLargest = size_t{1} << 28;   // above, too much would lie idle

// Which idle block serves a request, and how much may be idle.
struct Policy {
  bool exact;  // a block serves only its own size, and the oldest is evicted; else any that is large enough serves, and
               // the smallest is evicted, of equal ones the oldest
  size_t max_blocks;  // idle
  size_t max_bytes;
};

// Activations: a layer's quantised input and a gradient beside it. Weights: those of all layers and their gradients.
constexpr Policy kPolicies[] = {{false, 2, 2 * kLargest}, {true, kLargest / kSmallest, kLargest}};

class Pool;

struct Block {
  c10::DataPtr memory;
  size_t size = 0;
  Pool* pool = nullptr;
};

// The list of idle blocks uses try_lock. On contention allocation falls through to torch's allocator and a freed block
// goes back to the system, so no thread waits, nor does a process that was forked while the lock was held.
class Pool final : public c10::Allocator {
 public:
  explicit Pool(const Policy& policy) : policy_(policy) { idle_.reserve(policy.max_blocks + 1); }

  c10::DataPtr allocate(size_t size) override {
    std::unique_ptr<Block> block = take(size);
    if (block == nullptr) block = std::make_unique<Block>(Block{c10::GetCPUAllocator()->allocate(size), size, this});
    void* data = block->memory.get();
    return {data, block.release(), &free_block, at::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // data and context are not the same pointer
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

  size_t release() {
    std::vector<Entry> all;
    if (const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); lock) {
      all.assign(idle_.begin(), idle_.end());  // the reserved capacity stays
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

  static void free_block(void* context) {
    Block* block = static_cast<Block*>(context);
    block->pool->put(std::unique_ptr<Block>(block));
  }

  // The block freed last of those that serve: it is most likely still in the cache.
  std::unique_ptr<Block> take(size_t size) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const auto found = std::find_if(idle_.rbegin(), idle_.rend(), [&](const Entry& entry) {
      return policy_.exact ? entry.size == size : entry.size >= size;
    });
    return found == idle_.rend() ? nullptr : remove(std::prev(found.base()));
  }

  void put(std::unique_ptr<Block> block) {
    if (block->size < kSmallest || block->size > kLargest) return;  // a result that was resized
    // Evicted blocks are freed here, without the lock.
    for (block = put_and_evict(std::move(block)); block; block = put_and_evict(nullptr)) {
    }
  }

  // Adds a block, if any. Returns one that is evicted, or nullptr.
  std::unique_ptr<Block> put_and_evict(std::unique_ptr<Block> block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return block;
    if (block) {
      bytes_ += block->size;
      const size_t size = block->size;
      idle_.push_back({size, block.release()});
    }
    if (idle_.size() <= policy_.max_blocks && bytes_ <= policy_.max_bytes) return nullptr;
    if (policy_.exact) return remove(idle_.begin());
    return remove(
        std::min_element(idle_.begin(), idle_.end(), [](const Entry& a, const Entry& b) { return a.size < b.size; }));
  }

  std::unique_ptr<Block> remove(std::vector<Entry>::iterator entry) {
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
Pool& pool_of(Lifetime lifetime) {
  static Pool* const pools[] = {new Pool(kPolicies[0]), new Pool(kPolicies[1])};
  return *pools[static_cast<int>(lifetime)];
}

}  // namespace

at::Tensor pooled_like(const at::Tensor& x, Lifetime lifetime, std::optional<at::ScalarType> type) {
  const at::ScalarType element = type.value_or(x.scalar_type());
  const size_t size = x.numel() * c10::elementSize(element);
  if (size < kSmallest || size > kLargest || !x.is_non_overlapping_and_dense()) return result_like(x, element);
  return at::Tensor(at::detail::empty_strided_generic(x.sizes(), x.strides(), &pool_of(lifetime),
                                                      c10::DispatchKeySet(c10::DispatchKey::CPU), element));
}

size_t release_memory() { return pool_of(Lifetime::kLayer).release() + pool_of(Lifetime::kStep).release(); }

}  // namespace amct_ext::cpu
