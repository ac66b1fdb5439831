#include "emulator/machine.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <system_error>
#include <thread>

#include "emulator/block.h"

namespace flashx::emulator {

__attribute__((tls_model("initial-exec"))) __thread Thread* running = nullptr;

// ---- Words

std::string hex(uint64_t value) {
  std::string digits;
  do digits.insert(digits.begin(), "0123456789abcdef"[value % 16]);
  while (value /= 16);
  return "0x" + digits;
}

std::string lanes_of(uint32_t mask) {
  std::string text = (mask & (mask - 1)) == 0 ? "lane " : "lanes ";
  for (int lane = 0; lane < kLanes;) {
    int end = lane;
    while (end < kLanes && mask >> end & 1) ++end;
    if (end > lane) {
      if (text.back() != ' ') text += ", ";
      text += std::to_string(lane);
      if (end - lane > 1) text += "-" + std::to_string(end - 1);
    }
    lane = end + 1;
  }
  return text;
}

const char* name_of(WarpOp op) {
  switch (op) {
    case WarpOp::Shuffle:
      return "shfl.sync.bfly";
    case WarpOp::ShuffleFrom:
      return "shfl.sync.idx";
    case WarpOp::Ballot:
      return "vote.sync.ballot";
    case WarpOp::ReduceMin:
      return "redux.sync.min";
    case WarpOp::ReduceMax:
      return "redux.sync.max";
    case WarpOp::LdMatrix:
      return "ldmatrix";
    case WarpOp::LdMatrixTrans:
      return "ldmatrix.trans";
    case WarpOp::MmaHalf:
      return "mma.f16";
    case WarpOp::MmaBFloat16:
      return "mma.bf16";
    case WarpOp::MmaTf32:
      return "mma.tf32";
    case WarpOp::Sync:
      return "bar.warp.sync";
    case WarpOp::None:
      break;
  }
  return "nothing";
}

static std::string name_of(const Barrier& barrier, int id) {
  return (barrier.reduce ? "barrier.red.or " : "barrier.sync ") + std::to_string(id) + " (" +
         std::to_string(barrier.expected) + " threads)";
}

std::string Worker::place() const {
  return run_->launch.kernel + ": block (" + std::to_string(block_[0]) + ", " + std::to_string(block_[1]) + ", " +
         std::to_string(block_[2]) + ")";
}

std::string Worker::place(const Thread& thread) const {
  return place() + ", thread " + std::to_string(thread.index) + " (warp " + std::to_string(thread.warp->index) +
         ", lane " + std::to_string(thread.lane) + ")";
}

void fault(const std::string& what) { throw Fault(running->worker->place(*running) + ": " + what); }

// What a warp's lanes wait for.
std::string Worker::stuck(const Warp& warp) const {
  std::string text = "warp " + std::to_string(warp.index) + ": ";
  const size_t start = text.size();
  const auto add = [&](uint32_t lanes, const std::string& what) {
    if (lanes == 0) return;
    if (text.size() > start) text += ", ";
    text += lanes_of(lanes) + what;
  };
  add(warp.arrived, std::string(" at ") + name_of(warp.op));
  for (int id = 0; id < kBarriers; ++id) {
    add(barriers_[id].lanes[warp.index], " at " + name_of(barriers_[id], id));
  }
  add(warp.exited, " exited");
  return text;
}

std::string Worker::deadlock() const {
  std::string text = place() + ": deadlock";
  for (const Warp& warp : warps_) text += "; " + stuck(warp);
  return text;
}

// ---- Global memory

Memory::Memory(const std::vector<Buffer>& buffers) : buffers_(buffers) {
  for (const Buffer& b : buffers) {
    const uint64_t bytes = b.data && b.bytes > 0 ? static_cast<uint64_t>(b.bytes) : 0;
    spans_.push_back({reinterpret_cast<uintptr_t>(b.data), bytes, b.writable});
  }
  for (size_t i = 0; i < spans_.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      overlap_ |=
          spans_[i].begin < spans_[j].begin + spans_[j].bytes && spans_[j].begin < spans_[i].begin + spans_[i].bytes;
    }
  }
}

