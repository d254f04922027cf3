// The names of hopper.cuh for a CPU: threads of a cluster as fibers in an order that a seed decides; copies and matrix
// products done either at once or as late as their waits allow, so that a missing wait or barrier shows as a wrong answer.
// Shared memory begins as NaN. x86-64 only (half precision conversions).
#include <algorithm>
#include <array>
#include <immintrin.h>
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <vector>
#ifndef THREADS
#define THREADS 256  // of a block
#endif
#define __device__
#define __forceinline__ inline
#define __global__
#define __restrict__
#define __launch_bounds__(...)
using std::max; using std::min;
struct uint2 { uint32_t x, y; }; struct float2 { float x, y; }; struct alignas(16) uint4 { uint32_t x, y, z, w; }; struct alignas(16) float4 { float x, y, z, w; };
struct int4_ { int x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
namespace emu {
struct Dim { unsigned x, y, z; };
struct Op { bool matrix; std::function<void()> run; };
struct Barrier { int count = 0; long generation = 0; };
struct Meeting { int count = 0, left = 0, bytes = 0; long phase = 0; };  // an mbarrier: arrivals of a phase, those and bytes to come
struct Block {
  std::vector<char> memory; Barrier all, group[8], warp[THREADS / 32]; std::map<uint32_t, Meeting> meetings;
  std::vector<std::pair<uint32_t, std::function<void()>>> tensors;  // copies asked for, and the mbarrier that they report to
  uint32_t given[THREADS][4];  // what a lane shows the others of its warp
};
struct Fiber {
  ucontext_t context; std::vector<char> stack; bool done = false; Dim thread, block; int rank;
  std::vector<std::vector<std::function<void()>>> copies, products; // groups; the last is open
};
inline Dim grid; inline std::vector<Fiber> fibers; inline std::vector<Block> blocks; inline Fiber* now; inline ucontext_t home;
inline Barrier cluster; inline bool late; inline std::mt19937 random_; inline long waits;
inline void yield() { swapcontext(&now->context, &home); }
inline void sync(Barrier& b, int n) {
  long g = b.generation;
  if (++b.count == n) { b.count = 0; b.generation++; waits = 0; return; }
  while (b.generation == g) { if (++waits > 3000000) { fprintf(stderr, "deadlock\n"); abort(); } yield(); }
}
inline Block& block() { return blocks[now->rank]; }
inline char* memory(int rank) { char* p = blocks[rank].memory.data(); return p + (1024 - uintptr_t(p) % 1024) % 1024; }
inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t float_to_half(float f) { return _cvtss_sh(f, 0); }
inline float bf_to_float(uint16_t h) { uint32_t u = uint32_t(h) << 16; float f; memcpy(&f, &u, 4); return f; }
inline uint16_t float_to_bf(float f) { uint32_t u; memcpy(&u, &f, 4); if (f != f) return 0x7fff; return (u + 0x7fff + ((u >> 16) & 1)) >> 16; }
}
#define threadIdx (emu::now->thread)
#define blockIdx (emu::now->block)
#define gridDim (emu::grid)
#define SHARED_MEMORY(name) char* name = emu::memory(emu::now->rank)
inline void __syncthreads() { emu::sync(emu::block().all, THREADS); }
inline void __syncwarp() { emu::sync(emu::block().warp[threadIdx.x / 32], 32); }
template <int WARPS> inline void workers_sync() { emu::sync(emu::block().group[2], 32 * WARPS); }
template <int N> inline void registers_down() {}
template <int N> inline void registers_up() {}
inline void group_sync(int g) { emu::sync(emu::block().group[g], 128); }
inline void cluster_sync() { emu::sync(emu::cluster, (THREADS == 256 ? 256 : THREADS - 128) * int(emu::grid.x)); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t s) {
  uint64_t v = a | uint64_t(b) << 32; uint32_t out = 0;
  for (int i = 0; i < 4; i++) out |= uint32_t((v >> (8 * ((s >> 4 * i) & 7))) & 255) << 8 * i;
  return out;
}
inline float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
inline uint32_t and_or(uint32_t a, uint32_t m, uint32_t c) { return (a & m) | c; }
inline float half_value(uint32_t h) { return emu::half_to_float(h); }
inline float v16(uint32_t h) { return F16 == 1 ? emu::half_to_float(h) : emu::bf_to_float(h); }
inline uint32_t r16(float f) { return F16 == 1 ? emu::float_to_half(f) : emu::float_to_bf(f); }
inline uint32_t sub2(uint32_t a, uint32_t b) { return r16(v16(a & 65535) - v16(b & 65535)) | r16(v16(a >> 16) - v16(b >> 16)) << 16; }
inline uint32_t mul2(uint32_t a, uint32_t b) { return r16(v16(a & 65535) * v16(b & 65535)) | r16(v16(a >> 16) * v16(b >> 16)) << 16; }
inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  return r16(float(double(v16(a & 65535)) * v16(b & 65535) + v16(c & 65535))) | r16(float(double(v16(a >> 16)) * v16(b >> 16) + v16(c >> 16))) << 16;
}
inline uint32_t round2(float low, float high) { return r16(low) | r16(high) << 16; }
constexpr uint32_t BASE = 4096;  // where shared memory begins in its address space
inline uint32_t shared_address(const void* p) { return uint32_t((const char*)p - emu::memory(emu::now->rank)) + BASE; }
inline char* at(uint32_t a) {
  if (a < BASE || a >= BASE + emu::block().memory.size() - 1024) { fprintf(stderr, "shared address %u\n", a); abort(); }
  return emu::memory(emu::now->rank) + a - BASE;
}
inline void store_u16(uint32_t to, uint16_t v) { memcpy(at(to), &v, 2); }
inline void defer(std::vector<std::vector<std::function<void()>>>& q, std::function<void()> f) {
  if (!emu::late) { f(); return; }
  if (q.empty()) q.emplace_back();
  q.back().push_back(f);
}
inline void commit(std::vector<std::vector<std::function<void()>>>& q) { if (q.empty()) q.emplace_back(); q.emplace_back(); }
inline void wait_all_but(std::vector<std::vector<std::function<void()>>>& q, int n) {
  while (int(q.size()) - 1 > n) { for (auto& f : q.front()) f(); q.erase(q.begin()); }
}
template <int BYTES> inline void copy_async(uint32_t to, const void* from, int bytes) {
  if (to % BYTES || uintptr_t(from) % BYTES || bytes < 0 || bytes > BYTES) { fprintf(stderr, "copy %d: to %u from %p bytes %d\n", BYTES, to, from, bytes); abort(); }
  char* p = at(to); at(to + BYTES - 1);
  defer(emu::now->copies, [=] { char v[BYTES] = {}; memcpy(v, from, bytes); memcpy(p, v, BYTES); });
}
inline void copy_commit() { commit(emu::now->copies); }
template <int N> inline void copy_wait() { wait_all_but(emu::now->copies, N); }
inline void fence_async() {}
inline void wait_for_predecessor() {}
inline void wgmma_begin() {}
inline void wgmma_commit() { commit(emu::now->products); }
template <int N> inline void wgmma_wait(void*) {
  wait_all_but(emu::now->products, N);
#ifdef X_STAGES
  __syncwarp();  // one lane says for its warp that the products are done
#endif
}
inline float element(uint64_t d, int row, int k, bool transposed) {  // row of the 64 or BN, k of the 16
  if (d >> 62 != 1) { fprintf(stderr, "layout\n"); abort(); }
  const uint32_t start = uint32_t(d & 0x3fff) << 4, lbo = uint32_t(d >> 16 & 0x3fff) << 4, sbo = uint32_t(d >> 32 & 0x3fff) << 4;
  uint32_t a = transposed ? start + row / 64 * lbo + k / 8 * sbo + k % 8 * 128 + row % 64 * 2 : start + row / 8 * sbo + row % 8 * 128 + k * 2;
  a ^= (a >> 7 & 7) << 4;
  uint16_t h; memcpy(&h, at(a), 2);
  return v16(h);
}
inline void wgmma(float* d, uint64_t a, uint64_t b) {
  const int t = threadIdx.x % 128, warp = t / 32, lane = t % 32;
  defer(emu::now->products, [=] {
    for (int i = 0; i < 2; i++) {
      float left[16];
      for (int k = 0; k < 16; k++) left[k] = element(a, 16 * warp + lane / 4 + 8 * i, k, LEFT_TRANSPOSED);
      for (int j = 0; j < BN / 8; j++)
        for (int c = 0; c < 2; c++)
          for (int k = 0; k < 16; k++) d[4 * j + 2 * i + c] += left[k] * element(b, 8 * j + 2 * (lane % 4) + c, k, false);
    }
  });
}
inline int opaque(int value) { return value; }
inline float opaque(float value) { return value; }
inline void in_use(uint32_t) {}
// A from registers, as they were when the product was asked for; the product is spoilt if they change before it is waited for.
inline void wgmma(float* d, const uint32_t* a, uint64_t b) {
  const int thread = threadIdx.x, t = thread % 128, lane = t % 32;
  auto& given = emu::block().given;
  memcpy(given[thread], a, 16);
  __syncwarp();
  std::array<float, 32> left;  // row lane / 4, then row lane / 4 + 8
  for (int i = 0; i < 2; i++)
    for (int k = 0; k < 16; k++) {
      const uint32_t pair = given[thread / 4 * 4 + k % 8 / 2][i + k / 8 * 2];
      left[16 * i + k] = v16(k % 2 ? pair >> 16 : pair & 65535);
    }
  __syncwarp();
  std::array<uint32_t, 4> mine;
  memcpy(mine.data(), a, 16);
  defer(emu::now->products, [=] {
    const bool changed = memcmp(mine.data(), a, 16);
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < BN / 8; j++)
        for (int c = 0; c < 2; c++) {
          float& sum = d[4 * j + 2 * i + c];
          for (int k = 0; k < 16; k++) sum += left[16 * i + k] * element(b, 8 * j + 2 * (lane % 4) + c, k, false);
          if (changed) sum = NAN;
        }
  });
}
inline void exchange(uint32_t* four, uint32_t row, bool load) {  // 8 x 8 halves: rows where the lanes say, or as the lanes hold them
  const int thread = threadIdx.x, lane = thread % 32, warp = thread - lane;
  auto& given = emu::block().given;
  given[thread][0] = row;
  __syncwarp();
  uint32_t rows[32];
  for (int i = 0; i < 32; i++) rows[i] = given[warp + i][0];
  for (int i = 0; i < 32; i++) if (rows[i] % 16) { fprintf(stderr, "matrix row at %u\n", rows[i]); abort(); }
  for (int i = 0; i < 4; i++) {
    uint16_t pair[2];
    for (int c = 0; c < 2; c++) {
      if (load) memcpy(pair + c, at(rows[8 * i + 2 * (lane % 4) + c]) + lane / 4 * 2, 2);
      else memcpy(at(rows[8 * i + lane / 4]) + (2 * (lane % 4) + c) * 2, reinterpret_cast<uint16_t*>(four + i) + c, 2);
    }
    if (load) memcpy(four + i, pair, 4);
  }
  __syncwarp();
}
inline void load_matrices(uint32_t* four, uint32_t row) {
  const int thread = threadIdx.x, lane = thread % 32;
  auto& given = emu::block().given;
  given[thread][0] = row;
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const uint32_t from = given[thread - lane + 8 * i + lane / 4][0];
    if (from % 16) { fprintf(stderr, "matrix row at %u\n", from); abort(); }
    memcpy(four + i, at(from) + lane % 4 * 4, 4);
  }
  __syncwarp();
}
inline void load_turned(uint32_t* four, uint32_t row) { exchange(four, row, true); }
inline void store_matrices(const uint32_t* four, uint32_t row) { exchange(const_cast<uint32_t*>(four), row, false); }
inline uint32_t (&shown(uint32_t value))[THREADS][4] {  // what each lane gives; the others are through with what it gave before
  auto& given = emu::block().given;
  __syncwarp();
  given[threadIdx.x][0] = value;
  __syncwarp();
  return given;
}
inline int __shfl_sync(uint32_t, int value, int lane) { return shown(value)[threadIdx.x / 32 * 32 + lane][0]; }
inline int __shfl_up_sync(uint32_t, int value, int d) { return shown(value)[threadIdx.x - (int(threadIdx.x % 32) >= d ? d : 0)][0]; }
inline uint32_t __match_any_sync(uint32_t, uint32_t value) {
  auto& given = shown(value);
  uint32_t same = 0;
  for (int i = 0; i < 32; i++) same |= uint32_t(given[threadIdx.x / 32 * 32 + i][0] == value) << i;
  return same;
}
inline int __ffs(uint32_t v) { return v ? __builtin_ctz(v) + 1 : 0; }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int dot4(uint32_t a, uint32_t b, int c) {
  for (int i = 0; i < 4; i++) c += int(int8_t(a >> 8 * i)) * int8_t(b >> 8 * i);
  return c;
}
inline int byte_element(uint64_t d, int row, int k) {  // k of the 32
  if (d >> 62 != 1) { fprintf(stderr, "layout\n"); abort(); }
  uint32_t a = (uint32_t(d & 0x3fff) << 4) + row / 8 * (uint32_t(d >> 32 & 0x3fff) << 4) + row % 8 * 128 + k;
  a ^= (a >> 7 & 7) << 4;
  return int8_t(*at(a));
}
inline void wgmma_s8(int* d, uint64_t a, uint64_t b) {
  const int t = threadIdx.x % 128, warp = t / 32, lane = t % 32;
  defer(emu::now->products, [=] {
    for (int i = 0; i < 2; i++) {
      int left[32];
      for (int k = 0; k < 32; k++) left[k] = byte_element(a, 16 * warp + lane / 4 + 8 * i, k);
      for (int j = 0; j < BN / 8; j++)
        for (int c = 0; c < 2; c++)
          for (int k = 0; k < 32; k++) d[4 * j + 2 * i + c] += left[k] * byte_element(b, 8 * j + 2 * (lane % 4) + c, k);
    }
  });
}
// A from registers, as for wgmma; ADD 0: the sums begin at 0.
template <int ADD> inline void wgmma_s8(int* d, const uint32_t* a, uint64_t b) {
  const int thread = threadIdx.x, lane = thread % 32;
  auto& given = emu::block().given;
  memcpy(given[thread], a, 16);
  __syncwarp();
  std::array<int8_t, 64> left;  // row lane / 4, then row lane / 4 + 8
  for (int i = 0; i < 2; i++)
    for (int k = 0; k < 32; k++) left[32 * i + k] = int8_t(given[thread / 4 * 4 + k % 16 / 4][i + k / 16 * 2] >> k % 4 * 8);
  __syncwarp();
  std::array<uint32_t, 4> mine;
  memcpy(mine.data(), a, 16);
  defer(emu::now->products, [=] {
    const bool changed = memcmp(mine.data(), a, 16);
    for (int j = 0; j < BN / 8; j++)
      for (int c = 0; c < 2; c++) {
        int8_t right[32];
        for (int k = 0; k < 32; k++) right[k] = byte_element(b, 8 * j + 2 * (lane % 4) + c, k);
        for (int i = 0; i < 2; i++) {
          uint32_t sum = ADD ? d[4 * j + 2 * i + c] : 0;
          for (int k = 0; k < 32; k++) sum += int(left[32 * i + k]) * right[k];
          d[4 * j + 2 * i + c] = changed ? 0x7fffffff : int(sum);
        }
      }
  });
}
inline float4 remote(uint32_t a, int rank) { float4 v; memcpy(&v, emu::memory(rank) + a - BASE, 16); return v; }
