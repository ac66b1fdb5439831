// Fibers: threads of control that share an OS thread and change places only where they say so.
#pragma once

#include <cstddef>

#if defined(__x86_64__)
// The registers that System V functions preserve go to the stack, and the stack changes. The control words (MXCSR, x87)
// are the same for all fibers.
extern "C" void flashx_fiber_switch(void** save, void* load);
#else
#include <ucontext.h>
#endif

namespace flashx::emulator {

class Fiber {
 public:
  // The OS thread's own stack, to come back to.
  Fiber() = default;
  // A stack of this size behind a guard page, its first frame `skew` bytes below the top: with the same skew for all,
  // their frames would fall into the same few sets of the CPU's caches (10 % slower).
  Fiber(size_t stack_bytes, size_t skew);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch here calls `entry`, which must not return. Frames left on the stack are forgotten, not unwound.
  void reset(void (*entry)());

  // Leaves `from`, which is running, for `to`; returns when someone switches to `from`.
  static void switch_to(Fiber& from, Fiber& to) {
#if defined(__x86_64__)
    flashx_fiber_switch(&from.pointer_, to.pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
  }

 private:
  void* stack_ = nullptr;
  size_t bytes_ = 0, skew_ = 0;
#if defined(__x86_64__)
  void* pointer_ = nullptr;  // the stack pointer while not running
#else
  ucontext_t context_;
#endif
};

}  // namespace flashx::emulator
