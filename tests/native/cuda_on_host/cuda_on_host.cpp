#include "cuda_on_host.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(AMCT_FIND_RACES)
#include <sanitizer/tsan_interface.h>
#endif

Index threadIdx, blockIdx, blockDim, gridDim;

#if defined(__x86_64__)
// Pushes the callee-saved registers, stores the stack pointer in *from and continues on the stack `to`.
extern "C" void amct_switch_stack(void** from, void* to);
asm(R"(
.text
.type amct_switch_stack, @function
amct_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size amct_switch_stack, .-amct_switch_stack
)");
#endif

namespace amct_ext::on_host {
namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kLanes = 32;

enum class State { kReady, kAtBarrier, kInShuffle, kDone };

// Tells ThreadSanitizer that fibers are threads which run at the same time, ordered only by barriers and shuffles.
// Without it (AMCT_FIND_RACES) all of this is empty.
class TsanFiber {
 public:
#if defined(AMCT_FIND_RACES)
  TsanFiber() : fiber_(__tsan_create_fiber(0)) {}
  ~TsanFiber() { __tsan_destroy_fiber(fiber_); }
  void enter() { __tsan_switch_to_fiber(fiber_, __tsan_switch_to_fiber_no_sync); }
  static void* current() { return __tsan_get_current_fiber(); }
  static void leave(void* to) { __tsan_switch_to_fiber(to, __tsan_switch_to_fiber_no_sync); }
  static void release(void* at) { __tsan_release(at); }
  static void acquire(void* at) { __tsan_acquire(at); }

 private:
  void* fiber_;
#else
  void enter() {}
  static void* current() { return nullptr; }
  static void leave(void*) {}
  static void release(void*) {}
  static void acquire(void*) {}
#endif
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kDone;
  int shuffles = 0;
  TsanFiber tsan;
#if defined(__x86_64__)
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif
};

struct Warp {
  uint64_t words[2][kLanes];
  int arrived = 0;
};

class Device {
 public:
  void run(int64_t blocks, int threads, const std::function<void()>& kernel) {
    const std::lock_guard lock(mutex_);
    kernel_ = &kernel;
    while (static_cast<int>(fibers_.size()) < threads) fibers_.push_back(std::make_unique<Fiber>());
    gridDim.x = static_cast<unsigned>(blocks);
    blockDim.x = static_cast<unsigned>(threads);
    threads_ = threads;
    warps_.assign((threads + kLanes - 1) / kLanes, {});
    thread_order_.resize(threads);
    std::iota(thread_order_.begin(), thread_order_.end(), 0);
    std::vector<int64_t> block_order(blocks);
    std::iota(block_order.begin(), block_order.end(), int64_t{0});
    std::shuffle(block_order.begin(), block_order.end(), random_);
    scheduler_ = TsanFiber::current();
    TsanFiber::release(this);
    for (int64_t block : block_order) run_block(block);
    TsanFiber::acquire(this);
  }