std::string Memory::nearest(uintptr_t address, int bytes, bool write) const {
  const auto distance = [&](const Span& s) -> uint64_t {
    if (address < s.begin) return s.begin - address;
    const uintptr_t end = address + bytes;
    return end > s.begin + s.bytes ? end - (s.begin + s.bytes) : 0;
  };
  const Span* best = nullptr;
  for (const Span& s : spans_) {
    if (s.bytes > 0 && (!best || distance(s) < distance(*best))) best = &s;
  }
  if (!best) return "the launch has no buffers";
  const Buffer& buffer = buffers_[best - spans_.data()];
  const std::string what = buffer.name + " (" + std::to_string(best->bytes) + " bytes at " + hex(best->begin) + ")";
  if (write && !best->writable && distance(*best) == 0) return what + " is read-only";
  const std::string by = std::to_string(distance(*best)) + (distance(*best) == 1 ? " byte " : " bytes ");
  return (address < best->begin ? "it begins " + by + "before " : "it ends " + by + "past ") + what;
}

void* Worker::global(const void* pointer, int bytes, bool write, const char* instruction) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const std::vector<Memory::Span>& spans = run_->memory.spans();
  const auto holds = [&](const Memory::Span& s) {
    return address - s.begin <= s.bytes - bytes && s.bytes >= static_cast<uint64_t>(bytes) && (!write || s.writable);
  };
  size_t span = last_span_;
  if (span >= spans.size() || !holds(spans[span])) {
    for (span = 0; span < spans.size() && !holds(spans[span]);) ++span;
    if (span == spans.size()) {
      fault(std::string(instruction) + " of " + std::to_string(bytes) + " bytes at " + hex(address) + ": " +
            run_->memory.nearest(address, bytes, write));
    }
    // With overlaps the first counts, whatever came before.
    if (!run_->memory.overlap()) last_span_ = span;
  }
  (write ? bytes_[span].written : bytes_[span].read) += bytes;
  return const_cast<void*>(pointer);
}

const void* global_read(const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fault("misaligned ld.global of " + std::to_string(bytes) + " bytes at " +
          hex(reinterpret_cast<uintptr_t>(address)));
  }
  return running->worker->global(address, bytes, false, "ld.global");
}

void* global_write(void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fault("misaligned st.global of " + std::to_string(bytes) + " bytes at " +
          hex(reinterpret_cast<uintptr_t>(address)));
  }
  return running->worker->global(address, bytes, true, "st.global");
}

// ---- Shared memory

char* Worker::shared(uint32_t address, int bytes, const char* instruction) {
  const int64_t size = run_->launch.shared_bytes, offset = static_cast<int64_t>(address) - kSharedBase;
  if (offset < 0 || offset + bytes > size) {
    fault(std::string(instruction) + " of " + std::to_string(bytes) + " bytes at shared address " +
          std::to_string(address) + ", outside the block's [" + std::to_string(kSharedBase) + ", " +
          std::to_string(kSharedBase + size) + ")");
  }
  if (address % bytes != 0) {
    fault(std::string("misaligned ") + instruction + " of " + std::to_string(bytes) + " bytes at shared address " +
          std::to_string(address));
  }
  return shared_.get() + offset;
}

const void* shared_read(uint32_t address, int bytes) {
  Worker& worker = *running->worker;
  const void* p = worker.shared(address, bytes, "ld.shared");
  if (Race* const race = worker.race()) race->access(*running, address - kSharedBase, bytes, Access::Load);
  return p;
}

void* shared_write(uint32_t address, int bytes) {
  Worker& worker = *running->worker;
  void* p = worker.shared(address, bytes, "st.shared");
  if (Race* const race = worker.race()) race->access(*running, address - kSharedBase, bytes, Access::Store);
  return p;
}

// ---- Asynchronous copies

namespace {

void copy(char* shared, const Copy& copy) {
  if (copy.bytes > 0) std::memcpy(shared, copy.from, copy.bytes);
  std::memset(shared + copy.bytes, 0, 16 - copy.bytes);
}

}  // namespace

void Worker::issue(const Copy& c) {
  Thread& thread = *running;
  ++counters_.cp_async;
  if (Race* const race = this->race()) race->issue(thread, c.offset);
  if (run_->completion == Completion::Early) copy(shared_.get() + c.offset, c);
  thread.copies.push_back(c);
}

void Worker::land(int groups) {
  Thread& thread = *running;
  for (; thread.next_copy < thread.copies.size(); ++thread.next_copy) {
    const Copy& c = thread.copies[thread.next_copy];
    if (c.group + groups >= thread.groups) return;
    if (run_->completion == Completion::Late) copy(shared_.get() + c.offset, c);
    if (Race* const race = this->race()) race->land(thread, c.offset);
  }
  thread.copies.clear();
  thread.next_copy = 0;
}

