#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl flashx_fiber_switch
.hidden flashx_fiber_switch
.type flashx_fiber_switch, @function
flashx_fiber_switch:
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
.size flashx_fiber_switch, .-flashx_fiber_switch
)");
#endif

namespace flashx::emulator {

Fiber::Fiber(size_t stack_bytes, size_t skew) : skew_(skew) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  bytes_ = (stack_bytes + page - 1) / page * page + page;
  void* stack = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  stack_ = stack;
  mprotect(stack_, page, PROT_NONE);
}

Fiber::~Fiber() {
  if (stack_) munmap(stack_, bytes_);
}

#if defined(__x86_64__)

void Fiber::reset(void (*entry)()) {
  // As if `entry` had just been called: its return address (none) lies at a multiple of 16 minus 8.
  char* top = static_cast<char*>(stack_) + bytes_ - skew_ / 16 * 16;
  void* frame[8] = {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, reinterpret_cast<void*>(entry), nullptr};
  pointer_ = top - sizeof(frame);
  std::memcpy(pointer_, frame, sizeof(frame));
}

#else

void Fiber::reset(void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = bytes_ - skew_ / 16 * 16;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

#endif

}  // namespace flashx::emulator
