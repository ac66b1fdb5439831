// Finds races on a block's shared memory: two accesses, one of them a write, that no barrier orders. Happens-before
// with vector clocks, after Flanagan and Freund, "FastTrack" (PLDI'09).
//
// Clocks belong to warps, since barriers do: each counts its warp's synchronisations. Lanes of a warp are ordered by
// these alone; shuffles and matrix instructions order no memory. A barrier of the whole block orders all that came
// before it, so it merely begins a new phase: what is remembered of earlier ones no longer matters, nor do clocks.
//
// Memory is remembered in chunks of 16 bytes, and, where smaller accesses come, in halfwords.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace flashx::emulator {

struct Thread;

enum class Access : uint8_t { Load, LdMatrix, Store, Copy };

class Race {
 public:
  // A new block.
  void start(int shared_bytes, int warps);

  // Barriers: of the whole block, of the warps in the mask, of a warp.
  void block_barrier();
  void barrier(uint32_t warps);
  void warp_sync(int warp) { clock(warp, warp)++; }

  // Accesses of 2, 4 or 16 aligned bytes at an offset in shared memory; a race is a Fault. Those of ldmatrix count as
  // the whole warp's.
  void access(const Thread& thread, uint32_t offset, int bytes, Access kind);

  // A cp.async by this thread: under way from issue to land, when it becomes a write; nobody may touch its target in
  // between.
  void issue(const Thread& thread, uint32_t offset);
  void land(const Thread& thread, uint32_t offset);
  void forget(uint32_t offset) { chunks_[offset / 16].flight = 0; }

 private:
  static constexpr int kSeveralLanes = 32;

  struct Write {
    uint32_t clock;  // 0: none
    uint8_t warp, lane;
    Access kind;
  };
  struct Read {
    uint32_t clock;
    uint8_t lane;
    Access kind;
  };
  struct Cell {
    uint32_t phase;
    uint32_t readers;  // warps
    Write write;
    uint16_t flight;  // thread + 1 of a copy under way; chunks only
    bool split;       // its halfwords know better; chunks only
  };

  uint32_t& clock(int warp, int of) { return clocks_[warp * warps_ + of]; }
  void check(const Cell& cell, const Read* reads, const Thread& thread, int lane, Access kind, uint32_t offset);
  void touch(Cell& cell, Read* reads, const Thread& thread, int lane, Access kind, uint32_t offset);
  void check_flight(const Cell& chunk, const Thread& thread, Access kind, uint32_t offset);

  int warps_ = 0, capacity_ = 0, warps_capacity_ = 0;
  uint32_t phase_ = 0;
  bool clocks_moved_ = true;
  std::vector<uint32_t> clocks_;  // [warp][of warp]
  std::vector<Cell> chunks_, halves_;
  // [cell][warp], valid for the cell's readers; fresh memory is not touched before it is used.
  std::unique_ptr<Read[], void (*)(void*)> chunk_reads_{nullptr, [](void*) {}}, half_reads_{nullptr, [](void*) {}};
};

}  // namespace flashx::emulator
