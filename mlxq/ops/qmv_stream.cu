// y = x @ W^T for up to eight rows of 16-bit x on Hopper: qmv.cu's product with the weights streamed by the copy engine.
//
//   x        X    (M, K)                X_TYPE 1 float16, 2 bfloat16
//   words    u32  (N, K * BITS / 32)    scales, biases  S (N, K / GROUP), S_TYPE 0 float32, 1 float16, 2 bfloat16
//   y        X    (M, N)
//
//   tile     16 rows of W; blocks are persistent and take tiles blockIdx.x, + gridDim.x, ...
//   stage    the 16 rows x WARPS * SEGMENT bytes of words, one copy of a box (128 bytes, 16 rows, columns of 128 bytes) whose
//            16-byte pieces are swizzled (eight rows x four lanes: no bank twice), in a ring of DEPTH; the tile's scales
//            and biases come with its first stage into a ring of their own. One copy at a time: each takes the engine
//            some 40 ns however small it is, and 48 of them a stage (a row each) were the first version's time
//   warps    one asks for the copies, one adds the sums up and writes y; WARPS multiply: warp w has bytes w * SEGMENT .. of
//            every stage, so its part of x is the same for every tile and stays in registers: 2 * SEGMENT * 8 / BITS / 16 a
//            stage, whatever M is
//   sums     a warp's 16 x MP sums of a tile go to one of BUFFERS places; added in the warps' order
//
// Tensor cores are fed integers, as in qmv.cu. bfloat16: a field of a word, masked where it stands, is the bfloat16 whose bits
// it is: code * 2^position * 2^-133, exactly (up to 255 the bits of a bfloat16 are linear, the first binade and the
// subnormals alike); x is multiplied by 2^(RAISE - position), so no code is moved or shifted out of an offset. A warp
// whose x has a value of 2^36 or more (or NaN, infinity) does not raise its x. float16 has too few exponents for that:
// there u * (C + code) as in qmv.cu.
//
// Rows of words of whole 128 bytes, of scales of whole 16; K / 8 * BITS at most STAGES * WARPS * SEGMENT. Any N, M <= MP.
// Limit: the bytes of W at the memory's rate.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#include "copies.cuh"

constexpr int P = 32 / BITS;                                // codes of a word
constexpr int CODES = SEGMENT * 8 / BITS;                   // of a row in a warp's part of a stage
constexpr int UNIT = GROUP < CODES ? GROUP : CODES;         // codes with one scale
constexpr int UNITS = CODES / UNIT;
constexpr int LANE_WORDS = UNIT * BITS / 128;               // of a unit: four lanes share 16 bytes of a row
constexpr int STAGE_BYTES = 16 * WARPS * SEGMENT;
constexpr int S_BYTES = S_TYPE == 0 ? 4 : 2;
constexpr int COLUMN = 20;                                  // floats between columns of a warp's sums: no bank twice
constexpr int PARTIAL = MP * COLUMN;
constexpr int S_WORDS = (UNITS * S_BYTES + 3) / 4;          // of a row in a warp's part of a stage

#if X_TYPE == 1
constexpr int POSITION = BITS == 2 ? 8 : BITS == 4 ? 6 : 2;
constexpr u32 MAGIC = 0x64006400u;
constexpr float CENTRE = 1024 >> POSITION;
#define MMA_TYPE "f16"
#else
constexpr int RAISE = 90;
constexpr u32 TOO_LARGE = (127 + 36) << 7;
#define MMA_TYPE "bf16"
#endif

__device__ __forceinline__ float half_value(u32 pattern) {
  float value;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(pattern & 0xffffu));
  return value;
}

template <int TYPE>
__device__ __forceinline__ float element(const u32* words, int i) {
  if (TYPE == 0) return __uint_as_float(words[i]);
  const u32 word = words[i / 2];
  if (TYPE == 2) return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
  return half_value(i % 2 ? word >> 16 : word);
}

