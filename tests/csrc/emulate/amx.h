// The instructions of AMX that csrc/cpu uses, for tests on CPUs without them; csrc/cpu/amx.h includes this file.
#pragma once

#include <cstdint>
#include <cstring>

namespace w8a8::cpu::W8A8_LEVEL {

// Tiles as tileloadd leaves them: 16 rows of 64 bytes. Loading the configuration clears them.
inline thread_local uint8_t emulated_tiles[8][16][64];
inline thread_local bool emulated_configured = false;

inline void emulate_load(int tile, const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(emulated_tiles[tile][r], (const uint8_t*)from + r * stride, 64);
}
inline void emulate_store(int tile, void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy((uint8_t*)to + r * stride, emulated_tiles[tile][r], 64);
}
inline void emulate_dot(int sums, int a, int b) {  // signed a, unsigned b
  if (!emulated_configured) __builtin_trap();
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      uint32_t sum;
      std::memcpy(&sum, emulated_tiles[sums][m] + 4 * n, 4);
      for (int k = 0; k < 64; ++k)
        sum += (uint32_t)((int8_t)emulated_tiles[a][m][k] * emulated_tiles[b][k / 4][4 * n + k % 4]);
      std::memcpy(emulated_tiles[sums][m] + 4 * n, &sum, 4);
    }
}

struct TileConfiguration {
  TileConfiguration() { emulated_configured = true, std::memset(emulated_tiles, 0, sizeof emulated_tiles); }
  ~TileConfiguration() { emulated_configured = false; }
};
inline bool amx_permitted() { return true; }

}  // namespace w8a8::cpu::W8A8_LEVEL
#define W8A8_TILE_LOAD(tile, from, stride) emulate_load(tile, from, stride)
#define W8A8_TILE_STORE(tile, to, stride) emulate_store(tile, to, stride)
#define W8A8_TILE_DOT(sums, a, b) emulate_dot(sums, a, b)
