#include "emulator/race.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "emulator/block.h"

namespace flashx::emulator {

namespace {

bool writes(Access kind) { return kind == Access::Store || kind == Access::Copy; }

const char* name_of(Access kind) {
  switch (kind) {
    case Access::Load:
      return "ld.shared";
    case Access::LdMatrix:
      return "ldmatrix";
    case Access::Store:
      return "st.shared";
    default:
      return "cp.async";
  }
}

std::string thread_name(int warp, int lane) {
  const std::string in_warp = "warp " + std::to_string(warp);
  if (lane >= kLanes) return in_warp;
  return "thread " + std::to_string(warp * kLanes + lane) + " (" + in_warp + ", lane " + std::to_string(lane) + ")";
}

template <typename T>
std::unique_ptr<T[], void (*)(void*)> lazily_zeroed(size_t count) {
  T* memory = static_cast<T*>(std::calloc(count, sizeof(T)));
  if (!memory) throw std::bad_alloc();
  return {memory, std::free};
}

}  // namespace

void Race::start(int shared_bytes, int warps) {
  const int bytes = (shared_bytes + 15) / 16 * 16;
  if (bytes > capacity_ || warps > warps_capacity_) {
    capacity_ = std::max(bytes, capacity_), warps_capacity_ = std::max(warps, warps_capacity_);
    chunks_.assign(capacity_ / 16, Cell{});
    halves_.assign(capacity_ / 2, Cell{});
    chunk_reads_ = lazily_zeroed<Read>(chunks_.size() * warps_capacity_);
    half_reads_ = lazily_zeroed<Read>(halves_.size() * warps_capacity_);
    phase_ = 0;
  }
  if (warps != warps_) clocks_.assign(static_cast<size_t>(warps) * warps, 0);
  warps_ = warps;
  clocks_moved_ = true;
  block_barrier();
}

void Race::block_barrier() {
  ++phase_;
  // Own clocks begin at 1, so that others, which know 0, are not ordered after them.
  for (int w = 0; w < warps_; ++w) {
    if (clocks_moved_) std::fill_n(&clock(w, 0), warps_, 0u);
    clock(w, w) = 1;
  }
  clocks_moved_ = false;
}

void Race::barrier(uint32_t warps) {
  clocks_moved_ = true;
  for (int of = 0; of < warps_; ++of) {
    uint32_t latest = 0;
    for (int w = 0; w < warps_; ++w) {
      if (warps >> w & 1) latest = std::max(latest, clock(w, of));
    }
    for (int w = 0; w < warps_; ++w) {
      if (warps >> w & 1) clock(w, of) = latest;
    }
  }
  for (int w = 0; w < warps_; ++w) {
    if (warps >> w & 1) ++clock(w, w);
  }
}

void Race::check_flight(const Cell& chunk, const Thread& thread, Access kind, uint32_t offset) {
  if (chunk.flight == 0) return;
  const int by = chunk.flight - 1;
  fault(std::string(name_of(kind)) + " at shared address " + std::to_string(kSharedBase + offset) +
        ": a cp.async into it by " + (by == thread.index ? "this thread" : thread_name(by / kLanes, by % kLanes)) +
        " is under way, that no cp.async.wait_group has waited for");
}

// Everything that is remembered of the cell comes before this access, or it is a race.
inline void Race::check(const Cell& cell, const Read* reads, const Thread& thread, int lane, Access kind,
                        uint32_t offset) {
  const int warp = thread.warp->index;
  const auto ordered = [&](int other_warp, int other_lane, uint32_t time) {
    if (other_warp != warp) return time <= clock(warp, other_warp);
    return time < clock(warp, warp) || (other_lane == lane && lane != kSeveralLanes);
  };
  const auto race = [&](Access other, int other_warp, int other_lane) {
    fault("race at shared address " + std::to_string(kSharedBase + offset) + ": " + name_of(kind) + " by " +
          thread_name(warp, lane) + " and " + name_of(other) + " by " + thread_name(other_warp, other_lane) +
          ", without a barrier between them");
  };
  const Write& write = cell.write;
  if (write.clock != 0 && !ordered(write.warp, write.lane, write.clock)) race(write.kind, write.warp, write.lane);
  if (!writes(kind)) return;
  for (uint32_t left = cell.readers; left != 0; left &= left - 1) {
    const int w = __builtin_ctz(left);
    if (!ordered(w, reads[w].lane, reads[w].clock)) race(reads[w].kind, w, reads[w].lane);
  }
}

inline void Race::touch(Cell& cell, Read* reads, const Thread& thread, int lane, Access kind, uint32_t offset) {
  const int warp = thread.warp->index;
  const uint32_t now = clock(warp, warp);
  if (cell.phase != phase_) {
    cell.phase = phase_;
    cell.readers = 0;
    cell.write.clock = 0;
  } else {
    check(cell, reads, thread, lane, kind, offset);
  }
  if (writes(kind)) {
    cell.write = {now, static_cast<uint8_t>(warp), static_cast<uint8_t>(lane), kind};
    cell.readers = 0;
    return;
  }
  Read& read = reads[warp];
  const bool again = (cell.readers >> warp & 1) && read.clock == now && read.lane != lane;
  read = {now, static_cast<uint8_t>(again ? kSeveralLanes : lane), kind};
  cell.readers |= 1u << warp;
}

void Race::access(const Thread& thread, uint32_t offset, int bytes, Access kind) {
  Cell& chunk = chunks_[offset / 16];
  check_flight(chunk, thread, kind, offset);
  const int lane = kind == Access::LdMatrix ? kSeveralLanes : thread.lane;
  Read* const reads = &chunk_reads_[static_cast<size_t>(offset / 16) * warps_];
  Cell* const halves = &halves_[offset / 16 * 8];
  Read* const half_reads = &half_reads_[static_cast<size_t>(offset / 16) * 8 * warps_];
  if (chunk.phase != phase_) chunk.phase = phase_, chunk.readers = 0, chunk.write.clock = 0, chunk.split = false;
  if (bytes == 16 && !chunk.split) {
    touch(chunk, reads, thread, lane, kind, offset);
    return;
  }
  if (!chunk.split) {
    chunk.split = true;
    for (int h = 0; h < 8; ++h) {
      halves[h] = chunk;
      for (uint32_t left = chunk.readers; left != 0; left &= left - 1) {
        const int w = __builtin_ctz(left);
        half_reads[h * warps_ + w] = reads[w];
      }
    }
  }
  const int first = static_cast<int>(offset % 16) / 2;
  for (int h = first; h < first + bytes / 2; ++h) {
    touch(halves[h], half_reads + h * warps_, thread, lane, kind, offset / 16 * 16 + 2 * h);
  }
  if (bytes == 16 && writes(kind)) {
    chunk.write = halves[0].write;
    chunk.readers = 0;
    chunk.split = false;
  }
}

void Race::issue(const Thread& thread, uint32_t offset) {
  // From now on it may be written, so all that came before must be over.
  access(thread, offset, 16, Access::Copy);
  chunks_[offset / 16].flight = static_cast<uint16_t>(thread.index + 1);
}

void Race::land(const Thread& thread, uint32_t offset) {
  Cell& chunk = chunks_[offset / 16];
  const int warp = thread.warp->index;
  chunk.flight = 0;
  chunk.phase = phase_;
  chunk.readers = 0;
  chunk.split = false;
  chunk.write = {clock(warp, warp), static_cast<uint8_t>(warp), static_cast<uint8_t>(thread.lane), Access::Copy};
}

}  // namespace flashx::emulator
