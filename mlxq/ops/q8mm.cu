// 8-bit activations times packed weights on Hopper's integer matrix instructions: sums of int8 products, exact in int32.
//
//   x         s8   (M, K)                       x_scales  float, X_SCALES 0: one, 1: (M,), 2: (M, K / GROUP)
//   words     u32  (N, K * BITS / 32)           scales, biases  S (N, K / GROUP)
//   y         Y    (M, N)                       Y_TYPE, S_TYPE 0 float32, 1 float16, 2 bfloat16
//
// With z = 2^(BITS - 1), S_g the exact sum of x * (code - z) over a group and X_g that of x:
//
//   PER_ROW 0   y = x_scale * sum over groups of (scale * S_g + (bias + z * scale) * X_g)      groups added in float32
//   X_SCALES 2  likewise, with the x_scale of each group inside the sum
//   PER_ROW 1   y = float(sum over K) * (x_scale * scale[n, 0])                                the sum in int32, K to 131071
//
// For rows of scales (PER_ROW 0) or words that are no whole 16 bytes; q8_stream.cu serves the others and is faster.
//
// The plan is qmm.cu's: a block makes 128 rows of W x BN rows of x, transposed; stages of PANELS panels of 128 columns;
// 128 threads of a warpgroup unpack 64 rows x 128 codes to int8 tiles that wgmma reads; the blocks of a cluster share K and
// add up in rank order. A group's int32 sum starts at the bits of 1.5 * 2^23, so that they are the float 1.5 * 2^23 + S_g
// themselves (|S_g| < 2^22): no conversion instruction.
//
// Ragged M and N: zeros are read, nothing is written. Limit: bytes of W for few rows; unpacking and, with groups, one
// multiply-add an element and group for many.

#define F16 Y_TYPE
#define LEFT_TRANSPOSED 0
#include "hopper.cuh"

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr int BK = 128 * PANELS;
constexpr int S_BYTES = S_TYPE == 0 ? 4 : 2;
constexpr int PANEL_WORDS = 128 * 16 * BITS;  // bytes of words in a panel
constexpr int GROUPS = BK > GROUP ? BK / GROUP : 1;
constexpr int S_WORDS = S_BYTES == 4 ? GROUPS : S_ALIGNED ? GROUPS / 2 : GROUPS / 2 + 1;  // of a row in a stage
constexpr int X_STAGE = PANELS * BN * 128, W_STAGE = PANELS * PANEL_WORDS, S_STAGE = 128 * 2 * S_WORDS * 4;
constexpr int TILES = 4 * 8192;
constexpr int COLUMN = 132;
constexpr int SPAN = PER_ROW ? 128 : GROUP;   // columns whose products one int32 sum takes at a time
constexpr int SPANS = 128 / SPAN;             // of a panel
constexpr float ZERO = 1 << (BITS - 1);
constexpr int START = 0x4b400000;             // the bits of 12582912 = 1.5 * 2^23

