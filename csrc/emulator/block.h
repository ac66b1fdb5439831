// What the emulator's files share: a worker runs one block at a time, a block is threads in warps, a thread is a fiber.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/machine.h"
#include "emulator/ptx.h"
#include "emulator/race.h"

namespace flashx::emulator {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kBarriers = 16;
constexpr int kMaxThreads = 1024;

class Worker;
struct Warp;

// Instructions that a warp executes together.
enum class WarpOp : uint8_t {
  None,
  Shuffle,
  ShuffleFrom,
  Ballot,
  ReduceMin,
  ReduceMax,
  LdMatrix,
  LdMatrixTrans,
  MmaHalf,
  MmaBFloat16,
  MmaTf32,
  Sync
};

struct Copy {
  uint32_t offset;  // in shared memory
  int bytes;
  const void* from;
  int64_t group;
};

struct alignas(64) Thread {
  Thread(size_t stack_bytes, int thread_index)
      : fiber(stack_bytes, static_cast<size_t>(thread_index) % kLanes * 64),
        index(thread_index),
        lane(thread_index % kLanes) {}

  Fiber fiber;
  const int index, lane;
  Warp* warp = nullptr;
  Worker* worker = nullptr;

  // cp.async: copies not landed yet, oldest first from `next_copy` on, and commits so far.
  std::vector<Copy> copies;
  size_t next_copy = 0;
  int64_t groups = 0;
};

// A lane's, of the warp instruction that it waits at.
struct Arguments {
  float* d;
  const uint32_t *a, *b;
  uint32_t* out;
  uint32_t address;
  float value;
  int mask;       // of a shuffle: the other lane, or how it differs
  uint32_t word;  // of a vote, a reduction or a shuffle: the lane's, then what it gets
};

struct Warp {
  int index;
  uint32_t runnable;  // lanes, the running one among them
  uint32_t arrived;   // lanes at the warp instruction
  uint32_t exited;
  WarpOp op;
  Arguments lanes[kLanes];
};

struct Barrier {
  int expected = 0, arrived = 0;
  bool reduce = false, any = false, result = false;
  uint32_t lanes[kMaxThreads / kLanes] = {};  // arrived, of each warp
};

struct Counters {
  int64_t launches = 0, blocks = 0, mma = 0, ldmatrix = 0, ldmatrix_conflicts = 0, cp_async = 0, barriers = 0;
};

// Global memory as one launch sees it.
class Memory {
 public:
  explicit Memory(const std::vector<Buffer>& buffers);
  struct Span {
    uintptr_t begin;
    uint64_t bytes;
    bool writable;
  };
  const std::vector<Span>& spans() const { return spans_; }
  bool overlap() const { return overlap_; }
  // "it ends 3 bytes past key (64 bytes at 0x...)", or why else no buffer allows the access.
  std::string nearest(uintptr_t address, int bytes, bool write) const;

 private:
  const std::vector<Buffer>& buffers_;
  std::vector<Span> spans_;
  bool overlap_ = false;
};

// One launch, as its workers see it.
struct Run {
  const Launch& launch;
  const std::function<void()>& body;
  const Memory memory;
  const Completion completion;
  const bool check_races;
};

// Runs blocks, one after the other, on the OS thread that calls it.
class Worker {
 public:
  Worker() = default;
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void start(const Run& run);
  // Runs one block; returns the fault's message, or "".
  std::string run_block(int64_t block);

  struct Bytes {
    int64_t read, written;
  };
  const std::vector<Bytes>& bytes() const { return bytes_; }
  const Counters& counters() const { return counters_; }

  // What the running fiber calls.
  int block(int axis) const { return block_[axis]; }
  void* global(const void* address, int bytes, bool write, const char* instruction);
  char* shared(uint32_t address, int bytes, const char* instruction);
  void arrive(WarpOp op);
  bool barrier(int id, int threads, bool reduce, bool value);
  int threads() const { return run_->launch.threads; }
  Race* race() { return run_->check_races ? &race_ : nullptr; }
  void issue(const Copy& copy);
  void land(int groups);

  // "kernel: block (1, 0, 0)", with ", thread 37 (warp 1, lane 5)"
  std::string place() const;
  std::string place(const Thread& thread) const;

 private:
  static void entry();
  void execute(Warp& warp, WarpOp op);
  void execute_ldmatrix(Warp& warp, bool transposed);
  [[noreturn]] void leave(Thread& thread);
  void yield();
  void to_scheduler();
  void release(int id);
  void check_exit(const Thread& thread) const;
  std::string stuck(const Warp& warp) const;
  std::string deadlock() const;

  static constexpr size_t kStackBytes = 128 * 1024;

  const Run* run_ = nullptr;
  int block_[3] = {};
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  Barrier barriers_[kBarriers];
  Fiber scheduler_;
  int exited_ = 0;
  std::string failure_;
  std::unique_ptr<char, void (*)(void*)> shared_{nullptr, std::free};
  int shared_capacity_ = 0;
  Race race_;
  size_t last_span_ = 0;
  std::vector<Bytes> bytes_;
  Counters counters_;
};

// The thread whose fiber runs on this OS thread; a fiber stays on the one that it began on. Read for every instruction,
// so at a fixed offset rather than by the call that a shared library makes (10 % of the time).
extern __attribute__((tls_model("initial-exec"))) __thread Thread* running;

// Throws Fault: the running thread's place, then `what`.
[[noreturn]] void fault(const std::string& what);

std::string hex(uint64_t value);
// "lanes 0-3, 7"
std::string lanes_of(uint32_t mask);
const char* name_of(WarpOp op);

// d += a b for the fragments of a warp's 32 lanes.
void multiply(MmaType type, const Arguments (&lanes)[kLanes]);

}  // namespace flashx::emulator