// Pairs of 16-bit floats: codes p and p + P / 2 of a word.
__device__ __forceinline__ void unpack(u32 word, u32* pairs, u32 magic) {
#if X_TYPE == 2
  constexpr u32 MASK = ((1u << BITS) - 1u) * 0x10001u;
  constexpr int HERE = 8 / BITS;  // pairs in the low bytes of the halves
  const u32 rest = word >> 8;
#pragma unroll
  for (int p = 0; p < P / 2; p++) pairs[p] = (p < HERE ? word : rest) & MASK << (p % HERE * BITS);
#else
  constexpr u32 MASK = (((1u << BITS) - 1u) << POSITION) * 0x10001u;
#pragma unroll
  for (int p = 0; p < P / 2; p++) {
    const int shift = BITS * p - POSITION;
    const u32 moved = shift >= 0 ? word >> (shift & 31) : word << (-shift & 31);
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(pairs[p]) : "r"(moved), "n"(MASK), "r"(magic));  // moved & MASK | magic
  }
#endif
}

#if X_TYPE == 2
__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
#endif

__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The units' scales of a row of 128 swizzled bytes, from byte `at`, a multiple of their size.
__device__ __forceinline__ void read_scales(u32* out, const char* row, int at, int g) {
  const char* from = row + ((at / 16) ^ g) * 16 + at % 16;
  if (UNITS * S_BYTES == 2) {
    out[0] = *reinterpret_cast<const u16*>(from);
  } else if (UNITS * S_BYTES == 4) {
    out[0] = *reinterpret_cast<const u32*>(from);
  } else if (UNITS * S_BYTES == 8) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    out[0] = v.x, out[1 % S_WORDS] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < S_WORDS; i += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(row + ((at / 16 + i / 4) ^ g) * 16);
      out[i] = v.x, out[(i + 1) % S_WORDS] = v.y, out[(i + 2) % S_WORDS] = v.z, out[(i + 3) % S_WORDS] = v.w;
    }
  }
}

extern "C" __global__ void __launch_bounds__((WARPS + 2) * 32, BLOCKS)
qmv_stream(const char* __restrict__ x, const __grid_constant__ TensorMap words, const __grid_constant__ TensorMap scales,
           const __grid_constant__ TensorMap biases, u16* __restrict__ y, int M, int N, int K) {
  extern __shared__ __align__(1024) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int tiles = (N + 15) / 16;
  // words [DEPTH][columns of 128 bytes][16][128], scales [SCALE_DEPTH][2][SCALE_COLUMNS][16][128], sums of x
  // [WARPS][STAGES * UNITS][MP], partial sums [BUFFERS][WARPS][MP][COLUMN], barriers
  char* const scale_ring = shared + DEPTH * STAGE_BYTES;
  constexpr int SCALE_STAGE = 2 * SCALE_COLUMNS * 2048;
  float* const x_sums = reinterpret_cast<float*>(scale_ring + SCALE_DEPTH * SCALE_STAGE);
  float* const partial = x_sums + WARPS * STAGES * UNITS * MP;
  const u32 base = static_cast<u32>(__cvta_generic_to_shared(shared));
  const u32 full = static_cast<u32>(__cvta_generic_to_shared(partial + BUFFERS * WARPS * PARTIAL));
  const u32 empty = full + 8 * DEPTH, summed = empty + 8 * DEPTH, taken = summed + 8 * BUFFERS;
  if (threadIdx.x == 0) {
    for (int i = 0; i < DEPTH; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, WARPS);
    for (int i = 0; i < BUFFERS; i++) barrier_init(summed + 8 * i, WARPS), barrier_init(taken + 8 * i, 1);
    barriers_ready();
  }
  __syncthreads();

  if (warp == WARPS) {  // the copies
    dependents_may_start();
    if (lane) return;
    int slot = 0, round = 0, scale_slot = 0;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
#pragma unroll 1
      for (int stage = 0; stage < STAGES; stage++) {
        const u32 done = full + 8 * slot;
        if (round) barrier_wait(empty + 8 * slot, (round - 1) & 1);
        barrier_expect(done, STAGE_BYTES + (stage ? 0 : SCALE_STAGE));
        tensor_copy(base + slot * STAGE_BYTES, words, 0, tile * 16, stage * (WARPS * SEGMENT / 128), done);
        if (stage == 0) {
          const u32 to = base + DEPTH * STAGE_BYTES + scale_slot * SCALE_STAGE;
#pragma unroll
          for (int c = 0; c < SCALE_COLUMNS; c++) {
            tensor_copy(to + c * 2048, scales, c * 128, tile * 16, done);
            tensor_copy(to + (SCALE_COLUMNS + c) * 2048, biases, c * 128, tile * 16, done);
          }
        }
        if (++slot == DEPTH) slot = 0, round++;
      }
      if (++scale_slot == SCALE_DEPTH) scale_slot = 0;
    }
    return;
  }

  if (warp == WARPS + 1) {  // y
    predecessor_done();  // the kernel before may still read what y is now
    dependents_may_start();
    int buffer = 0, round = 0;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      barrier_wait(summed + 8 * buffer, round & 1);
      const int column = lane / 4, rows = lane % 4 * 4;
      float4 sum = make_float4(0, 0, 0, 0);
      if (column < MP) {
        const float* from = partial + buffer * WARPS * PARTIAL + column * COLUMN + rows;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
          const float4 part = *reinterpret_cast<const float4*>(from + w * PARTIAL);
          sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(taken + 8 * buffer);
      if (++buffer == BUFFERS) buffer = 0, round++;
      const int n = tile * 16 + rows;
      if (column >= MP || column >= M || n >= N) continue;
      u32 low, high;
      asm("cvt.rn." MMA_TYPE "x2.f32 %0, %1, %2;" : "=r"(low) : "f"(sum.y), "f"(sum.x));
      asm("cvt.rn." MMA_TYPE "x2.f32 %0, %1, %2;" : "=r"(high) : "f"(sum.w), "f"(sum.z));
      u16* to = y + size_t(column) * N + n;
      if (N % 4 == 0) {
        *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
      } else {
        to[0] = static_cast<u16>(low);
        if (n + 1 < N) to[1] = static_cast<u16>(low >> 16);
        if (n + 2 < N) to[2] = static_cast<u16>(high);
        if (n + 3 < N) to[3] = static_cast<u16>(high >> 16);
      }
    }
    return;
  }

  // This warp's part of x, for row g of x in the lanes of g: the values that meet the lane's words.
  predecessor_done();
  dependents_may_start();
  u32 xs[STAGES][UNITS][LANE_WORDS][P / 2];
  float* const my_sums = x_sums + warp * STAGES * UNITS * MP;
