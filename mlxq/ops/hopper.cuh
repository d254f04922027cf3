// Hopper's instructions as functions. BN is the width of a block's tile, F16 the 16-bit type (1 float16, else bfloat16),
// LEFT_TRANSPOSED whether the left tile has its rows along the reduced columns. tests/cuda/emulated.h has the same names for a CPU.

#include "halves.cuh"

__device__ __forceinline__ void store_u16(unsigned int to, unsigned short value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(value) : "memory");
}

// BYTES to shared memory, of which `bytes` are read and the rest are zeros.
template <int BYTES>
__device__ __forceinline__ void copy_async(unsigned int to, const void* from, int bytes) {
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// What this thread wrote to shared memory may be read by the matrix units after the next barrier.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of one warpgroup. The number stands in the instruction: from a register all sixteen would be taken.
__device__ __forceinline__ void group_sync(int group) {
  if (group == 0)
    asm volatile("bar.sync 1, 128;" ::: "memory");
  else
    asm volatile("bar.sync 2, 128;" ::: "memory");
}

// A barrier of the first warps of a block.
template <int WARPS>
__device__ __forceinline__ void workers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory");
}

// A warpgroup's registers a thread from here on, fewer or more than it was started with.
template <int N>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Four matrices of 8 x 8 halves, whose rows of 16 bytes begin where lanes 0-7, 8-15, 16-23 and 24-31 say, each turned over its
// diagonal: row lane / 4, columns 2 * (lane % 4), + 1.
__device__ __forceinline__ void load_turned(unsigned int* four, unsigned int row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(four[0]), "=r"(four[1]), "=r"(four[2]), "=r"(four[3])
               : "r"(row)
               : "memory");
}

// The same as they lie: row lane / 4, bytes 4 * (lane % 4) to + 3.
__device__ __forceinline__ void load_matrices(unsigned int* four, unsigned int row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(four[0]), "=r"(four[1]), "=r"(four[2]), "=r"(four[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void store_matrices(const unsigned int* four, unsigned int row) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(four[0]), "r"(four[1]),
               "r"(four[2]), "r"(four[3])
               : "memory");
}

// A constant that the compiler does not know: sums that it can make anew where it likes serialize wgmma (C7515). Of the
// sums' own type: a float that begins as an int is moved in and out of float registers at every step (C7514).
__device__ __forceinline__ int opaque(int value) {
  int d;
  asm volatile("mov.b32 %0, %1;" : "=r"(d) : "r"(value));
  return d;
}

__device__ __forceinline__ float opaque(float value) {
  float d;
  asm volatile("mov.f32 %0, %1;" : "=f"(d) : "f"(value));
  return d;
}

// Keeps a register that a product in flight reads from being given away before this.
__device__ __forceinline__ void in_use(unsigned int value) { asm volatile("" ::"r"(value) : "memory"); }

__device__ __forceinline__ int dot4(unsigned int a, unsigned int b, int c) {
  int d;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void wgmma_wait(void*) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// d += A B^T for 64 rows of A, BN rows of B and 16 columns; A and B are descriptors of tiles in shared memory.
#define TEN(t) "%" t "0,%" t "1,%" t "2,%" t "3,%" t "4,%" t "5,%" t "6,%" t "7,%" t "8,%" t "9"
#define R4 "%0,%1,%2,%3"
#define R8 R4 ",%4,%5,%6,%7"
#define R16 TEN("") ",%10,%11,%12,%13,%14,%15"
#define R32 TEN("") "," TEN("1") "," TEN("2") ",%30,%31"
#define R40 TEN("") "," TEN("1") "," TEN("2") "," TEN("3")
#define R48 R40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define R64 TEN("") "," TEN("1") "," TEN("2") "," TEN("3") "," TEN("4") "," TEN("5") ",%60,%61,%62,%63"
#define R80 R40 "," TEN("4") "," TEN("5") "," TEN("6") "," TEN("7")
#define R96 R80 "," TEN("8") ",%90,%91,%92,%93,%94,%95"
#define R128                                                                                                     \
  TEN("") "," TEN("1") "," TEN("2") "," TEN("3") "," TEN("4") "," TEN("5") "," TEN("6") "," TEN("7") "," TEN("8") \
  "," TEN("9") "," TEN("10") "," TEN("11") ",%120,%121,%122,%123,%124,%125,%126,%127"
#define D4(i) HELD(d[i]), HELD(d[i + 1]), HELD(d[i + 2]), HELD(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
#define D40(i) D32(i), D8(i + 32)
#define D48(i) D32(i), D16(i + 32)
#define D64(i) D32(i), D32(i + 32)
#define D80(i) D64(i), D16(i + 64)
#define D96(i) D64(i), D32(i + 64)
#define D128(i) D64(i), D64(i + 64)
#define WGMMA(n, registers, sums, a, b, transposed)                                                                     \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." F16_TYPE "." F16_TYPE " {" registers "}, %" a ", %" b \
               ", 1, 1, 1, %" transposed ", 0;"                                                                         \
               : sums                                                                                                   \
               : "l"(left), "l"(right), "n"(LEFT_TRANSPOSED))

#define HELD "+f"
__device__ __forceinline__ void wgmma(float* d, unsigned long long left, unsigned long long right) {
#if BN == 8
  WGMMA("8", R4, D4(0), "4", "5", "6");
#elif BN == 16
  WGMMA("16", R8, D8(0), "8", "9", "10");
#elif BN == 32
  WGMMA("32", R16, D16(0), "16", "17", "18");
#elif BN == 64
  WGMMA("64", R32, D32(0), "32", "33", "34");
#elif BN == 128
  WGMMA("128", R64, D64(0), "64", "65", "66");
#elif BN == 256
  WGMMA("256", R128, D128(0), "128", "129", "130");
#endif
}


// The same with A in registers: row lane / 4 (+ 8) of the warp's 16, columns 2 * (lane % 4), + 1 (+ 8).
#define WGMMA_LEFT(n, registers, sums, a0, a1, a2, a3, b)                                                             \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." F16_TYPE "." F16_TYPE " {" registers "}, {%" a0 ", %" a1 \
               ", %" a2 ", %" a3 "}, %" b ", 1, 1, 1, 0;"                                                             \
               : sums                                                                                                 \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right))
