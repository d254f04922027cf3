// Many rows times packed weights on Hopper's warpgroup matrix instructions, on the canonical bytes.
//
//   FORWARD = 1   y (M, N) = x (M, K) @ W^T          out = N (the rows of W), reduced = K (its columns)
//   FORWARD = 0   y (M, K) = x (M, N) @ W            out = K, reduced = N: the gradient of the other, on the same bytes
//   GROUPED y[rows[m]] = x[m] @ W[expert of m]: rows of x in the order of their experts, tiles[] says whose (experts.cu)
//
//   x        X    (.., M, reduced)             X_TYPE 1 float16, 2 bfloat16
//   words    u32  (experts, N, K * BITS / 32)
//   scales   S    (experts, N, K / GROUP)      S_TYPE 0 float32, 1 float16, 2 bfloat16; biases too
//   y        X    (.., M, out)
//
// A block makes 128 out x BN rows of x, y transposed: W is the left operand, so that few rows of x waste nothing.
//
//   stage    PANELS panels of 64 reduced columns: x (BN, 64) swizzled as wgmma reads it, words, scales; cp.async ring
//   panel    64 x 64 weights a warpgroup: its 128 threads unpack 32 codes each (one row, half the columns, one scale),
//            W = scale * code + bias rounded once to X, into one of two swizzled 8 KB tiles; four wgmma of 64 x BN x 16
//            read that tile while the next is being unpacked
//   FORWARD  both orientations unpack the same 64 x 64 tiles; FORWARD stacks them along rows and reads them with the
//            reduced columns contiguous, otherwise along columns and reads them transposed
//   split    the blocks of a cluster share the reduced columns; their float32 sums meet through distributed shared
//            memory and are added in rank order: the same bits every time
//
// Ragged M, N: zeros are read, nothing is written. K a multiple of GROUP. Limit: bytes of W for few rows (an SM unpacks
// up to its issue rate), the matrix units for many.

#define F16 X_TYPE
#define LEFT_TRANSPOSED (FORWARD ? 0 : 1)
#include "hopper.cuh"

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr int BK = 64 * PANELS;
constexpr int S_BYTES = S_TYPE == 0 ? 4 : 2;
constexpr int PANEL_WORDS = 128 * 8 * BITS;                        // bytes of words in a panel: [warpgroup][64][8 * BITS]
constexpr int GROUPS = FORWARD ? (BK > GROUP ? BK / GROUP : 1) : (128 > GROUP ? 128 / GROUP : 1);  // of a row in a stage
constexpr int SCALE_ROWS = FORWARD ? 128 : BK;
constexpr int S_WORDS = S_BYTES == 4 ? GROUPS : S_ALIGNED ? GROUPS / 2 : GROUPS / 2 + 1;     // of a row in a stage
constexpr int X_STAGE = PANELS * BN * 128, W_STAGE = PANELS * PANEL_WORDS, S_STAGE = SCALE_ROWS * 2 * S_WORDS * 4;
constexpr int TILES = 4 * 8192;                                    // two warpgroups x two tiles of 64 x 64 weights
constexpr int COLUMN = 132;                                        // floats of a row of x in the sums: no bank twice

// Codes 2j, 2j + 1 of a word as a pair of 16-bit floats; MAGIC is still to be subtracted.
#if BITS == 8 && X_TYPE == 2
constexpr u32 MAGIC = 0;  // bfloat16 holds 0 .. 255 itself
#else
constexpr u32 MAGIC = X_TYPE == 1 ? 0x64006400u : 0x43004300u;  // 1024, 128
#endif

__device__ __forceinline__ void unpack(u32 word, u32* pairs) {
#if BITS == 4
  const u32 high = word >> 4;
#pragma unroll
  for (int j = 0; j < 4; j++) pairs[j] = and_or(__byte_perm(word, high, j | (4 + j) << 8), 0x000f000fu, MAGIC);
#elif BITS == 2
  const u32 w2 = word >> 2, w4 = word >> 4, w6 = word >> 6;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    pairs[2 * j] = and_or(__byte_perm(word, w2, j | (4 + j) << 8), 0x00030003u, MAGIC);
    pairs[2 * j + 1] = and_or(__byte_perm(w4, w6, j | (4 + j) << 8), 0x00030003u, MAGIC);
  }
#elif X_TYPE == 1
#pragma unroll
  for (int j = 0; j < 2; j++) pairs[j] = __byte_perm(word, 0x64u, 2 * j | 4 << 4 | (2 * j + 1) << 8 | 4 << 12);
#else
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const float low = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540 + 2 * j)) - 8388608.0f;  // 2^23 + q - 2^23
    const float high = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7541 + 2 * j)) - 8388608.0f;
    pairs[j] = __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
  }
