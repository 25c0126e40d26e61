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
// Saves the registers that a call keeps on the stack of the caller and goes on where the other stack left off.
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

// A race detector takes fibers for threads that run at the same time; only barriers and shuffles order them.
class Order {
 public:
#if defined(AMCT_FIND_RACES)
  Order() : fiber_(__tsan_create_fiber(0)) {}
  ~Order() { __tsan_destroy_fiber(fiber_); }
  void enter() { __tsan_switch_to_fiber(fiber_, __tsan_switch_to_fiber_no_sync); }
  static void* current() { return __tsan_get_current_fiber(); }
  static void leave(void* to) { __tsan_switch_to_fiber(to, __tsan_switch_to_fiber_no_sync); }
  static void arrive(void* at) { __tsan_release(at); }
  static void depart(void* at) { __tsan_acquire(at); }

 private:
  void* fiber_;
#else
  void enter() {}
  static void* current() { return nullptr; }
  static void leave(void*) {}
  static void arrive(void*) {}
  static void depart(void*) {}
#endif
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kDone;
  int shuffles = 0;
  Order order;
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
    order_.resize(threads);
    std::iota(order_.begin(), order_.end(), 0);
    std::vector<int64_t> sequence(blocks);
    std::iota(sequence.begin(), sequence.end(), int64_t{0});
    std::shuffle(sequence.begin(), sequence.end(), random_);
    home_ = Order::current();
    Order::arrive(this);
    for (int64_t block : sequence) run_block(block);
    Order::depart(this);
  }

  void share(void* memory, size_t bytes) {
    if (std::find(shared_.begin(), shared_.end(), memory) != shared_.end()) return;
    shared_.push_back(memory);
    // By hand: a race detector watches memset, and this is no access of a thread's.
    for (size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(memory)[i] = static_cast<char>(0xff);
  }

  void wait_for_block() {
    Order::arrive(&barrier_);
    fibers_[current_]->state = State::kAtBarrier;
    ++arrived_;
    release_barrier();
    suspend();
    Order::depart(&barrier_);
  }

  uint64_t exchange(uint64_t word, int from) {
    Fiber& fiber = *fibers_[current_];
    Warp& warp = warps_[current_ / kLanes];
    // Two sets in turn: a lane fills a set again only after all have read the one in between.
    uint64_t* words = warp.words[fiber.shuffles++ % 2];
    words[current_ % kLanes] = word;
    Order::arrive(&warp);
    fiber.state = State::kInShuffle;
    if (++warp.arrived == kLanes) {
      warp.arrived = 0;
      const int first = current_ / kLanes * kLanes;
      for (int i = first; i < first + kLanes; ++i) fibers_[i]->state = State::kReady;
    }
    suspend();
    Order::depart(&warp);
    return words[from];
  }

  void body() {
    Order::depart(this);
    (*kernel_)();
    Order::arrive(this);
    fibers_[current_]->state = State::kDone;
    ++done_;
    release_barrier();
    leave();
  }

 private:
  void run_block(int64_t block) {
    blockIdx.x = static_cast<unsigned>(block);
    shared_.clear();
    done_ = arrived_ = 0;
    for (Warp& warp : warps_) warp.arrived = 0;
    std::shuffle(order_.begin(), order_.end(), random_);
    for (int i = 0; i < threads_; ++i) start(*fibers_[i]);
    while (done_ < threads_) {
      bool ran = false;
      for (int i : order_) {
        if (fibers_[i]->state != State::kReady) continue;
        ran = true;
        resume(i);
      }
      if (!ran) {
        throw std::runtime_error("block " + std::to_string(block) + ": of " + std::to_string(threads_) + " threads " +
                                 std::to_string(done_) + " are done, " + std::to_string(arrived_) +
                                 " at a barrier, the others in a shuffle that not all lanes take part in");
      }
    }
  }

  // A thread that has left counts as arrived.
  void release_barrier() {
    if (arrived_ == 0 || arrived_ + done_ < threads_) return;
    arrived_ = 0;
    for (int i = 0; i < threads_; ++i) {
      if (fibers_[i]->state == State::kAtBarrier) fibers_[i]->state = State::kReady;
    }
  }

  void suspend() {
    leave();
    threadIdx.x = static_cast<unsigned>(current_);
  }

#if defined(__x86_64__)
  void start(Fiber& fiber);
  void resume(int i) {
    current_ = i;
    threadIdx.x = static_cast<unsigned>(i);
    fibers_[i]->order.enter();
    amct_switch_stack(&main_, fibers_[i]->pointer);
  }
  void leave() {
    Order::leave(home_);
    amct_switch_stack(&fibers_[current_]->pointer, main_);
  }
  void* main_ = nullptr;
#else
  void start(Fiber& fiber);
  void resume(int i) {
    current_ = i;
    threadIdx.x = static_cast<unsigned>(i);
    fibers_[i]->order.enter();
    swapcontext(&main_, &fibers_[i]->context);
  }
  void leave() {
    Order::leave(home_);
    swapcontext(&fibers_[current_]->context, &main_);
  }
  ucontext_t main_;
#endif

  std::mutex mutex_;
  std::mt19937 random_{1};
  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> order_;
  std::vector<void*> shared_;
  int threads_ = 0, current_ = 0, done_ = 0, arrived_ = 0;
  char barrier_ = 0;
  void* home_ = nullptr;
};

Device& device() {
  static Device instance;
  return instance;
}

// Never returns: the scheduler does not resume a fiber that is done.
void enter() { device().body(); }

void Device::start(Fiber& fiber) {
  fiber.state = State::kReady;
  fiber.shuffles = 0;
#if defined(__x86_64__)
  // The registers that the switch restores, then where it returns to, aligned as at the start of a function.
  const uintptr_t top = (reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStack) & ~uintptr_t{15};
  void** stack = reinterpret_cast<void**>(top) - 2;
  *stack = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  fiber.pointer = stack;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
#endif
}

}  // namespace

void run(int64_t blocks, int threads, const std::function<void()>& kernel) { device().run(blocks, threads, kernel); }
void share(void* memory, size_t bytes) { device().share(memory, bytes); }
void wait_for_block() { device().wait_for_block(); }
uint64_t exchange(uint64_t word, int from) { return device().exchange(word, from); }

}  // namespace amct_ext::on_host
