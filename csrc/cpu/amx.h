// AMX: tiles of 16 x 16 int32 sums. Tests on CPUs without it define W8A8_EMULATE_AMX, which emulates the instructions.
#pragma once

#include "kernels.h"

#if defined(W8A8_EMULATE_AMX)
#define W8A8_AMX 1
#include "emulate/amx.h"  // from tests/csrc

#elif defined(__AMX_INT8__)
#define W8A8_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
namespace w8a8::cpu::W8A8_LEVEL {

struct TileConfiguration {
  TileConfiguration() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } all;
    _tile_loadconfig(&all);
  }
  ~TileConfiguration() { _tile_release(); }
};

// Linux gives a process the tiles' state when it asks (ARCH_REQ_XCOMP_PERM for XTILEDATA).
inline bool amx_permitted() {
  unsigned a, b, c, d;
  const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1);
  return has && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

}  // namespace w8a8::cpu::W8A8_LEVEL
#define W8A8_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define W8A8_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define W8A8_TILE_DOT(sums, a, b) _tile_dpbsud(sums, a, b)

#else
namespace w8a8::cpu::W8A8_LEVEL {
struct TileConfiguration {
  TileConfiguration() {}  // not trivial, so that it does not count as unused
};
}  // namespace w8a8::cpu::W8A8_LEVEL
#endif