void copy_async(uint32_t address, const void* from, int bytes) {
  Worker& worker = *running->worker;
  worker.shared(address, 16, "cp.async");
  if (bytes < 0 || bytes > 16) fault("cp.async of " + std::to_string(bytes) + " bytes");
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fault("misaligned cp.async from global address " + hex(reinterpret_cast<uintptr_t>(from)));
  }
  if (bytes > 0) worker.global(from, bytes, false, "cp.async");
  worker.issue({address - kSharedBase, bytes, from, running->groups});
}

void copy_commit() { ++running->groups; }
void copy_wait(int groups) { running->worker->land(groups); }

// ---- Warps

int thread_index() { return running->index; }
int block_index(int axis) { return running->worker->block(axis); }

static Arguments& arguments(const Thread& thread) { return thread.warp->lanes[thread.lane]; }

float shuffle(float value, int mask) {
  Arguments& mine = arguments(*running);
  mine.value = value, mine.mask = mask;
  running->worker->arrive(WarpOp::Shuffle);
  return mine.value;
}

uint32_t shuffle_from(uint32_t value, int lane) {
  Arguments& mine = arguments(*running);
  mine.word = value, mine.mask = lane;
  running->worker->arrive(WarpOp::ShuffleFrom);
  return mine.word;
}

static uint32_t vote(WarpOp op, uint32_t word) {
  Arguments& mine = arguments(*running);
  mine.word = word;
  running->worker->arrive(op);
  return mine.word;
}

uint32_t ballot(bool value) { return vote(WarpOp::Ballot, value); }
int reduce_min(int value) { return static_cast<int>(vote(WarpOp::ReduceMin, static_cast<uint32_t>(value))); }
int reduce_max(int value) { return static_cast<int>(vote(WarpOp::ReduceMax, static_cast<uint32_t>(value))); }

void warp_sync() { running->worker->arrive(WarpOp::Sync); }

void ldmatrix(uint32_t* d, uint32_t address, bool transposed) {
  Arguments& mine = arguments(*running);
  mine.out = d, mine.address = address;
  running->worker->arrive(transposed ? WarpOp::LdMatrixTrans : WarpOp::LdMatrix);
}

void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b) {
  Arguments& mine = arguments(*running);
  mine.d = d, mine.a = a, mine.b = b;
  running->worker->arrive(type == MmaType::Half       ? WarpOp::MmaHalf
                          : type == MmaType::BFloat16 ? WarpOp::MmaBFloat16
                                                      : WarpOp::MmaTf32);
}

void Worker::arrive(WarpOp op) {
  Thread& thread = *running;
  Warp& warp = *thread.warp;
  if (warp.arrived == 0) {
    warp.op = op;
  } else if (warp.op != op) {
    fault(std::string("divergent warp: at ") + name_of(op) + ", but " + lanes_of(warp.arrived) + " at " +
          name_of(warp.op));
  }
  warp.arrived |= 1u << thread.lane;
  if (warp.arrived != kAllLanes) {
    warp.runnable &= ~(1u << thread.lane);
    yield();
    return;
  }
  execute(warp, op);
  warp.arrived = 0;
  warp.runnable = kAllLanes;
  running = &thread;
}

void Worker::execute(Warp& warp, WarpOp op) {
  switch (op) {
    case WarpOp::Shuffle: {
      float values[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) values[lane] = warp.lanes[lane].value;
      for (int lane = 0; lane < kLanes; ++lane) warp.lanes[lane].value = values[lane ^ (warp.lanes[lane].mask & 31)];
      return;
    }
    case WarpOp::ShuffleFrom: {
      uint32_t words[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) words[lane] = warp.lanes[lane].word;
      for (Arguments& lane : warp.lanes) lane.word = words[lane.mask & 31];
      return;
    }
    case WarpOp::Ballot: {
      uint32_t bits = 0;
      for (int lane = 0; lane < kLanes; ++lane) bits |= warp.lanes[lane].word << lane;
      for (Arguments& lane : warp.lanes) lane.word = bits;
      return;
    }
    case WarpOp::ReduceMin:
    case WarpOp::ReduceMax: {
      int found = static_cast<int>(warp.lanes[0].word);
      for (const Arguments& lane : warp.lanes) {
        const int value = static_cast<int>(lane.word);
        found = op == WarpOp::ReduceMin ? std::min(found, value) : std::max(found, value);
      }
      for (Arguments& lane : warp.lanes) lane.word = static_cast<uint32_t>(found);
      return;
    }
    case WarpOp::LdMatrix:
      return execute_ldmatrix(warp, false);
    case WarpOp::LdMatrixTrans:
      return execute_ldmatrix(warp, true);
    case WarpOp::MmaHalf:
      ++counters_.mma;
      return multiply(MmaType::Half, warp.lanes);
    case WarpOp::MmaBFloat16:
      ++counters_.mma;
      return multiply(MmaType::BFloat16, warp.lanes);
    case WarpOp::MmaTf32:
      ++counters_.mma;
      return multiply(MmaType::Tf32, warp.lanes);
    case WarpOp::Sync:
      if (Race* const race = this->race()) race->warp_sync(warp.index);
      return;
    case WarpOp::None:
      return;
  }
}