  void declare_shared(void* memory, size_t bytes) {
    if (std::find(shared_.begin(), shared_.end(), memory) != shared_.end()) return;
    shared_.push_back(memory);
    // A loop, because ThreadSanitizer would count a memset as an access by this thread.
    for (size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(memory)[i] = static_cast<char>(0xff);
  }

  void sync_threads() {
    TsanFiber::release(&barrier_);
    fibers_[current_]->state = State::kAtBarrier;
    ++arrived_;
    release_barrier();
    suspend();
    TsanFiber::acquire(&barrier_);
  }

  uint64_t shuffle(uint64_t word, int from) {
    Fiber& fiber = *fibers_[current_];
    Warp& warp = warps_[current_ / kLanes];
    // Two buffers in turn: a lane writes to one again only after all lanes have read the other.
    uint64_t* words = warp.words[fiber.shuffles++ % 2];
    words[current_ % kLanes] = word;
    TsanFiber::release(&warp);
    fiber.state = State::kInShuffle;
    if (++warp.arrived == kLanes) {
      warp.arrived = 0;
      const int first = current_ / kLanes * kLanes;
      for (int i = first; i < first + kLanes; ++i) fibers_[i]->state = State::kReady;
    }
    suspend();
    TsanFiber::acquire(&warp);
    return words[from];
  }

  void run_thread() {
    TsanFiber::acquire(this);
    (*kernel_)();
    TsanFiber::release(this);
    fibers_[current_]->state = State::kDone;
    ++done_;
    release_barrier();
    switch_to_scheduler();
  }

 private:
  void run_block(int64_t block) {
    blockIdx.x = static_cast<unsigned>(block);
    shared_.clear();
    done_ = arrived_ = 0;
    for (Warp& warp : warps_) warp.arrived = 0;
    std::shuffle(thread_order_.begin(), thread_order_.end(), random_);
    for (int i = 0; i < threads_; ++i) start(*fibers_[i]);
    while (done_ < threads_) {
      bool ran = false;
      for (int i : thread_order_) {
        if (fibers_[i]->state != State::kReady) continue;
        ran = true;
        switch_to(i);
      }
      if (!ran) {
        throw std::runtime_error("block " + std::to_string(block) + ": of " + std::to_string(threads_) + " threads " +
                                 std::to_string(done_) + " are done, " + std::to_string(arrived_) +
                                 " at a barrier, the others in a shuffle that not all lanes take part in");
      }
    }
  }

  // As on a GPU, a thread that has returned does not hold up a barrier.
  void release_barrier() {
    if (arrived_ == 0 || arrived_ + done_ < threads_) return;
    arrived_ = 0;
    for (int i = 0; i < threads_; ++i) {
      if (fibers_[i]->state == State::kAtBarrier) fibers_[i]->state = State::kReady;
    }
  }

  void suspend() {
    switch_to_scheduler();
    threadIdx.x = static_cast<unsigned>(current_);
  }

#if defined(__x86_64__)
  void start(Fiber& fiber);
  void switch_to(int i) {
    current_ = i;
    threadIdx.x = static_cast<unsigned>(i);
    fibers_[i]->tsan.enter();
    amct_switch_stack(&main_, fibers_[i]->pointer);
  }
  void switch_to_scheduler() {
    TsanFiber::leave(scheduler_);
    amct_switch_stack(&fibers_[current_]->pointer, main_);
  }
  void* main_ = nullptr;
#else
  void start(Fiber& fiber);
  void switch_to(int i) {
    current_ = i;
    threadIdx.x = static_cast<unsigned>(i);
    fibers_[i]->tsan.enter();
    swapcontext(&main_, &fibers_[i]->context);
  }
  void switch_to_scheduler() {
    TsanFiber::leave(scheduler_);
    swapcontext(&fibers_[current_]->context, &main_);
  }
  ucontext_t main_;
#endif

  std::mutex mutex_;
  std::mt19937 random_{1};
  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> thread_order_;
  std::vector<void*> shared_;
  int threads_ = 0, current_ = 0, done_ = 0, arrived_ = 0;
  char barrier_ = 0;
  void* scheduler_ = nullptr;
};

Device& device() {
  static Device instance;
  return instance;
}

// The entry of every fiber. It never returns: the scheduler does not resume a fiber that is done.
void fiber_main() { device().run_thread(); }

void Device::start(Fiber& fiber) {
  fiber.state = State::kReady;
  fiber.shuffles = 0;
#if defined(__x86_64__)
  // What amct_switch_stack pops: six registers, then its return address, with the stack aligned as at a function entry.
  const uintptr_t top = (reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStack) & ~uintptr_t{15};
  void** stack = reinterpret_cast<void**>(top) - 2;
  *stack = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  fiber.pointer = stack;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

}  // namespace

void run(int64_t blocks, int threads, const std::function<void()>& kernel) { device().run(blocks, threads, kernel); }
void declare_shared(void* memory, size_t bytes) { device().declare_shared(memory, bytes); }
void sync_threads() { device().sync_threads(); }
uint64_t shuffle(uint64_t word, int from) { return device().shuffle(word, from); }

}  // namespace amct_ext::on_host