// The codes of a word, less z, as int8.
__device__ __forceinline__ void unpack(u32 word, u32* out) {
#if BITS == 8
  out[0] = word ^ 0x80808080u;
#elif BITS == 4
  const u32 even = ((word & 0x0f0f0f0fu | 0x80808080u) - 0x08080808u) ^ 0x80808080u;  // no borrow leaves a byte
  const u32 odd = ((word >> 4 & 0x0f0f0f0fu | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
  out[0] = __byte_perm(even, odd, 0x5140), out[1] = __byte_perm(even, odd, 0x7362);
#else
  u32 field[4];
#pragma unroll
  for (int i = 0; i < 4; i++) field[i] = ((word >> 2 * i & 0x03030303u | 0x80808080u) - 0x02020202u) ^ 0x80808080u;
  const u32 a = __byte_perm(field[0], field[1], 0x5140), b = __byte_perm(field[2], field[3], 0x5140);
  const u32 c = __byte_perm(field[0], field[1], 0x7362), d = __byte_perm(field[2], field[3], 0x7362);
  out[0] = __byte_perm(a, b, 0x5410), out[1] = __byte_perm(a, b, 0x7632);
  out[2] = __byte_perm(c, d, 0x5410), out[3] = __byte_perm(c, d, 0x7632);
#endif
}

__device__ __forceinline__ float scale_value(const u32* words, int i) {
  if (S_TYPE == 0) return __uint_as_float(words[i]);
  const u32 half = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
  return S_TYPE == 2 ? __uint_as_float(half << 16) : half_value(half);
}

__device__ __forceinline__ float stored_scale(const char* scales, size_t i) {
  if (S_TYPE == 0) return reinterpret_cast<const float*>(scales)[i];
  const u32 half = reinterpret_cast<const u16*>(scales)[i];
  return S_TYPE == 2 ? __uint_as_float(half << 16) : half_value(half);
}

// Where a tile of 128-byte rows begins, for wgmma: swizzled groups of eight rows.
__device__ __forceinline__ u64 descriptor(u32 at) {
  return u64((at & 0x3ffffu) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

extern "C" __global__ void __launch_bounds__(256, MIN_BLOCKS)
q8mm(const char* __restrict__ x, const float* __restrict__ x_scales, const char* __restrict__ words,
     const char* __restrict__ scales, const char* __restrict__ biases, char* __restrict__ y, int M, int N, int K) {
  SHARED_MEMORY(shared);
  const int tid = threadIdx.x, group = tid / 128, thread = tid % 128, lane = thread % 32;
  const int rank = blockIdx.x, ranks = gridDim.x, out0 = blockIdx.y * 128, m0 = blockIdx.z * BN;
  const u32 base = shared_address(shared);
  char* const tiles = shared;  // [warpgroup][2][8192]
  char* const x_ring = shared + TILES;
  char* const w_ring = x_ring + STAGES * X_STAGE;
#if !PER_ROW
  char* const s_ring = w_ring + STAGES * W_STAGE;
  float* const x_sums = reinterpret_cast<float*>(s_ring + STAGES * S_STAGE);  // [PANELS * SPANS][BN], of a stage
  float* const x_factors = x_sums + PANELS * SPANS * BN;                      // their x_scales
  const long long last_scale = (static_cast<long long>(N) * (K / GROUP) * S_BYTES - 1) / 4;  // word of the array
#endif
  wait_for_predecessor();

  const int groups_of_row = K / GROUP, stages = (K + BK - 1) / BK, share = (stages + ranks - 1) / ranks;
  const int begin = min(rank * share, stages), end = min(begin + share, stages);
  const size_t row_bytes = size_t(K) / 8 * BITS;

  auto load = [&](int stage) {
    if (stage < end) {
      const int slot = (stage - begin) % STAGES, k0 = stage * BK;
      const u32 x_to = base + TILES + slot * X_STAGE, w_to = base + TILES + STAGES * X_STAGE + slot * W_STAGE;
#pragma unroll
      for (int i = 0; i < PANELS * BN * 8; i += 256) {
        const int at = i + tid, c = at % 8, panel = at / 8 % PANELS, m = at / 8 / PANELS;
        if (PANELS * BN * 8 % 256 && at >= PANELS * BN * 8) break;
        const int k = k0 + panel * 128 + c * 16;
        const bool valid = m0 + m < M && k < K;
        copy_async<16>(x_to + panel * BN * 128 + m * 128 + (c ^ m % 8) * 16, x + (valid ? size_t(m0 + m) * K + k : 0), valid ? 16 : 0);
      }
      constexpr int COPIES = 16 * BITS / COPY;
#pragma unroll
      for (int i = 0; i < PANELS * 128 * COPIES; i += 256) {
        const int at = i + tid, q = at % COPIES, panel = at / COPIES % PANELS, row = at / COPIES / PANELS;
        const int n = out0 + row, column = (k0 + panel * 128) * BITS / 8 + q * COPY;
        const bool valid = n < N && column < row_bytes;
        copy_async<COPY>(w_to + panel * PANEL_WORDS + row * 16 * BITS + q * COPY, words + (valid ? size_t(n) * row_bytes + column : 0),
                         valid ? COPY : 0);
      }
#if !PER_ROW
      const u32 s_to = base + TILES + STAGES * (X_STAGE + W_STAGE) + slot * S_STAGE;
#pragma unroll
      for (int i = 0; i < 256 * S_WORDS; i += 256) {
        const int at = i + tid, word = at % S_WORDS, which = at / S_WORDS % 2, n = min(out0 + at / S_WORDS / 2, N - 1);
        const long long element = static_cast<long long>(n) * groups_of_row + min(k0 / GROUP, groups_of_row - 1);
        const long long from = min(element * S_BYTES / 4 + word, last_scale);
        const int bytes = static_cast<int>(min(4ll, static_cast<long long>(N) * groups_of_row * S_BYTES - from * 4));
        copy_async<4>(s_to + at * 4, (which ? biases : scales) + from * 4, bytes);
      }
#endif
    }
    copy_commit();
  };

  int sums[BN / 2];
  float scaled[PER_ROW ? 1 : BN / 2];
#pragma unroll
  for (int i = 0; i < BN / 2; i++) sums[i] = opaque(0);
#if !PER_ROW
#pragma unroll
  for (int i = 0; i < BN / 2; i++) scaled[i] = 0;
#endif
#pragma unroll 1
  for (int s = 0; s < STAGES - 2; s++) load(begin + s);

  int buffer = 0;
#pragma unroll 1
  for (int stage = begin; stage < end; stage++) {
    copy_wait<STAGES - 3>();
    fence_async();
    __syncthreads();
    load(stage + STAGES - 2);
    const int slot = (stage - begin) % STAGES;
#if !PER_ROW
#pragma unroll
    for (int i = 0; i < BN * PANELS * SPANS; i += 256) {  // X_g of the stage
      const int at = i + tid, m = at % BN, span = at / BN, panel = span / SPANS;
      if (BN * PANELS * SPANS % 256 && at >= BN * PANELS * SPANS) break;
      const char* row = x_ring + slot * X_STAGE + panel * BN * 128 + m * 128;
      int sum = 0;
#pragma unroll
      for (int c = 0; c < SPAN / 16; c++) {
        const uint4 v = *reinterpret_cast<const uint4*>(row + ((span % SPANS * (SPAN / 16) + c) ^ m % 8) * 16);
        sum = dot4(v.x, 0x01010101, dot4(v.y, 0x01010101, dot4(v.z, 0x01010101, dot4(v.w, 0x01010101, sum))));
      }
      float of_group = 1;
#if X_SCALES == 2
      const int group_of_x = (stage * BK + span * SPAN) / GROUP;
      if (m0 + m < M && group_of_x < groups_of_row) of_group = x_scales[size_t(m0 + m) * groups_of_row + group_of_x];
      x_factors[span * BN + m] = of_group;
#endif
      x_sums[span * BN + m] = static_cast<float>(sum) * of_group;
    }
#endif
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++) {
      const int row = thread / 2, half = thread % 2;
      const u32* w = reinterpret_cast<const u32*>(w_ring + slot * W_STAGE + panel * PANEL_WORDS + (group * 64 + row) * 16 * BITS +
                                                  half * 8 * BITS);
      char* tile = tiles + (group * 2 + buffer) * 8192 + row * 128;
      u32 codes[16];
#pragma unroll
      for (int q = 0; q < 2 * BITS; q += 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(w + q);
        unpack(v.x, codes + q * 8 / BITS), unpack(v.y, codes + (q + 1) * 8 / BITS);
        unpack(v.z, codes + (q + 2) * 8 / BITS), unpack(v.w, codes + (q + 3) * 8 / BITS);
      }
      if (panel) group_sync(group);  // all four warps' products of the panel before last have read the tile
#pragma unroll
      for (int c = 0; c < 4; c++)
        *reinterpret_cast<uint4*>(tile + ((half * 4 + c) ^ row % 8) * 16) =
            make_uint4(codes[4 * c], codes[4 * c + 1], codes[4 * c + 2], codes[4 * c + 3]);
      fence_async();
#if PER_ROW
      group_sync(group);
#else
      if (panel) group_sync(group); else __syncthreads();  // the sums of x too
#endif
      const u64 a = descriptor(base + (group * 2 + buffer) * 8192);
      const u64 b = descriptor(base + TILES + slot * X_STAGE + panel * BN * 128);
#if PER_ROW
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < 4; k++) wgmma_s8(sums, a + k * 2, b + k * 2);
      wgmma_commit();
      wgmma_wait<1>(sums);
#else
      const int n = group * 64 + thread / 32 * 16 + lane / 4;  // and n + 8
      const u32* s = reinterpret_cast<const u32*>(s_ring + slot * S_STAGE) + n * 2 * S_WORDS;
#pragma unroll
      for (int span = 0; span < SPANS; span++) {
#pragma unroll
        for (int i = 0; i < BN / 2; i++) sums[i] = START;
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < SPAN / 32; k++) wgmma_s8(sums, a + (span * (SPAN / 32) + k) * 2, b + (span * (SPAN / 32) + k) * 2);
        wgmma_commit();
        float scale[2], rest[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int array_row = min(out0 + n + 8 * i, N - 1), first = min(stage * BK / GROUP, groups_of_row - 1);
          const int odd = S_BYTES == 4 || S_ALIGNED ? 0 : (static_cast<long long>(array_row) * groups_of_row + first) & 1;
          const int at = odd + (panel * 128 + span * SPAN) / GROUP;
          scale[i] = scale_value(s + i * 16 * S_WORDS, at);
          rest[i] = scale_value(s + i * 16 * S_WORDS + S_WORDS, at) + ZERO * scale[i];
        }
        const float* x_sum = x_sums + (panel * SPANS + span) * BN;
        wgmma_wait<0>(sums);
#pragma unroll
        for (int i = 0; i < BN / 2; i++) {
          const float sum = __uint_as_float(sums[i]) - 12582912.0f;
          const int m = i / 4 * 8 + lane % 4 * 2 + i % 2;
          const float factor = X_SCALES == 2 ? x_sum[PANELS * SPANS * BN + m] : 1.0f;
          scaled[i] += fmaf(scale[i / 2 % 2] * factor, sum, rest[i / 2 % 2] * x_sum[m]);
        }
      }
#endif
      buffer ^= 1;
    }
  }
  wgmma_wait<0>(sums);
  copy_wait<0>();
  __syncthreads();

  // sums[4 * j + 2 * i + c]: row of W 16 * warp + lane / 4 + 8 * i, row of x 8 * j + 2 * (lane % 4) + c
  float* const mine = reinterpret_cast<float*>(shared);
  const int out = group * 64 + thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < BN / 2; i++)
    mine[(i / 4 * 8 + lane % 4 * 2 + i % 2) * COLUMN + out + i / 2 % 2 * 8] = PER_ROW ? __uint_as_float(sums[i]) : scaled[PER_ROW ? 0 : i];
  if (ranks > 1) cluster_sync(); else __syncthreads();
  for (int i = tid; i < BN * 32; i += 256) {  // four rows of W, a row of x
    const int m = i / 32, o = i % 32 * 4;
    if (m % ranks != rank || m0 + m >= M || out0 + o >= N) continue;
    float parts[4] = {0, 0, 0, 0};  // PER_ROW: the bits of integers
    for (int r = 0; r < ranks; r++) {
      const float4 v = ranks > 1 ? remote(base + (m * COLUMN + o) * 4, r) : *reinterpret_cast<const float4*>(mine + m * COLUMN + o);
      const float part[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; j++)
        parts[j] = PER_ROW ? __uint_as_float(__float_as_uint(parts[j]) + __float_as_uint(part[j])) : parts[j] + part[j];
    }
    const float x_scale = X_SCALES == 2 ? 1.0f : x_scales[X_SCALES ? m0 + m : 0];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int n = out0 + o + j;
      if (n >= N) break;
      const float value = PER_ROW ? static_cast<float>(static_cast<int>(__float_as_uint(parts[j]))) *
                                        (x_scale * stored_scale(scales, size_t(n) * groups_of_row))
                                  : x_scale * parts[j];
      const size_t at = size_t(m0 + m) * N + n;
      if (Y_TYPE == 0) reinterpret_cast<float*>(y)[at] = value;
      else reinterpret_cast<u16*>(y)[at] = static_cast<u16>(round2(value, 0.0f));
    }
  }
  if (ranks > 1) cluster_sync();
}