// ---- Barriers

bool barrier(int id, int threads, bool reduce, bool value) {
  return running->worker->barrier(id, threads, reduce, value);
}
bool block_barrier(bool reduce, bool value) {
  return running->worker->barrier(0, running->worker->threads(), reduce, value);
}

bool Worker::barrier(int id, int threads, bool reduce, bool value) {
  Thread& thread = *running;
  Warp& warp = *thread.warp;
  if (id < 0 || id >= kBarriers || threads <= 0 || threads % kLanes != 0 || threads > this->threads()) {
    fault("barrier.sync " + std::to_string(id) + " of " + std::to_string(threads) + " threads in a block of " +
          std::to_string(this->threads()) + "; ids are 0 to 15, counts whole warps");
  }
  Barrier& b = barriers_[id];
  const Barrier wanted{threads, 0, reduce};
  if (threads == this->threads() && exited_ > 0) {
    fault("divergent barrier: waits at " + name_of(wanted, id) + " after " + std::to_string(exited_) +
          " threads have exited");
  }
  if (b.arrived == 0) {
    b.expected = threads, b.reduce = reduce, b.any = false;
  } else if (b.expected != threads || b.reduce != reduce) {
    fault("divergent barrier: " + name_of(wanted, id) + ", while others wait at " + name_of(b, id));
  }
  b.lanes[warp.index] |= 1u << thread.lane;
  b.any |= value;
  warp.runnable &= ~(1u << thread.lane);
  if (++b.arrived == b.expected) {
    release(id);
    to_scheduler();
  } else {
    yield();
  }
  return b.result;
}

void Worker::release(int id) {
  Barrier& b = barriers_[id];
  uint32_t participants = 0;
  for (Warp& warp : warps_) {
    uint32_t& lanes = b.lanes[warp.index];
    if (lanes == 0) continue;
    if (lanes != kAllLanes) fault("divergent barrier: part of a warp made up the count; " + stuck(warp));
    participants |= 1u << warp.index;
    warp.runnable = kAllLanes;
    lanes = 0;
  }
  b.result = b.any;
  b.arrived = 0;
  ++counters_.barriers;
  if (Race* const race = this->race()) {
    if (b.expected == threads()) {
      race->block_barrier();
    } else {
      race->barrier(participants);
    }
  }
}

// ---- Fibers

void Worker::to_scheduler() { Fiber::switch_to(running->fiber, scheduler_); }

// Leaves the running thread, which waits: for the next of its warp that can run, or else for another warp.
void Worker::yield() {
  Thread& thread = *running;
  const Warp& warp = *thread.warp;
  if (warp.runnable != 0) {
    running = threads_[warp.index * kLanes + __builtin_ctz(warp.runnable)].get();
    Fiber::switch_to(thread.fiber, running->fiber);
  } else if (warp.arrived != 0) {
    fault("divergent warp, it can never go on; " + stuck(warp));
  } else {
    to_scheduler();
  }
}

void Worker::check_exit(const Thread& thread) const {
  const Warp& warp = *thread.warp;
  for (int id = 0; id < kBarriers; ++id) {
    const Barrier& b = barriers_[id];
    if (b.arrived > 0 && b.expected == threads()) {
      fault("divergent barrier: exits while " + std::to_string(b.arrived) + " threads wait at " + name_of(b, id));
    }
  }
  if (warp.runnable == 0 && warp.arrived != 0) fault("divergent warp, it can never go on; " + stuck(warp));
}

// Every fiber's first and last frame: exceptions end here.
void Worker::entry() {
  Thread& thread = *running;
  Worker& worker = *thread.worker;
  const auto fail = [&](const char* what) {
    if (worker.failure_.empty()) worker.failure_ = what;
  };
  try {
    worker.run_->body();
    thread.warp->runnable &= ~(1u << thread.lane);
    thread.warp->exited |= 1u << thread.lane;
    ++worker.exited_;
    worker.check_exit(thread);
  } catch (const Fault& e) {
    fail(e.what());
  } catch (const std::exception& e) {
    fail((worker.place(thread) + ": exception: " + e.what()).c_str());
  }
  worker.leave(thread);
}

