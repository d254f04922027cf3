// What the AMX families share: whether tiles may be used here, and their configuration. With MLXQ_EMULATE_AMX the tile
// instructions are those of amx_emulation.h. Static: see avx512_common.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#ifdef MLXQ_EMULATE_AMX
#include "amx_emulation.h"
#elif defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mlxq {

constexpr unsigned cpuid_amx_bf16 = 1u << 22, cpuid_amx_tile = 1u << 24, cpuid_amx_int8 = 1u << 25;

// The CPU has tiles and `wanted` of them, the kernel saves them, and this process was given leave to use them.
static inline bool tiles_here([[maybe_unused]] unsigned wanted) {
#ifdef MLXQ_EMULATE_AMX
  return true;
#elif defined(__linux__)
  wanted |= cpuid_amx_tile;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) {
    return false;
  }
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned tile_state = 3u << 17;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (low & tile_state) == tile_state && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;  // macOS on x86 and Windows: no Apple machine has AMX, Windows is not built
#endif
}

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t colsb[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static inline void configure(const TileConfig& config) {
  // gcc 12 declares 8 of the 64 bytes as read and drops the stores to the others.
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// gcc's tile intrinsics do not say that they read memory: without this, stores before them may come after them.
static inline void stores_done() { asm volatile("" ::: "memory"); }

}  // namespace mlxq