#endif
}

template <int TYPE>
__device__ __forceinline__ float low_value(u32 pair) {
  return TYPE == 2 ? __uint_as_float(pair << 16) : half_value(pair & 0xffffu);
}

template <int TYPE>
__device__ __forceinline__ float high_value(u32 pair) {
  return TYPE == 2 ? __uint_as_float(pair & 0xffff0000u) : half_value(pair >> 16);
}

// 32 codes of one row, one scale and bias, into the four 16-byte places of a tile's row that `half` names.
__device__ __forceinline__ void weights_to_tile(const u32* words, const u32* scales, const u32* biases, int group, char* row,
                                                int half, int swizzle, int wait_for) {
  const int i = group;  // of the elements in scales[]
#if X_TYPE == S_TYPE
  const u32 s = __byte_perm(scales[i / 2], 0, i % 2 ? 0x3232 : 0x1010), b = __byte_perm(biases[i / 2], 0, i % 2 ? 0x3232 : 0x1010);
#else
  const u32 s_word = scales[S_BYTES == 4 ? i : i / 2], b_word = biases[S_BYTES == 4 ? i : i / 2];
  const float s = S_TYPE == 0 ? __uint_as_float(s_word) : i % 2 ? high_value<S_TYPE>(s_word) : low_value<S_TYPE>(s_word);
  const float b = S_TYPE == 0 ? __uint_as_float(b_word) : i % 2 ? high_value<S_TYPE>(b_word) : low_value<S_TYPE>(b_word);
#endif
  u32 w[BITS], pairs[16];
  if (BITS >= 4) {
#pragma unroll
    for (int q = 0; q < BITS / 4; q++) {
      const uint4 v = reinterpret_cast<const uint4*>(words)[q];
      w[4 * q] = v.x, w[4 * q + 1] = v.y, w[4 * q + 2] = v.z, w[4 * q + 3] = v.w;
    }
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(words);
    w[0] = v.x, w[1] = v.y;
  }
#pragma unroll
  for (int q = 0; q < BITS; q++) unpack(w[q], pairs + q * 16 / BITS);
#pragma unroll
  for (int j = 0; j < 16; j++) {
    const u32 code = MAGIC ? sub2(pairs[j], MAGIC) : pairs[j];
#if X_TYPE == S_TYPE
    pairs[j] = fma2(code, s, b);
#else
    pairs[j] = round2(fmaf(low_value<X_TYPE>(code), s, b), fmaf(high_value<X_TYPE>(code), s, b));
#endif
  }
  if (wait_for >= 0) group_sync(wait_for);  // all four warps' products of the panel before last have read the tile
#pragma unroll
  for (int c = 0; c < 4; c++)
    *reinterpret_cast<uint4*>(row + ((half * 4 + c) ^ swizzle) * 16) =
        make_uint4(pairs[4 * c], pairs[4 * c + 1], pairs[4 * c + 2], pairs[4 * c + 3]);
}