void Worker::leave(Thread& thread) {
  running = &thread;
  if (failure_.empty()) {
    yield();
  } else {
    to_scheduler();
  }
  std::terminate();  // nobody comes back to a fiber that has ended
}

void Worker::start(const Run& run) {
  run_ = &run;
  bytes_.assign(run.memory.spans().size(), {0, 0});
  counters_ = {};
  last_span_ = 0;
  const Launch& launch = run.launch;
  while (static_cast<int>(threads_.size()) < launch.threads) {
    threads_.push_back(std::make_unique<Thread>(kStackBytes, static_cast<int>(threads_.size())));
  }
  warps_.resize(launch.threads / kLanes);
  for (int i = 0; i < launch.threads; ++i) {
    threads_[i]->warp = &warps_[i / kLanes];
    threads_[i]->worker = this;
  }
  if (launch.shared_bytes > shared_capacity_) {
    shared_capacity_ = (launch.shared_bytes + 127) / 128 * 128;
    shared_.reset(static_cast<char*>(std::aligned_alloc(128, shared_capacity_)));
    if (!shared_) throw std::bad_alloc();
  }
}

std::string Worker::run_block(int64_t block) {
  const Launch& launch = run_->launch;
  block_[0] = static_cast<int>(block % launch.grid[0]);
  block_[1] = static_cast<int>(block / launch.grid[0] % launch.grid[1]);
  block_[2] = static_cast<int>(block / launch.grid[0] / launch.grid[1]);
  // What nobody has written is NaN, whichever the type.
  if (launch.shared_bytes > 0) std::memset(shared_.get(), 0xff, launch.shared_bytes);
  if (run_->check_races) race_.start(launch.shared_bytes, static_cast<int>(warps_.size()));
  for (size_t w = 0; w < warps_.size(); ++w) warps_[w] = {static_cast<int>(w), kAllLanes, 0, 0, WarpOp::None, {}};
  std::fill(std::begin(barriers_), std::end(barriers_), Barrier{});
  for (int i = 0; i < launch.threads; ++i) {
    Thread& thread = *threads_[i];
    thread.groups = 0, thread.next_copy = 0;
    thread.copies.clear();
    thread.fiber.reset(&Worker::entry);
  }
  exited_ = 0;
  failure_.clear();
  ++counters_.blocks;

  const bool ascending = run_->completion == Completion::Late;
  const auto next = [&]() -> Thread* {
    for (size_t i = 0; i < warps_.size(); ++i) {
      const Warp& warp = warps_[ascending ? i : warps_.size() - 1 - i];
      if (warp.runnable != 0) return threads_[warp.index * kLanes + __builtin_ctz(warp.runnable)].get();
    }
    return nullptr;
  };
  while (Thread* thread = next()) {
    running = thread;
    Fiber::switch_to(scheduler_, thread->fiber);
    if (!failure_.empty()) break;
  }
  running = nullptr;
  if (failure_.empty() && exited_ != launch.threads) failure_ = deadlock();
  if (run_->check_races) {
    for (int i = 0; i < launch.threads; ++i) {
      const Thread& thread = *threads_[i];
      for (size_t c = thread.next_copy; c < thread.copies.size(); ++c) race_.forget(thread.copies[c].offset);
    }
  }
  return failure_;
}

// ---- Launches

namespace {

struct Settings {
  std::atomic<Completion> completion{Completion::Late};
  std::atomic<bool> check_races{true};
  std::atomic<int> workers{0};
} settings;

struct Totals {
  std::mutex mutex;
  std::vector<Traffic> traffic;
  Counters counters;
} totals;

// Workers between launches: their stacks are worth keeping.
struct Pool {
  std::mutex mutex;
  std::vector<std::unique_ptr<Worker>> idle;

  std::unique_ptr<Worker> take() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (idle.empty()) return std::make_unique<Worker>();
    std::unique_ptr<Worker> worker = std::move(idle.back());
    idle.pop_back();
    return worker;
  }
  void put(std::unique_ptr<Worker> worker) {
    const std::lock_guard<std::mutex> lock(mutex);
    idle.push_back(std::move(worker));
  }
} pool;

