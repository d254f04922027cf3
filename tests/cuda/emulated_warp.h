// The names of warp.cuh and copies.cuh for a CPU: threads of a cluster as fibers. Copies are made at once (order 0), as late as
// the waits allow (1), or some time (2); which warps run when, a seed decides.
// Shared memory begins as NaN. x86-64 only (half precision conversions).
#include <algorithm>
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
#define __device__
#define __forceinline__ inline
#define __global__
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)
using std::max; using std::min;
struct uint2 { uint32_t x, y; }; struct alignas(16) uint4 { uint32_t x, y, z, w; }; struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct TensorMap { char* pointer; int rank; uint64_t sizes[3], strides[2]; uint32_t box[3]; int swizzle; };
namespace emu {
constexpr int ALL = WARPS + 2 + (X_TYPE == 2 && S_TYPE == 2), THREADS = ALL * 32;
struct Dim { unsigned x, y, z; };
struct Fiber { ucontext_t context; std::vector<char> stack; bool done, arrived; Dim thread, block; int rank, turn; long phase; };
struct Meeting { int count = 0; long generation = 0; };
struct Warp { Meeting meeting; uint32_t given[2][32][6]; };
struct Barrier { int count, missing; long bytes, phase; };
struct Block {
  std::vector<char> shared; Warp warps[ALL] = {}; Meeting all; std::map<uint32_t, Barrier> barriers; int running = THREADS;
};
inline Dim grid; inline std::vector<Fiber> fibers; inline std::vector<Block> blocks; inline Fiber* now; inline ucontext_t home;
inline std::vector<std::function<void()>> copies; inline int order; inline std::mt19937 random_; inline bool moved; inline long phase;
inline const char* failed;
inline void yield() { swapcontext(&now->context, &home); }
inline void fail(const char* what) {  // ends the run; a fiber cannot throw
  failed = what;
  if (!now) throw what;
  for (;;) yield();
}
inline void meet(Meeting& m, int n) {
  moved = true;
  const long before = m.generation;
  if (++m.count == n) m.count = 0, m.generation++;
  while (m.generation == before) yield();
}
inline Block& block() { return blocks[now->rank]; }
inline Warp& warp() { return block().warps[now->thread.x / 32]; }
inline auto& exchange(std::initializer_list<uint32_t> values) {  // what every lane of the warp gives
  auto& given = warp().given[now->turn ^= 1];
  std::copy(values.begin(), values.end(), given[now->thread.x % 32]);
  meet(warp().meeting, 32);
  return given;
}
inline char* memory(Block& b) { char* p = b.shared.data(); return p + (1024 - uintptr_t(p) % 1024) % 1024; }
inline float bf_to_float(uint32_t h) { h <<= 16; float f; memcpy(&f, &h, 4); return f; }
inline uint32_t float_to_bf(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  return f != f ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
inline float value(uint32_t h) { return X_TYPE == 1 ? _cvtsh_ss(h & 65535) : bf_to_float(h & 65535); }
inline uint32_t rounded(float f) { return X_TYPE == 1 ? _cvtss_sh(f, 0) : float_to_bf(f); }
inline Barrier& barrier(Block& b, uint32_t at) {
  if (!b.barriers.count(at)) fail("no barrier there");
  return b.barriers[at];
}
inline void check(Barrier& b) {
  if (!b.missing && !b.bytes) b.missing = b.count, b.phase++, moved = true;
}
inline void check_cluster() {  // have all that run arrived?
  for (auto& f : fibers) if (!f.done && !f.arrived) return;
  for (auto& f : fibers) f.arrived = false;
  phase++, moved = true;
}
}
#define threadIdx (emu::now->thread)
#define blockIdx (emu::now->block)
#define gridDim (emu::grid)
#define SHARED_MEMORY(name) char* name = emu::memory(emu::block())
inline void __syncthreads() { emu::meet(emu::block().all, emu::THREADS); }
inline void __syncwarp() { emu::meet(emu::warp().meeting, 32); }
inline uint32_t __ballot_sync(uint32_t, bool mine) {
  auto& given = emu::exchange({uint32_t(mine)});
  uint32_t bits = 0;
  for (int i = 0; i < 32; i++) bits |= given[i][0] << i;
  return bits;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t s) {
  uint64_t v = a | uint64_t(b) << 32; uint32_t out = 0;
  for (int i = 0; i < 4; i++) out |= uint32_t((v >> (8 * ((s >> 4 * i) & 7))) & 255) << 8 * i;
  return out;
}
inline float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t and_or(uint32_t a, uint32_t m, uint32_t c) { return (a & m) | c; }
inline float half_value(uint32_t h) { return _cvtsh_ss(h); }
inline uint32_t round2(float low, float high) { return emu::rounded(low) | emu::rounded(high) << 16; }
inline uint32_t mul2(uint32_t a, uint32_t b) { return round2(emu::value(a) * emu::value(b), emu::value(a >> 16) * emu::value(b >> 16)); }
inline uint32_t max_abs2(uint32_t a, uint32_t b) {  // a NaN's bits are the largest, too
  b &= 0x7fff7fff;
  return max(a & 65535, b & 65535) | max(a >> 16, b >> 16) << 16;
}
inline uint32_t opaque(uint32_t v) { return v; }
constexpr uint32_t BASE = 4096;  // where shared memory begins in its address space
inline uint32_t shared_address(const void* p) { return uint32_t((const char*)p - emu::memory(emu::block())) + BASE; }
inline char* at(emu::Block& b, uint32_t a, int bytes) {
  if (a < BASE || a + bytes > BASE + b.shared.size() - 1024) emu::fail("outside of shared memory");
  return emu::memory(b) + a - BASE;
}
inline void mma(float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  auto& given = emu::exchange({a0, a1, a2, a3, b0, b1});
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float sums[4];
  for (int i = 0; i < 4; i++) {
    double sum = c[i];
    for (int k = 0; k < 16; k++) {
      const uint32_t a = given[4 * g + k % 8 / 2][i / 2 + k / 8 * 2], b = given[4 * (2 * t + i % 2) + k % 8 / 2][4 + k / 8];
      sum += double(emu::value(a >> k % 2 * 16)) * emu::value(b >> k % 2 * 16);
    }
    sums[i] = float(sum);
  }
  memcpy(c, sums, 16);
}
inline void load_rows(uint32_t* words, uint32_t from) {
  auto& given = emu::exchange({from});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    const uint32_t a = given[8 * i + lane / 4][0];
    if (a % 16) emu::fail("rows begin at multiples of 16 bytes");
    memcpy(words + i, at(emu::block(), a + lane % 4 * 4, 4), 4);
  }
}
template <int N>
void load_if(uint32_t* words, const void* from, bool valid) {
  if (valid && uintptr_t(from) % (4 * N)) emu::fail("loads begin at multiples of their size");
  for (int i = 0; i < N; i++) words[i] = valid ? static_cast<const uint32_t*>(from)[i] : 0;
}
inline void barrier_init(uint32_t a, int count) { at(emu::block(), a, 8); emu::block().barriers[a] = {count, count, 0, 0}; }
inline void barriers_ready() {}
inline void arrive(emu::Barrier& b) {
  if (--b.missing < 0) emu::fail("more arrived than were to come");
  emu::check(b);
}
#define ARRIVALS 1
inline void barrier_arrive(uint32_t a) { arrive(emu::barrier(emu::block(), a)); }
inline void barrier_arrive_if(uint32_t a, bool valid) { if (valid) barrier_arrive(a); }
inline void barrier_arrive_after(uint32_t value, uint32_t never, uint32_t a) { barrier_arrive(a + (value & never)); }
inline void barrier_expect(uint32_t a, int bytes) { emu::barrier(emu::block(), a).bytes += bytes; barrier_arrive(a); }
inline void barrier_wait(uint32_t a, int parity) {
  while ((emu::barrier(emu::block(), a).phase & 1) == parity) emu::yield();
  emu::moved = true;
}
inline void tensor_expected(const TensorMap&) {}
inline void box_copy(uint32_t to, const TensorMap& map, std::vector<int> c, uint32_t done) {
  if (int(c.size()) != map.rank || to % 1024) emu::fail("a box of another rank, or not at 1 KiB");
  c.resize(3);
  auto copy = [=, &block = emu::block()] {
    uint32_t bytes = 0;
    for (uint32_t k = 0; k < (map.rank == 3 ? map.box[2] : 1); k++)
      for (uint32_t j = 0; j < map.box[1]; j++)
        for (uint32_t i = 0; i < map.box[0]; i++, bytes++) {
          const uint64_t x = c[0] + i, y = c[1] + j, z = c[2] + k;
          const bool inside = x < map.sizes[0] && y < map.sizes[1] && (map.rank == 2 || z < map.sizes[2]);
          const uint32_t a = to + bytes;
          *at(block, a ^ (a >> 7 & 7) << 4, 1) = inside ? map.pointer[x + y * map.strides[0] + z * map.strides[1]] : 0;
        }
    auto& b = emu::barrier(block, done);
    b.bytes -= bytes;
    emu::check(b);
  };
  if (emu::order == 0) copy(); else emu::copies.push_back(copy);
}
inline void tensor_copy(uint32_t to, const TensorMap& m, int c0, int c1, uint32_t done) { box_copy(to, m, {c0, c1}, done); }
inline void tensor_copy(uint32_t to, const TensorMap& m, int c0, int c1, int c2, uint32_t done) { box_copy(to, m, {c0, c1, c2}, done); }
inline void dependents_may_start() {}
inline bool elected() { return threadIdx.x % 32 == 0; }
inline void predecessor_done() {}
inline uint32_t at_rank(uint32_t a, int rank) { return uint32_t(rank) << 24 | a; }
inline emu::Block& there(uint32_t a) {
  auto& b = emu::blocks[a >> 24];
  if (!b.running) emu::fail("that block has ended");
  return b;
}
inline void remote_store(uint32_t a, float4 v, uint32_t done) {
  emu::barrier(there(done), done & 0xffffff);
  auto copy = [=] {
    memcpy(at(there(a), a & 0xffffff, 16), &v, 16);
    auto& b = emu::barrier(there(done), done & 0xffffff);
    b.bytes -= 16;
    emu::check(b);
  };
  if (emu::order == 0) copy(); else emu::copies.push_back(copy);
}
inline void remote_arrive(uint32_t a) { arrive(emu::barrier(there(a), a & 0xffffff)); }
inline void cluster_begun() { emu::now->arrived = true, emu::now->phase = emu::phase, emu::check_cluster(); }
inline void cluster_ends() { cluster_begun(); }
inline void cluster_wait() {
  while (emu::phase == emu::now->phase) emu::yield();
  emu::moved = true;
}