#if X_TYPE == 2
  bool large = false;
#endif
#pragma unroll
  for (int s = 0; s < STAGES; s++)
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      const int k = (s * WARPS + warp) * CODES + u * UNIT + t * P;
      u32 v[LANE_WORDS * P / 2];
      const char* from = x + (size_t(g) * K + k) * 2;
#pragma unroll
      for (int w = 0; w < LANE_WORDS; w++) {
        const bool valid = g < M && k + w * 4 * P < K;
        if (P == 4) {
          const uint2 r = valid ? *reinterpret_cast<const uint2*>(from + w * 8 * P) : make_uint2(0, 0);
          v[2 * w] = r.x, v[2 * w + 1] = r.y;
        } else {
#pragma unroll
          for (int i = 0; i < P / 2; i += 4) {
            const uint4 r = valid ? *reinterpret_cast<const uint4*>(from + w * 8 * P + 4 * i) : make_uint4(0, 0, 0, 0);
            v[w * P / 2 + i] = r.x, v[w * P / 2 + i + 1] = r.y, v[w * P / 2 + i + 2] = r.z, v[w * P / 2 + i + 3] = r.w;
          }
        }
      }
      float sum = 0;
#pragma unroll
      for (int j = 0; j < LANE_WORDS * P; j++) sum += element<X_TYPE>(v, j);
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (t == 0 && g < MP) my_sums[(s * UNITS + u) * MP + g] = sum;
#pragma unroll
      for (int w = 0; w < LANE_WORDS; w++) {
        const u32* of = v + w * P / 2;
#pragma unroll
        for (int p = 0; p < P / 2; p++) {
          xs[s][u][w][p] = __byte_perm(of[p / 2], of[p / 2 + P / 4], p % 2 ? 0x7632 : 0x5410);
#if X_TYPE == 2
          large |= max(of[p] & 0x7fffu, of[p] >> 16 & 0x7fffu) >= TOO_LARGE;
#endif
        }
      }
    }
  // u32 of the sums, and what undoes it: two factors, for one would not be a float
  float up = 1, down = 1, more_down = 1;
  u32 magic = 0;
  __syncwarp();
#if X_TYPE == 2
  large = __any_sync(0xffffffffu, large);
  up = __uint_as_float(large ? 0u : (127u - 133u + RAISE) << 23);  // 2^-133 is below the normal floats: made below
  if (large) up = __uint_as_float(1u << (149 - 133));
  down = __uint_as_float((127u + (large ? 70u : 133u - RAISE)) << 23);
  if (large) more_down = __uint_as_float((127u + 63u) << 23);