// Where a 64-column tile begins, for wgmma: 128-byte rows in swizzled groups of eight.
__device__ __forceinline__ u64 descriptor(u32 at) {
  return u64((at & 0x3ffffu) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

extern "C" __global__ void __launch_bounds__(256, MIN_BLOCKS)
qmm(const char* x, const char* __restrict__ words, const char* __restrict__ scales,
    const char* __restrict__ biases, char* __restrict__ y, int M, int N, int K, const uint4* tile_table,
    const int* rows) {
  SHARED_MEMORY(shared);
  const int tid = threadIdx.x, group = tid / 128, thread = tid % 128;
  const int rank = blockIdx.x, ranks = gridDim.x;
  const int out0 = blockIdx.y * 128, outs = FORWARD ? N : K, reduced = FORWARD ? K : N;
  const u32 base = shared_address(shared);
  char* const tiles = shared;                                  // [warpgroup][2][8192]
  char* const x_ring = shared + TILES;
  char* const w_ring = x_ring + STAGES * X_STAGE;
  char* const s_ring = w_ring + STAGES * W_STAGE;
  int* const rows_of_x = reinterpret_cast<int*>(s_ring + STAGES * S_STAGE);  // [BN], -1: none
  int* const rows_of_y = rows_of_x + BN;
  wait_for_predecessor();

#if GROUPED
  const uint4 tile = tile_table[blockIdx.z];
  if (tile.z == 0) return;  // the whole cluster
  for (int m = tid; m < BN; m += 256) {
    const bool valid = m < int(tile.z);
    rows_of_x[m] = valid ? int(tile.y) + m : -1, rows_of_y[m] = valid ? rows[tile.y + m] : 0;
  }
  const int expert = tile.x;
  words += size_t(expert) * N * (size_t(K) / 8 * BITS);
  scales += size_t(expert) * N * (K / GROUP) * S_BYTES;
  biases += size_t(expert) * N * (K / GROUP) * S_BYTES;
#else
  for (int m = tid; m < BN; m += 256) {
    const int row = blockIdx.z * BN + m;
    rows_of_x[m] = row < M ? row : -1, rows_of_y[m] = row;
  }
#endif
  __syncthreads();

  const int groups_of_row = K / GROUP, stages = (reduced + BK - 1) / BK, share = (stages + ranks - 1) / ranks;
  const int begin = min(rank * share, stages), end = min(begin + share, stages);
  const size_t row_bytes = size_t(K) / 8 * BITS;
  const long long last_scale = (static_cast<long long>(N) * groups_of_row * S_BYTES - 1) / 4;  // word of the array

  auto load = [&](int stage) {
    if (stage < end) {
      const int slot = (stage - begin) % STAGES, r0 = stage * BK;
      const u32 x_to = base + TILES + slot * X_STAGE, w_to = base + TILES + STAGES * X_STAGE + slot * W_STAGE;
      const u32 s_to = base + TILES + STAGES * (X_STAGE + W_STAGE) + slot * S_STAGE;
#pragma unroll
      for (int i = 0; i < PANELS * BN * 8; i += 256) {  // 16 bytes of a row of x
        const int at = i + tid, c = at % 8, panel = at / 8 % PANELS, m = at / 8 / PANELS;
        if (PANELS * BN * 8 % 256 && at >= PANELS * BN * 8) break;
        const int row = rows_of_x[m], r = r0 + panel * 64 + c * 8;
        const u32 to = x_to + panel * BN * 128 + m * 128 + (c ^ m % 8) * 16;
        const char* from = x + (size_t(row < 0 ? 0 : row) * reduced + (r < reduced ? r : 0)) * 2;
        const int valid = row < 0 ? 0 : max(0, min(16, (reduced - r) * 2));
        if (X_COPY == 16) {
          copy_async<16>(to, from, valid);
        } else if (X_COPY >= 4) {
#pragma unroll
          for (int b = 0; b < 16; b += X_COPY) copy_async<X_COPY == 8 ? 8 : 4>(to + b, valid > b ? from + b : x, max(0, min(X_COPY, valid - b)));
        } else {
#pragma unroll
          for (int b = 0; b < 16; b += 2) store_u16(to + b, valid > b ? *reinterpret_cast<const u16*>(from + b) : u16(0));
        }
      }
      constexpr int COPIES = 8 * BITS / COPY;  // of a row in a 64-column tile
#pragma unroll
      for (int i = 0; i < PANELS * 128 * COPIES; i += 256) {
        const int at = i + tid;
        if (PANELS * 128 * COPIES % 256 && at >= PANELS * 128 * COPIES) break;
        const int q = at % COPIES;
        int n, column, to;
        if (FORWARD) {  // a row's panels, then the next row
          const int panel = at / COPIES % PANELS, row = at / COPIES / PANELS;
          n = out0 + row, column = (r0 + panel * 64) * BITS / 8 + q * COPY;
          to = panel * PANEL_WORDS + row * 8 * BITS + q * COPY;
        } else {
          const int tile = at / COPIES % 2, row = at / COPIES / 2;
          n = r0 + row, column = (out0 + tile * 64) * BITS / 8 + q * COPY;
          to = row / 64 * PANEL_WORDS + (tile * 64 + row % 64) * 8 * BITS + q * COPY;
        }
        const bool valid = n < N && column < row_bytes;
        copy_async<COPY>(w_to + to, words + (valid ? size_t(n) * row_bytes + column : 0), valid ? COPY : 0);
      }
#pragma unroll
      for (int i = 0; i < SCALE_ROWS * 2 * S_WORDS; i += 256) {
        const int at = i + tid;
        if (SCALE_ROWS * 2 * S_WORDS % 256 && at >= SCALE_ROWS * 2 * S_WORDS) break;
        const int word = at % S_WORDS, which = at / S_WORDS % 2, row = at / S_WORDS / 2;
        const int n = min((FORWARD ? out0 : r0) + row, N - 1);
        const long long element = static_cast<long long>(n) * groups_of_row + min((FORWARD ? r0 : out0) / GROUP, groups_of_row - 1);
        const long long from = min(element * S_BYTES / 4 + word, last_scale);
        const int bytes = static_cast<int>(min(4ll, static_cast<long long>(N) * groups_of_row * S_BYTES - from * 4));
        copy_async<4>(s_to + at * 4, (which ? biases : scales) + from * 4, bytes);
      }
    }
    copy_commit();
  };

  float sums[BN / 2];
#pragma unroll
  for (int i = 0; i < BN / 2; i++) sums[i] = 0;
#pragma unroll 1
  for (int s = 0; s < STAGES - 2; s++) load(begin + s);

  int buffer = 0;
#pragma unroll 1
  for (int stage = begin; stage < end; stage++) {
    copy_wait<STAGES - 3>();
    fence_async();
    __syncthreads();  // the stage is there for all; the stage before last has been read by all
    load(stage + STAGES - 2);
    const int slot = (stage - begin) % STAGES, r0 = stage * BK;
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++) {
      const int row = thread / 2, half = thread % 2;
      const int n = FORWARD ? group * 64 + row : panel * 64 + row;                       // row of the scales in the stage
      const int column = (FORWARD ? panel * 64 : group * 64) + half * 32;                // from the stage's first
      const int array_row = min((FORWARD ? out0 : r0) + n, N - 1);
      const int first_group = min((FORWARD ? r0 : out0) / GROUP, groups_of_row - 1);
      const int odd = S_BYTES == 4 || S_ALIGNED ? 0 : (static_cast<long long>(array_row) * groups_of_row + first_group) & 1;
      const int within = column / GROUP < GROUPS ? column / GROUP : GROUPS - 1;
      const u32* s = reinterpret_cast<const u32*>(s_ring + slot * S_STAGE) + n * 2 * S_WORDS;
      const u32* w = reinterpret_cast<const u32*>(w_ring + slot * W_STAGE + panel * PANEL_WORDS + (group * 64 + row) * 8 * BITS +
                                                  half * 4 * BITS);
      char* tile = tiles + (group * 2 + buffer) * 8192;
      weights_to_tile(w, s, s + S_WORDS, odd + within, tile + row * 128, half, row % 8,
                      panel ? group : -1);
      fence_async();
      group_sync(group);
      wgmma_begin();
      const u64 a = descriptor(base + (group * 2 + buffer) * 8192);
      const u64 b = descriptor(base + TILES + slot * X_STAGE + panel * BN * 128);
#pragma unroll
      for (int k = 0; k < 4; k++) wgmma(sums, a + (FORWARD ? k * 32 : k * 2048) / 16, b + k * 32 / 16);
      wgmma_commit();
      wgmma_wait<1>(sums);  // the one before is done: its tile may be written again
      buffer ^= 1;
    }
  }
  wgmma_wait<0>(sums);
  copy_wait<0>();
  __syncthreads();

  // sums[4 * j + 2 * i + c]: out 16 * warp + lane / 4 + 8 * i, row of x 8 * j + 2 * (lane % 4) + c
  float* const mine = reinterpret_cast<float*>(shared);
  int* const rows_kept = reinterpret_cast<int*>(shared + BN * COLUMN * 4);
  int kept = 0;
  if (tid < BN) kept = rows_of_x[tid] < 0 ? -1 : rows_of_y[tid];
  __syncthreads();
  if (tid < BN) rows_kept[tid] = kept;
  const int lane = thread % 32, out = group * 64 + thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < BN / 2; i++) mine[(i / 4 * 8 + lane % 4 * 2 + i % 2) * COLUMN + out + i / 2 % 2 * 8] = sums[i];
  if (ranks > 1) cluster_sync(); else __syncthreads();
  for (int i = tid; i < BN * 32; i += 256) {  // four outs of a row of x
    if (i / 32 % ranks != rank) continue;
    const int m = i / 32, o = i % 32 * 4, row = rows_kept[m];
    if (row < 0 || out0 + o >= outs) continue;
    float4 sum = *reinterpret_cast<const float4*>(mine + m * COLUMN + o);
    if (ranks > 1) {
      sum = make_float4(0, 0, 0, 0);
      for (int r = 0; r < ranks; r++) {
        const float4 part = remote(base + (m * COLUMN + o) * 4, r);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
    }
    const u32 low = round2(sum.x, sum.y), high = round2(sum.z, sum.w);
    u16* to = reinterpret_cast<u16*>(y) + size_t(row) * outs + out0 + o;
    if (outs % 4 == 0) {
      *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
    } else {
      to[0] = static_cast<u16>(low);
      if (out0 + o + 1 < outs) to[1] = static_cast<u16>(low >> 16);
      if (out0 + o + 2 < outs) to[2] = static_cast<u16>(high);
      if (out0 + o + 3 < outs) to[3] = static_cast<u16>(high >> 16);
    }
  }
  if (ranks > 1) cluster_sync();  // nobody's shared memory goes away while it is being read
}
