// Which counters of split tiles a launch takes: places in one array of zeros per device. A kernel leaves those it used
// at zero, so none is ever reset, and launches need neither an allocation nor a memset.
#pragma once

#include <atomic>
#include <cstdint>

class Tickets {
 public:
  static constexpr unsigned MOST = 4096;         // of one launch
  static constexpr unsigned RING = 1 << 20;      // of eager launches: long enough for all that may be under way
  static constexpr unsigned CAPTURED = 1 << 22;  // of launches in graphs, which may run again at any time
  static constexpr unsigned COUNT = RING + MOST + CAPTURED;

  /// The first of `count` <= MOST places. Captured ones are taken for ever: negative when there are no more.
  int64_t take(unsigned count, bool captured) {
    if (!captured) return eager_.fetch_add(count) % RING;
    uint64_t first = captured_.fetch_add(count);
    return first + count > CAPTURED ? -1 : int64_t(RING + MOST + first);
  }

 private:
  std::atomic<uint64_t> eager_{0}, captured_{0};
};