void add(const Worker& worker, const Launch& launch) {
  for (size_t i = 0; i < launch.buffers.size(); ++i) {
    const std::string& name = launch.buffers[i].name;
    auto entry = std::find_if(totals.traffic.begin(), totals.traffic.end(), [&](auto& t) { return t.buffer == name; });
    if (entry == totals.traffic.end()) entry = totals.traffic.insert(entry, {name});
    entry->read += worker.bytes()[i].read;
    entry->written += worker.bytes()[i].written;
  }
  Counters& sum = totals.counters;
  const Counters& c = worker.counters();
  sum.blocks += c.blocks, sum.mma += c.mma, sum.ldmatrix += c.ldmatrix, sum.ldmatrix_conflicts += c.ldmatrix_conflicts;
  sum.cp_async += c.cp_async, sum.barriers += c.barriers;
}

// What every GPU since compute capability 8.0 would refuse; 227 KiB of shared memory is the most that any has.
void check(const Launch& launch) {
  constexpr int kMostShared = 227 * 1024;
  const int64_t x = launch.grid[0], y = launch.grid[1], z = launch.grid[2];
  const bool good = launch.threads > 0 && launch.threads % kLanes == 0 && launch.threads <= kMaxThreads &&
                    launch.shared_bytes >= 0 && launch.shared_bytes <= kMostShared && x > 0 && y > 0 && z > 0 &&
                    x < int64_t{1} << 31 && y < 65536 && z < 65536;
  if (good) return;
  throw std::runtime_error(launch.kernel + ": cannot launch " + std::to_string(x) + " x " + std::to_string(y) + " x " +
                           std::to_string(z) + " blocks of " + std::to_string(launch.threads) + " threads with " +
                           std::to_string(launch.shared_bytes) + " bytes of shared memory");
}

}  // namespace

void run(const Launch& launch, const std::function<void()>& body) {
  check(launch);
  const Run run{launch, body, Memory(launch.buffers), settings.completion, settings.check_races};
  const int64_t blocks = launch.grid[0] * launch.grid[1] * launch.grid[2];
  int cores = settings.workers;
  if (cores <= 0) cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const int team = static_cast<int>(std::min<int64_t>(cores, blocks));

  std::atomic<int64_t> next{0}, first_fault{std::numeric_limits<int64_t>::max()};
  std::mutex mutex;
  std::string message;
  std::exception_ptr failure;
  std::vector<std::unique_ptr<Worker>> workers(team);
  const auto work = [&](int i) {
    try {
      workers[i] = pool.take();
      workers[i]->start(run);
      // Blocks before one with a fault still run: the fault that is thrown does not depend on how threads are timed.
      for (int64_t block = next++; block < blocks && block < first_fault; block = next++) {
        std::string fault = workers[i]->run_block(block);
        if (fault.empty()) continue;
        const std::lock_guard<std::mutex> lock(mutex);
        if (block < first_fault) first_fault = block, message = std::move(fault);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      next = blocks;
      failure = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < team; ++i) helpers.emplace_back(work, i);
  } catch (const std::system_error&) {
    // No more threads to be had: fewer do it all.
  }
  work(0);
  for (std::thread& helper : helpers) helper.join();

  const bool good = message.empty() && !failure;
  if (good) {
    const std::lock_guard<std::mutex> lock(totals.mutex);
    for (const auto& worker : workers) {
      if (worker) add(*worker, launch);
    }
    ++totals.counters.launches;
  }
  for (auto& worker : workers) {
    if (worker) pool.put(std::move(worker));
  }
  if (failure) std::rethrow_exception(failure);
  if (!good) throw Fault(message);
}

void set_completion(Completion completion) { settings.completion = completion; }
void set_race_check(bool on) { settings.check_races = on; }
void set_workers(int workers) { settings.workers = workers; }

std::vector<Traffic> traffic() {
  const std::lock_guard<std::mutex> lock(totals.mutex);
  return totals.traffic;
}

std::vector<std::pair<std::string, int64_t>> counters() {
  const std::lock_guard<std::mutex> lock(totals.mutex);
  const Counters& c = totals.counters;
  return {{"launches", c.launches}, {"blocks", c.blocks},     {"mma", c.mma},
          {"ldmatrix", c.ldmatrix}, {"cp_async", c.cp_async}, {"ldmatrix_conflicts", c.ldmatrix_conflicts},
          {"barriers", c.barriers}};
}

void reset_traffic() {
  const std::lock_guard<std::mutex> lock(totals.mutex);
  totals.traffic.clear();
  totals.counters = {};
}

}  // namespace flashx::emulator