__device__ __forceinline__ void wgmma(float* d, const unsigned int* left, unsigned long long right) {
#if BN == 8
  WGMMA_LEFT("8", R4, D4(0), "4", "5", "6", "7", "8");
#elif BN == 16
  WGMMA_LEFT("16", R8, D8(0), "8", "9", "10", "11", "12");
#elif BN == 32
  WGMMA_LEFT("32", R16, D16(0), "16", "17", "18", "19", "20");
#elif BN == 64
  WGMMA_LEFT("64", R32, D32(0), "32", "33", "34", "35", "36");
#elif BN == 80
  WGMMA_LEFT("80", R40, D40(0), "40", "41", "42", "43", "44");
#elif BN == 96
  WGMMA_LEFT("96", R48, D48(0), "48", "49", "50", "51", "52");
#elif BN == 128
  WGMMA_LEFT("128", R64, D64(0), "64", "65", "66", "67", "68");
#elif BN == 160
  WGMMA_LEFT("160", R80, D80(0), "80", "81", "82", "83", "84");
#elif BN == 192
  WGMMA_LEFT("192", R96, D96(0), "96", "97", "98", "99", "100");
#elif BN == 256
  WGMMA_LEFT("256", R128, D128(0), "128", "129", "130", "131", "132");
#endif
}

#undef HELD

// The same for 32 columns of signed bytes and int32 sums.
#define WGMMA_S8(n, registers, sums, a, b)                                                                     \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k32.s32.s8.s8 {" registers "}, %" a ", %" b ", 1;" : sums \
               : "l"(left), "l"(right))
#define HELD "+r"
__device__ __forceinline__ void wgmma_s8(int* d, unsigned long long left, unsigned long long right) {
#if BN == 8
  WGMMA_S8("8", R4, D4(0), "4", "5");
#elif BN == 16
  WGMMA_S8("16", R8, D8(0), "8", "9");
#elif BN == 32
  WGMMA_S8("32", R16, D16(0), "16", "17");
#elif BN == 64
  WGMMA_S8("64", R32, D32(0), "32", "33");
#elif BN == 128
  WGMMA_S8("128", R64, D64(0), "64", "65");
#elif BN == 256
  WGMMA_S8("256", R128, D128(0), "128", "129");
#endif
}

// The same with A in registers: row lane / 4 (+ 8) of the warp's 16, columns 4 * (lane % 4) to + 3 (+ 16). ADD 0: d is written anew.
#define WGMMA_S8_LEFT(n, registers, sums, a0, a1, a2, a3, b, add)                                                           \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k32.s32.s8.s8 {" registers "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b \
               ", %" add ";"                                                                                               \
               : sums                                                                                                       \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "n"(ADD))
template <int ADD>
__device__ __forceinline__ void wgmma_s8(int* d, const unsigned int* left, unsigned long long right) {
#if BN == 8
  WGMMA_S8_LEFT("8", R4, D4(0), "4", "5", "6", "7", "8", "9");
#elif BN == 16
  WGMMA_S8_LEFT("16", R8, D8(0), "8", "9", "10", "11", "12", "13");
#elif BN == 32
  WGMMA_S8_LEFT("32", R16, D16(0), "16", "17", "18", "19", "20", "21");
#elif BN == 64
  WGMMA_S8_LEFT("64", R32, D32(0), "32", "33", "34", "35", "36", "37");
#elif BN == 128
  WGMMA_S8_LEFT("128", R64, D64(0), "64", "65", "66", "67", "68", "69");
#elif BN == 256
  WGMMA_S8_LEFT("256", R128, D128(0), "128", "129", "130", "131", "132", "133");
#endif
}
#undef HELD

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Four floats at the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ float4 remote(unsigned int at, int rank) {
  unsigned int there;
  float4 v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there)
               : "memory");
  return v;
}

__device__ __forceinline__ void wait_for_predecessor() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