#pragma unroll
  for (int s = 0; s < STAGES; s++)
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
      for (int w = 0; w < LANE_WORDS; w++)
#pragma unroll
        for (int p = 0; p < P / 2; p++) {
          const u32 by = (127 + (large ? 0 : RAISE) - p % (8 / BITS) * BITS) << 7;
          xs[s][u][w][p] = mul2(xs[s][u][w][p], by * 0x10001u);
        }
#else
  up = 1 << POSITION, down = 1.0f / (1 << POSITION);
  asm volatile("mov.u32 %0, %1;" : "=r"(magic) : "n"(MAGIC));
#endif
  for (int i = lane; i < STAGES * UNITS * MP; i += 32) my_sums[i] *= up;
  __syncwarp();

  int slot = 0, round = 0, scale_slot = 0, buffer = 0, buffer_round = 0;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float total[4] = {0, 0, 0, 0};
    const char* const scales_of = scale_ring + scale_slot * SCALE_STAGE + g * 128;
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
      barrier_wait(full + 8 * slot, round & 1);
      const char* const rows = shared + slot * STAGE_BYTES + warp * SEGMENT / 128 * 2048 + g * 128 + t * 4;
      constexpr int PIECES = SEGMENT / 16;  // of a row in a warp's part of a stage
      const int first = (s * WARPS + warp) * CODES;
      u32 scale_words[2][S_WORDS], bias_words[2][S_WORDS];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int byte = s < STAGES - 1 || first < K ? first / GROUP * S_BYTES : 0;  // of a row's
        const char* const at = scales_of + byte / 128 * 2048 + h * 1024;
        read_scales(scale_words[h], at, byte % 128, g), read_scales(bias_words[h], at + SCALE_COLUMNS * 2048, byte % 128, g);
      }
#pragma unroll
      for (int u = 0; u < UNITS; u++) {
        if (s == STAGES - 1 && first + u * UNIT >= K) break;
        u32 w[2][LANE_WORDS];
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
          for (int i = 0; i < LANE_WORDS; i++) {
            const int piece = warp * PIECES % 8 + u * LANE_WORDS + i;
            w[h][i] = *reinterpret_cast<const u32*>(rows + h * 1024 + (piece ^ g) * 16);
          }
        }
        float acc[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < LANE_WORDS; i++) {
          u32 top[P / 2], low[P / 2];
          unpack(w[0][i], top, magic), unpack(w[1][i], low, magic);
#pragma unroll
          for (int j = 0; j < P / 4; j++)
            mma(acc, top[2 * j], low[2 * j], top[2 * j + 1], low[2 * j + 1], xs[s][u][i][2 * j], xs[s][u][i][2 * j + 1]);
        }
        const float* const of_x = my_sums + (s * UNITS + u) * MP;
        float sum_0 = of_x[0], sum_1 = 0;
        if (MP > 1) {
          const float2 both = *reinterpret_cast<const float2*>(of_x + (2 * t & (MP - 1)));
          sum_0 = both.x, sum_1 = both.y;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float scale = element<S_TYPE>(scale_words[h], u);
          float bias = element<S_TYPE>(bias_words[h], u);
#if X_TYPE == 1
          bias -= CENTRE * scale;
#endif
          total[2 * h] = __fmaf_rn(scale, acc[2 * h], __fmaf_rn(bias, sum_0, total[2 * h]));
          if (MP > 1) total[2 * h + 1] = __fmaf_rn(scale, acc[2 * h + 1], __fmaf_rn(bias, sum_1, total[2 * h + 1]));
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * slot);
      if (++slot == DEPTH) slot = 0, round++;
    }
    if (++scale_slot == SCALE_DEPTH) scale_slot = 0;
    if (buffer_round) barrier_wait(taken + 8 * buffer, (buffer_round - 1) & 1);
    float* const mine = partial + (buffer * WARPS + warp) * PARTIAL;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int column = 2 * t + j % 2;
      if (column < MP) mine[column * COLUMN + g + 8 * (j / 2)] = total[j] * down * more_down;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(summed + 8 * buffer);
    if (++buffer == BUFFERS) buffer = 0, buffer_round++;
  }
}
