// The AMX tile instructions that amx.cpp and amx_int8.cpp use, in plain C++, so that the kernels can be tested where there
// is no AMX. Included in place of the intrinsics when MLXQ_EMULATE_AMX is defined; never part of a build that is shipped.
//
// As in Intel's manual: a tile is rows x colsb bytes as configured, a load reads just those bytes (a guard page behind
// them is not touched) and zeroes the rest of the tile, a store writes just those. Where the hardware would raise #UD
// (no configuration, shapes that do not fit) this aborts and says which instruction it was.
// tdpbf16ps keeps two float32 chains per sum, even k and odd k, by fused multiply-adds rounded to nearest even with
// subnormals read and written as zero; it then adds even + odd and adds that to the destination. Real hardware gives
// the same bits (tools/amx_device_check.sh compares them). tdpbssd adds four products of signed bytes at a time, in
// integers that wrap.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace mlxq {
namespace {

struct EmulatedTile {
  int rows = 0;
  int colsb = 0;
  alignas(64) char data[16][64];
};

thread_local EmulatedTile emulated_tiles[8];
thread_local bool emulated_configured = false;

void emulated_check(bool fits, const char* instruction) {
  if (!fits) {
    std::fprintf(stderr, "emulated AMX: %s would raise #UD\n", instruction);
    std::abort();
  }
}

EmulatedTile& emulated_tile(int t, const char* instruction) {
  emulated_check(emulated_configured && emulated_tiles[t].rows > 0, instruction);
  return emulated_tiles[t];
}

void emulated_loadconfig(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  emulated_check(bytes[0] == 1, "ldtilecfg with a palette other than 1");
  for (int t = 0; t < 8; ++t) {
    uint16_t colsb;
    std::memcpy(&colsb, bytes + 16 + 2 * t, 2);
    emulated_check(bytes[48 + t] <= 16 && colsb <= 64, "ldtilecfg with a tile above 16 rows of 64 bytes");
    emulated_tiles[t] = {bytes[48 + t], colsb, {}};
  }
  emulated_configured = true;
}

void emulated_release() { emulated_configured = false; }

void emulated_zero(int t) {
  EmulatedTile& tile = emulated_tile(t, "tilezero");
  std::memset(tile.data, 0, sizeof tile.data);
}

void emulated_loadd(int t, const void* base, int64_t stride) {
  EmulatedTile& tile = emulated_tile(t, "tileloadd");
  std::memset(tile.data, 0, sizeof tile.data);
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(tile.data[r], static_cast<const char*>(base) + r * stride, size_t(tile.colsb));
  }
}

void emulated_stored(int t, void* base, int64_t stride) {
  EmulatedTile& tile = emulated_tile(t, "tilestored");
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, tile.data[r], size_t(tile.colsb));
  }
}

// Not inlined: no arithmetic may move across the changes of the rounding mode around the call.
__attribute__((noinline)) void emulated_products(EmulatedTile& c, const EmulatedTile& a, const EmulatedTile& b) {
  const __m512i odd_half = _mm512_set1_epi32(int(0xffff0000));
  __mmask16 columns = __mmask16((1u << (c.colsb / 4)) - 1);
  for (int m = 0; m < c.rows; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < a.colsb / 4; ++k) {
      uint32_t pair;
      std::memcpy(&pair, a.data[m] + 4 * k, 4);
      __m512i b_pairs = _mm512_load_si512(b.data[k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(int(pair << 16))),
                             _mm512_castsi512_ps(_mm512_slli_epi32(b_pairs, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(int(pair & 0xffff0000))),
                            _mm512_castsi512_ps(_mm512_and_si512(b_pairs, odd_half)), odd);
    }
    __m512 sum = _mm512_add_ps(_mm512_load_ps(c.data[m]), _mm512_add_ps(even, odd));
    _mm512_store_ps(c.data[m], _mm512_maskz_mov_ps(columns, sum));
  }
}

[[maybe_unused]] void emulated_dpbf16ps(int dst, int a, int b) {
  EmulatedTile &c_tile = emulated_tile(dst, "tdpbf16ps"), &a_tile = emulated_tile(a, "tdpbf16ps"),
               &b_tile = emulated_tile(b, "tdpbf16ps");
  emulated_check(dst != a && dst != b && a != b, "tdpbf16ps with a tile named twice");
  emulated_check(c_tile.rows == a_tile.rows && c_tile.colsb == b_tile.colsb && a_tile.colsb == 4 * b_tile.rows,
                 "tdpbf16ps with shapes that do not fit");
  unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8040);  // nearest even, subnormals are zero on both sides, no exceptions
  emulated_products(c_tile, a_tile, b_tile);
  _mm_setcsr(before);
}

[[maybe_unused]] void emulated_dpbssd(int dst, int a, int b) {
  EmulatedTile &c_tile = emulated_tile(dst, "tdpbssd"), &a_tile = emulated_tile(a, "tdpbssd"),
               &b_tile = emulated_tile(b, "tdpbssd");
  emulated_check(dst != a && dst != b && a != b, "tdpbssd with a tile named twice");
  emulated_check(c_tile.rows == a_tile.rows && c_tile.colsb == b_tile.colsb && a_tile.colsb == 4 * b_tile.rows,
                 "tdpbssd with shapes that do not fit");
  for (int m = 0; m < c_tile.rows; ++m) {
    for (int n = 0; n < c_tile.colsb / 4; ++n) {
      uint32_t sum;
      std::memcpy(&sum, c_tile.data[m] + 4 * n, 4);
      for (int k = 0; k < a_tile.colsb; ++k) {
        sum += uint32_t(int(int8_t(a_tile.data[m][k])) * int(int8_t(b_tile.data[k / 4][4 * n + k % 4])));
      }
      std::memcpy(c_tile.data[m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace
}  // namespace mlxq

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbf16ps emulated_dpbf16ps
#define _tile_dpbssd emulated_dpbssd
