// AMX: tiles of 16 x 16 int32 sums. With W8A8_EMULATE_AMX the instructions are emulated, for tests on CPUs without them.
#pragma once
#include <cstring>

#include "kernels.h"

#if defined(W8A8_EMULATE_AMX)
#define W8A8_AMX 1
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
