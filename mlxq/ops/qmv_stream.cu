// y = x @ W^T for up to eight rows of 16-bit x on Hopper: qmv.cu's product with the weights streamed by the copy engine.
//
//   x        X    (M, K)                X_TYPE 1 float16, 2 bfloat16
//   words    u32  (N, K * BITS / 32)    scales, biases  S (N, K / GROUP), S_TYPE 0 float32, 1 float16, 2 bfloat16
//   y        X    (M, N)
//
//   tile     ROWS of W, 16, 32 or 64; blocks are persistent and take tiles blockIdx.x, + gridDim.x, ...
//   stage    the rows x WARPS * SEGMENT bytes of words, one copy of a box (128 bytes, ROWS, columns of 128 bytes) whose
//            16-byte pieces are swizzled (eight rows x four lanes: no bank twice), in a ring of DEPTH; the tile's scales
//            and biases come with its first stage into a ring of their own. One copy at a time: each takes the engine
//            some 40 ns however small it is, and 48 of them a stage (a row each) were the first version's time
//   warps    WARPS multiply: warp w has bytes w * SEGMENT .. of every stage, so its part of x is the same for every tile and
//            stays in registers: 2 * SEGMENT * 8 / BITS / 16 a stage, whatever M is. Three more, on three schedulers: one
//            asks for stages, one has the biases' product, one adds all sums up, in their order, when a tile is through, and
//            writes y. As one warp they were late, and what runs beside its scheduler's two warps sets the pace of all
//   ahead    at most AHEAD stages are asked for and not there yet: enough to keep the memory busy. What is asked for beyond
//            that stands in x's way, which comes last and is wanted first
//   x        at 8 bits comes in whole lines of memory, eight lanes each, and is turned in shared memory to what the lanes want:
//            32 bytes a row at a time took the memory twice as long. At 4 and 2 bits (64, 128 bytes) that gained nothing
//   sums     a warp's ROWS x 8 sums of a tile go to one of BUFFERS places, as its lanes have them
//   ranks    RANKS neighbouring blocks, a cluster, share a tile: rank r has the r-th part of K, so a block reads no more of x
//            than that, and needs fewer registers for it. Their sums go to the block whose turn it is, rank after rank
//   unit     the codes of a warp's stage with one scale; products of TOGETHER units (of 16 rows each) are interleaved, for
//            each of a unit's waits for the one before
//   biases   times the sums of x over groups: where biases and x are bfloat16 a product of its own, 16 groups a step, by the
//            warp of its own (the sums in three parts, 24 bits, as its lanes need them); else each warp's, unit by unit
//
// GROUPED: x is sorted by experts, groups[] says whose rows every eight of it are, rows[] where in y they belong (experts.cu);
// words, scales and biases of all experts are one tall tensor. A tile is ROWS of W for one of groups, and a cluster has a
// run of them: only where a group ends in it is x loaded anew.
//
// BLOCKS that fit a multiprocessor: with two, the next product's blocks begin, and ask for weights, beside this one's.
//
// Tensor cores are fed integers, as in qmv.cu. bfloat16: a field of a word, masked where it stands, is the bfloat16 whose bits
// it is: code * 2^position * 2^-133, exactly (up to 255 the bits of a bfloat16 are linear, the first binade and the
// subnormals alike); x is multiplied by 2^(RAISE - position), so no code is moved or shifted out of an offset. Of a row
// of x with a value of 2^36 or more (or NaN, infinity) in its part a warp does not raise it. float16 has too few exponents for that:
// there u * (C + code) as in qmv.cu.
//
// Rows of words of whole 128 bytes, of scales of whole 16; K / 8 * BITS at most RANKS * STAGES * WARPS * SEGMENT: what lies beyond K
// are zeros, and not left out, so that nothing branches. Any N, M <= 8. Limit: the bytes of W at the memory's rate.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define F16 X_TYPE
#include "warp.cuh"
#include "copies.cuh"

constexpr int P = 32 / BITS;                                // codes of a word
constexpr int CODES = SEGMENT * 8 / BITS;                   // of a row in a warp's part of a stage
constexpr int UNIT = GROUP < CODES ? GROUP : CODES;         // codes with one scale
constexpr int UNITS = CODES / UNIT;
constexpr int BATCH = UNITS < TOGETHER ? UNITS : TOGETHER;  // units at a time
constexpr int LANE_WORDS = UNIT * BITS / 128;               // of a unit: four lanes share 16 bytes of a row
static_assert(BATCH * LANE_WORDS % 2 == 0, "load_rows brings two words");
constexpr int HALVES = ROWS / 16;                           // of a tile, each a product's rows
constexpr int COLUMN = ROWS * 128;                          // bytes of a box's column of 128
constexpr int STAGE_BYTES = ROWS * WARPS * SEGMENT;
static_assert(WARPS * SEGMENT % 128 == 0, "a copy brings whole columns, and a wait for more never ends");
constexpr int S_BYTES = S_TYPE == 0 ? 4 : 2;
constexpr int SCALE_STAGE = 2 * SCALE_COLUMNS * COLUMN;     // bytes of a tile's scales and biases
constexpr int AT_ONCE = ROWS == 16 ? UNITS : BATCH;         // scales of a row that are held
constexpr int S_WORDS = (AT_ONCE * S_BYTES + 3) / 4;
constexpr bool MATRIX_BIASES = X_TYPE == 2 && S_TYPE == 2;
constexpr int PART = STAGES * WARPS * CODES;                // of a row, that a block has; the last may lie beyond K
constexpr int ALL_UNITS = STAGES * WARPS * UNITS;           // of it
constexpr int BIAS_STEPS = (PART / GROUP + 15) / 16;        // of 16 groups
constexpr int BIAS_BATCH = BIAS_STEPS % 4 == 0 ? 4 : BIAS_STEPS % 3 == 0 ? 3 : BIAS_STEPS % 2 == 0 ? 2 : 1;
constexpr int SUMS = RANKS * (WARPS + MATRIX_BIASES);       // of each half that a tile's y is added up from
constexpr int ALL_WARPS = WARPS + 2 + MATRIX_BIASES;
#if BITS == 8
#define ROW_OF_X (lane / 8)  // and + 4
constexpr int PITCH = 160;  // of rows of 128 bytes of x: no bank twice
static_assert(CODES % 64 == 0, "x comes in lines of 128 bytes");
#else
#define ROW_OF_X g
constexpr int PITCH = 0;
#endif
constexpr int PLACES = RANKS * BUFFERS;                     // of tiles' sums in a cluster, taken in turn
static_assert(PART % GROUP == 0, "a block has whole groups");

#if X_TYPE == 1
constexpr int POSITION = BITS == 2 ? 8 : BITS == 4 ? 6 : 2;
constexpr u32 MAGIC = 0x64006400u;
constexpr float CENTRE = 1024 >> POSITION;
constexpr u32 ONES = 0x3c003c00u;
#else
constexpr int RAISE = 90;
constexpr u32 TOO_LARGE = (127 + 36) << 7;
constexpr u32 ONES = 0x3f803f80u;
#endif

template <int TYPE>
__device__ __forceinline__ float element(const u32* words, int i) {
  if (TYPE == 0) return __uint_as_float(words[i]);
  const u32 word = words[i / 2];
  if (TYPE == 2) return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
  return half_value(i % 2 ? word >> 16 : word & 0xffffu);
}

// Codes p and p + P / 2 of a word as a pair of 16-bit floats.
__device__ __forceinline__ u32 pair(u32 word, int p, u32 magic) {
#if X_TYPE == 2
  constexpr u32 MASK = ((1u << BITS) - 1u) * 0x10001u;
  constexpr int HERE = 8 / BITS;  // pairs in the low bytes of the halves
  if (BITS == 8) return p ? __byte_perm(word, 0, 0x4341) : word & MASK;
  return (p < HERE ? word : word >> 8) & MASK << (p % HERE * BITS);
#else
  constexpr u32 MASK = (((1u << BITS) - 1u) << POSITION) * 0x10001u;
  const int shift = BITS * p - POSITION;
  return and_or(shift >= 0 ? word >> (shift & 31) : word << (-shift & 31), MASK, magic);
#endif
}

// AT_ONCE scales of a row of 128 swizzled bytes, from byte `at`, a multiple of their size.
__device__ __forceinline__ void read_scales(u32* out, const char* row, int at, int g) {
  const char* from = row + ((at / 16) ^ g) * 16 + at % 16;
  if (AT_ONCE * S_BYTES == 2) {
    out[0] = *reinterpret_cast<const u16*>(from);
  } else if (AT_ONCE * S_BYTES == 4) {
    out[0] = *reinterpret_cast<const u32*>(from);
  } else if (AT_ONCE * S_BYTES == 8) {
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

extern "C" __global__ void __launch_bounds__(ALL_WARPS * 32, BLOCKS)
qmv_stream(const char* x, const __grid_constant__ TensorMap words, const __grid_constant__ TensorMap scales,
           const __grid_constant__ TensorMap biases, u16* __restrict__ y, int M, int N, int K, const uint4* groups,
           const int* rows) {
  SHARED_MEMORY(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int tiles = (N + ROWS - 1) / ROWS, rank = RANKS > 1 ? blockIdx.x % RANKS : 0, left = K - rank * PART;  // columns from here on
  x += rank * PART * 2;
  const int row_at = lane / 8 % 2 * 1024 + lane % 8 * 128;  // where load_rows finds this lane's row of 16
  // words [DEPTH][columns of 128 bytes][ROWS][128], scales [SCALE_DEPTH][2][SCALE_COLUMNS][ROWS][128], partial sums
  // [BUFFERS][SUMS][HALVES][lane], parts of sums of x [BIAS_STEPS][3][lane], lines of x [WARPS][8][PITCH], sums of x over units
  // [ALL_UNITS][8], barriers
  char* const scale_ring = shared + DEPTH * STAGE_BYTES;
  float4* const partial = reinterpret_cast<float4*>(scale_ring + SCALE_DEPTH * SCALE_STAGE);
  uint2* const parts = reinterpret_cast<uint2*>(partial + BUFFERS * SUMS * HALVES * 32);
  char* const turned = reinterpret_cast<char*>(parts + (MATRIX_BIASES ? BIAS_STEPS * 3 * 32 : 0));
  float* const x_sums = reinterpret_cast<float*>(turned + WARPS * 8 * PITCH);
  const u32 base = shared_address(shared);
  const u32 full = shared_address(x_sums + ALL_UNITS * 8);
  const u32 empty = full + 8 * DEPTH, summed = empty + 8 * DEPTH, taken = summed + 8 * BUFFERS;
  const u32 biased = taken + 8 * PLACES, used = biased + 8 * SCALE_DEPTH;  // biases that are there, and whose product is made
  const u32 summed_up = used + 8 * SCALE_DEPTH, taken_up = summed_up + 8;   // sums of x that are there, and that may be written anew
  if (threadIdx.x == (WARPS + 1) * 32) {
    tensor_expected(words), tensor_expected(scales), tensor_expected(biases);
    for (int i = 0; i < DEPTH; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, WARPS * ARRIVALS);
    for (int i = 0; i < BUFFERS; i++) barrier_init(summed + 8 * i, RANKS > 1 ? 1 : (WARPS + MATRIX_BIASES) * ARRIVALS);
    for (int i = 0; i < PLACES; i++) barrier_init(taken + 8 * i, ARRIVALS);
    for (int i = 0; i < SCALE_DEPTH; i++) barrier_init(biased + 8 * i, 1), barrier_init(used + 8 * i, ARRIVALS);
    barrier_init(summed_up, WARPS * 4), barrier_init(taken_up, ARRIVALS);
    barriers_ready();
  }
  __syncthreads();
  if (RANKS > 1) cluster_begun();  // once all have, they may write and arrive here

#if GROUPED
  predecessor_done();  // groups are there
  const long long in_all = static_cast<long long>(groups[0].w) * tiles, clusters = gridDim.x / RANKS, cluster = blockIdx.x / RANKS;
  const int first_tile = int(in_all * cluster / clusters), end_tile = int(in_all * (cluster + 1) / clusters), tile_step = 1;
#else
  const int first_tile = blockIdx.x / RANKS, end_tile = tiles, tile_step = gridDim.x / RANKS;
#endif

  // A warp's sums of the tile at this place of PLACES to the rank whose turn it is.
  auto send = [&](int place, int round, int entry, const float4* sums) {
    const int buffer = place / RANKS, home = place % RANKS;
    float4* const to = partial + (buffer * SUMS + entry) * HALVES * 32 + lane;
    barrier_wait(taken + 8 * place, (round - 1) & 1);
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
      if (RANKS > 1)
        remote_store(at_rank(shared_address(to + half * 32), home), sums[half], at_rank(summed + 8 * buffer, home));
      else
        to[half * 32] = sums[half];
    }
    if (RANKS > 1) return;
    __syncwarp();
    if (lane < ARRIVALS) barrier_arrive(summed + 8 * buffer);
  };

  if (warp == WARPS + 1) {  // asks for the copies
    dependents_may_start();
    if (elected()) {
      int slot = 0, round = 0, scale_slot = 0, scale_round = 0, row = 0, asked = 0, come = 0, come_round = 0;
#pragma unroll 1
      for (int tile = first_tile; tile < end_tile; tile += tile_step) {
#if GROUPED
        row = tile == first_tile || tile % tiles == 0 ? int(groups[tile / tiles].x) * N + tile % tiles * ROWS : row + ROWS;
#else
        row = tile * ROWS;
#endif
#pragma unroll 1
        for (int s = 0; s < STAGES; s++) {
          const u32 done = full + 8 * slot;
          if (AHEAD < DEPTH && asked++ >= AHEAD) {
            barrier_wait(full + 8 * come, come_round & 1);
            if (++come == DEPTH) come = 0, come_round++;
          }
          barrier_wait(empty + 8 * slot, (round - 1) & 1);  // a barrier begins as if a phase of parity 1 were over
          barrier_expect(done, STAGE_BYTES + (s ? 0 : MATRIX_BIASES ? SCALE_STAGE / 2 : SCALE_STAGE));
          tensor_copy(base + slot * STAGE_BYTES, words, 0, row, (rank * STAGES + s) * (WARPS * SEGMENT / 128), done);
          if (++slot == DEPTH) slot = 0, round++;
          if (s) continue;
          const u32 to = base + DEPTH * STAGE_BYTES + scale_slot * SCALE_STAGE, there = MATRIX_BIASES ? biased + 8 * scale_slot : done;
          if (MATRIX_BIASES) barrier_wait(used + 8 * scale_slot, (scale_round - 1) & 1), barrier_expect(there, SCALE_STAGE / 2);
#pragma unroll
          for (int c = 0; c < SCALE_COLUMNS; c++) {
            const int at = rank * (PART / GROUP * S_BYTES) + c * 128;
            tensor_copy(to + c * COLUMN, scales, at, row, done);
            tensor_copy(to + (SCALE_COLUMNS + c) * COLUMN, biases, at, row, there);
          }
          if (++scale_slot == SCALE_DEPTH) scale_slot = 0, scale_round++;
        }
      }
    }
    __syncwarp();
    if (RANKS > 1) cluster_wait();
    return;
  }

  if (MATRIX_BIASES && warp == WARPS + 2) {  // biases times the sums of x
    dependents_may_start();
    int times = 0, scale_at = 0, place = 0, place_round = 0, start = first_tile, before = 0;  // groups before this one
    if (RANKS > 1) cluster_wait();
#if GROUPED
#pragma unroll 1
    for (; start < end_tile; start = min((start / tiles + 1) * tiles, end_tile), before++)
#endif
    {
      const int end_of_group = GROUPED ? min((start / tiles + 1) * tiles, end_tile) : end_tile;
      barrier_wait(summed_up, before & 1);
#pragma unroll 1
      for (int step = 0; step < BIAS_STEPS; step++) {
        float left[2][2];
        u32 rounded[2];
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int unit = (step * 16 + 8 * j + 2 * t + e) * (GROUP / UNIT);
            left[j][e] = 0;
#pragma unroll
            for (int u = 0; u < GROUP / UNIT; u++)
              if (unit < ALL_UNITS) left[j][e] += x_sums[(unit + u) * 8 + g];
          }
#pragma unroll
        for (int part = 0; part < 3; part++) {
#pragma unroll
          for (int j = 0; j < 2; j++) {
            rounded[j] = round2(left[j][0], left[j][1]);
            left[j][0] -= element<2>(rounded, 2 * j), left[j][1] -= element<2>(rounded, 2 * j + 1);
          }
          parts[(step * 3 + part) * 32 + lane] = make_uint2(rounded[0], rounded[1]);
        }
      }
      __syncwarp();
      if (GROUPED && lane < ARRIVALS) barrier_arrive(taken_up);
#pragma unroll 1
      for (int tile = start; tile < end_of_group; tile += tile_step) {
        float sums[HALVES][3][4] = {};
        barrier_wait(biased + 8 * scale_at, times & 1);
        const u32 from = base + DEPTH * STAGE_BYTES + scale_at * SCALE_STAGE + SCALE_COLUMNS * COLUMN;
        u32 last = 0;
#pragma unroll 1
        for (int first = 0; first < BIAS_STEPS; first += BIAS_BATCH) {  // all that is read before the first product
          u32 of[BIAS_BATCH][HALVES][4];
          uint2 sums_of_x[BIAS_BATCH][3];
#pragma unroll
          for (int i = 0; i < BIAS_BATCH; i++) {
            const int step = first + i;
#pragma unroll
            for (int half = 0; half < HALVES; half++)
              load_rows(of[i][half], from + step / 4 * COLUMN + half * 2048 + row_at + ((step % 4 * 2 + lane / 16) ^ lane % 8) * 16);
#pragma unroll
            for (int part = 0; part < 3; part++) sums_of_x[i][part] = parts[(step * 3 + part) * 32 + lane];
          }
#pragma unroll
          for (int i = 0; i < BIAS_BATCH; i++)
#pragma unroll
            for (int part = 0; part < 3; part++)
#pragma unroll
              for (int half = 0; half < HALVES; half++) {
                const u32* const a = of[i][half];
                mma(sums[half][part], a[0], a[1], a[2], a[3], sums_of_x[i][part].x, sums_of_x[i][part].y);
              }
          last = of[BIAS_BATCH - 1][HALVES - 1][3];
        }
        __syncwarp();
        if (lane < ARRIVALS) barrier_arrive_after(last, u32(M) >> 31, used + 8 * scale_at);
        if (++scale_at == SCALE_DEPTH) scale_at = 0, times++;
        float4 mine[HALVES];
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
          const auto of = [&](int i) { return sums[half][2][i] + sums[half][1][i] + sums[half][0][i]; };
          mine[half] = make_float4(of(0), of(1), of(2), of(3));
        }
        send(place, place_round, RANKS * WARPS + rank, mine);
        if (++place == PLACES) place = 0, place_round++;
      }
    }
    return;
  }

  if (warp == WARPS) {  // y
    dependents_may_start();
    predecessor_done();  // the kernel before may still read what y is now
    int place = 0, place_round = 0, start = first_tile;
#if GROUPED
    if (RANKS > 1) cluster_wait();
#pragma unroll 1
    for (; start < end_tile; start = min((start / tiles + 1) * tiles, end_tile))
#endif
    {
#if GROUPED
      const uint4 group = groups[start / tiles];
      const int end_of_group = min((start / tiles + 1) * tiles, end_tile), rows_of_x = group.z;
      int y_rows[2];
#pragma unroll
      for (int i = 0; i < 2; i++) y_rows[i] = 2 * t + i < rows_of_x ? rows[group.y + 2 * t + i] : 0;
#else
      const int end_of_group = end_tile, rows_of_x = M, y_rows[2] = {2 * t, 2 * t + 1};
#endif
      if (RANKS > 1 && !GROUPED) cluster_wait();
#pragma unroll 1
      for (int tile = start; tile < end_of_group; tile += tile_step) {
        const int here = place, this_round = place_round, buffer = place / RANKS;
        if (++place == PLACES) place = 0, place_round++;
        if (RANKS > 1 && here % RANKS != rank) continue;
        if (RANKS > 1 && lane == 0) barrier_expect(summed + 8 * buffer, SUMS * HALVES * 512);
        barrier_wait(summed + 8 * buffer, this_round & 1);
        float4 sum[HALVES];
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
          sum[half] = make_float4(0, 0, 0, 0);
          const float4* const from = partial + (buffer * SUMS * HALVES + half) * 32 + lane;
#pragma unroll
          for (int i = 0; i < SUMS; i++) {
            const float4 part = from[i * HALVES * 32];
            sum[half].x += part.x, sum[half].y += part.y, sum[half].z += part.z, sum[half].w += part.w;
          }
        }
        __syncwarp();
        if (lane < ARRIVALS)
#pragma unroll
          for (int r = 0; r < RANKS; r++) {
            if (RANKS == 1)
              barrier_arrive(taken + 8 * here);
            else
              remote_arrive(at_rank(taken + 8 * here, r));
          }
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
          const int n = (GROUPED ? tile % tiles : tile) * ROWS + half * 16 + g, m = 2 * t;
          const u32 top = round2(sum[half].x, sum[half].y), low = round2(sum[half].z, sum[half].w);
          u16* const to = y + size_t(y_rows[0]) * N + n;
#if GROUPED
          const long long next = static_cast<long long>(y_rows[1] - y_rows[0]) * N;
#else
          const int next = N;  // as a pointer or 64 bits it costs registers
#endif
          if (m < rows_of_x && n < N) to[0] = static_cast<u16>(top);
          if (m < rows_of_x && n + 8 < N) to[8] = static_cast<u16>(low);
          if (m + 1 < rows_of_x && n < N) to[next] = static_cast<u16>(top >> 16);
          if (m + 1 < rows_of_x && n + 8 < N) to[next + 8] = static_cast<u16>(low >> 16);
        }
      }
    }
    __syncwarp();
    if (RANKS > 1) cluster_ends(), cluster_wait();  // nobody arrives here after this block has ended
    return;
  }

  // This warp's part of x, for row g of x in the lanes of g: the values that meet the lane's words. K is whole 128 bytes of
  // words: of a stage all or none.
  predecessor_done();
  dependents_may_start();
  int slot = 0, round = 0, scale_slot = 0, place = 0, place_round = 0, start = first_tile, before = 0;  // groups before this one
#if GROUPED
  if (RANKS > 1) cluster_wait();
#pragma unroll 1
  for (; start < end_tile; start = min((start / tiles + 1) * tiles, end_tile), before++)
#endif
  {
#if GROUPED
    const uint4 group = groups[start / tiles];
    const int end_of_group = min((start / tiles + 1) * tiles, end_tile), rows_of_x = group.z;
    // opaque: or all addresses and bounds of x are computed before the loop, and kept
    const int row_of_x = opaque(ROW_OF_X), K_of_x = opaque(K), left_of_x = opaque(left);
    const char* const x_here = x + size_t(group.y) * K_of_x * 2;
#else
    const int end_of_group = end_tile, rows_of_x = M, row_of_x = ROW_OF_X, K_of_x = K, left_of_x = left;
    const char* const x_here = x;
#endif
    u32 xs[STAGES][UNITS][LANE_WORDS][P / 2], largest = 0;
#if BITS == 8
    u32 lines[STAGES][CODES / 64][2][4];
    const char* const of_row = x_here + (size_t(row_of_x) * K_of_x + warp * CODES) * 2 + lane % 8 * 16;
#pragma unroll
    for (int s = 0; s < STAGES; s++)
#pragma unroll
      for (int i = 0; i < CODES / 64; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const bool valid = row_of_x + 4 * j < rows_of_x && (s * WARPS + warp) * CODES < left_of_x;
          load_if<4>(lines[s][i][j], of_row + (size_t(j * 4) * K_of_x + s * WARPS * CODES + i * 64) * 2, valid);
        }
    __syncwarp();  // all of it is asked for before any is waited for
    char* const turn = turned + warp * 8 * PITCH;
#pragma unroll
    for (int s = 0; s < STAGES; s++)
#pragma unroll
      for (int i = 0; i < CODES / 64; i++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const u32* const of = lines[s][i][j];
          *reinterpret_cast<uint4*>(turn + (lane / 8 + 4 * j) * PITCH + lane % 8 * 16) = make_uint4(of[0], of[1], of[2], of[3]);
        }
        __syncwarp();
#pragma unroll
        for (int w = 0; w < 4; w++) {
          const uint2 v = *reinterpret_cast<const uint2*>(turn + g * PITCH + (w * 4 + t) * 8);
          u32* const to = xs[s][(i * 4 + w) / LANE_WORDS][(i * 4 + w) % LANE_WORDS];
          to[0] = v.x, to[1] = v.y;
        }
        __syncwarp();
      }
#else
    const char* const of_row = x_here + (size_t(row_of_x) * K_of_x + warp * CODES + t * P) * 2;
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
      const bool valid = row_of_x < rows_of_x && (s * WARPS + warp) * CODES < left_of_x;
#pragma unroll
      for (int u = 0; u < UNITS; u++)
#pragma unroll
        for (int w = 0; w < LANE_WORDS; w++)
#pragma unroll
          for (int i = 0; i < P / 2; i += 4)
            load_if<4>(xs[s][u][w] + i, of_row + (s * WARPS * CODES + u * UNIT + w * 4 * P + i * 2) * 2, valid);
    }
    __syncwarp();  // all of it is asked for before any is waited for
#endif
#pragma unroll
    for (int s = 0; s < STAGES; s++)
#pragma unroll
      for (int u = 0; u < UNITS; u++)
#pragma unroll
        for (int w = 0; w < LANE_WORDS; w++) {
          u32* const of = xs[s][u][w];
          u32 pairs[P / 2];
#pragma unroll
          for (int p = 0; p < P / 2; p++) {
            pairs[p] = __byte_perm(of[p / 2], of[p / 2 + P / 4], p % 2 ? 0x7632 : 0x5410);
            largest = max_abs2(largest, of[p]);
          }
#pragma unroll
          for (int p = 0; p < P / 2; p++) of[p] = pairs[p];
        }
    if (MATRIX_BIASES && before) barrier_wait(taken_up, (before - 1) & 1);
#pragma unroll
    for (int s = 0; s < STAGES; s++)
#pragma unroll
      for (int u = 0; u < UNITS; u++) {
        float sums[4] = {0, 0, 0, 0};  // of rows 2 * t and 2 * t + 1 of x, in every g
#pragma unroll
        for (int w = 0; w < LANE_WORDS; w++)
#pragma unroll
          for (int j = 0; j < P / 4; j++) mma(sums, ONES, ONES, ONES, ONES, xs[s][u][w][2 * j], xs[s][u][w][2 * j + 1]);
        float* const to = x_sums + ((s * WARPS + warp) * UNITS + u) * 8 + 2 * t;
        if (g == 0) to[0] = sums[0], to[1] = sums[1];
      }
    if (MATRIX_BIASES)
      barrier_arrive_if(summed_up, g == 0);  // each lane for what it wrote
    else
      __syncwarp();
    u32 magic = 0;
#if X_TYPE == 2
    const u32 large = __ballot_sync(0xffffffffu, max(largest & 0xffffu, largest >> 16) >= TOO_LARGE);  // four bits a row of x
    const bool mine_is_large = large >> 4 * g & 15;
#pragma unroll
    for (int s = 0; s < STAGES; s++)
#pragma unroll
      for (int u = 0; u < UNITS; u++)
#pragma unroll
        for (int w = 0; w < LANE_WORDS; w++)
#pragma unroll
          for (int p = 0; p < P / 2; p++) {
            const u32 by = (127 + (mine_is_large ? 0 : RAISE) - p % (8 / BITS) * BITS) << 7;
            xs[s][u][w][p] = mul2(xs[s][u][w][p], by * 0x10001u);
          }
#else
    magic = opaque(MAGIC);
#endif

    const u32 never = u32(M) >> 31;
    constexpr int PIECES = SEGMENT / 16;  // of a row in a warp's part of a stage
    const u32 words_at =
        base + warp * SEGMENT / 128 * COLUMN + row_at + ((warp * PIECES % 8 + lane / 16) ^ lane % 8) * 16;  // two pieces
    if (RANKS > 1 && !GROUPED) cluster_wait();
#pragma unroll 1
    for (int tile = start; tile < end_of_group; tile += tile_step) {
      float total[HALVES][4] = {}, offset[HALVES][4] = {};
      const char* const scales_of = scale_ring + scale_slot * SCALE_STAGE + g * 128;
#pragma unroll
      for (int s = 0; s < STAGES; s++) {
        barrier_wait(full + 8 * slot, round & 1);
        const int first = (s * WARPS + warp) * CODES;
        u32 scale_words[2 * HALVES][S_WORDS], bias_words[2 * HALVES][S_WORDS];  // of rows 8 * h + g
        u32 read = 0;  // the last words
#pragma unroll
        for (int b = 0; b < UNITS; b += BATCH) {
          if (b % AT_ONCE == 0)
#pragma unroll
            for (int h = 0; h < 2 * HALVES; h++) {
              const int byte = (first / GROUP + b) * S_BYTES;  // of a row's
              const char* const at = scales_of + byte / 128 * COLUMN + h * 1024;
              read_scales(scale_words[h], at, byte % 128, g);
              if (!MATRIX_BIASES) read_scales(bias_words[h], at + SCALE_COLUMNS * COLUMN, byte % 128, g);
            }
          u32 w[HALVES][BATCH * LANE_WORDS][2];  // of rows g and g + 8
#pragma unroll
          for (int half = 0; half < HALVES; half++)
#pragma unroll
            for (int i = 0; i < BATCH * LANE_WORDS; i += 2) {
              const int piece = b * LANE_WORDS + i;
              load_rows(w[half][i], words_at + slot * STAGE_BYTES + piece / 8 * COLUMN + half * 2048 ^ piece % 8 * 16);
            }
          read = w[HALVES - 1][BATCH * LANE_WORDS - 1][1];
          float acc[HALVES][BATCH][4] = {};
#pragma unroll
          for (int i = 0; i < LANE_WORDS; i++)
#pragma unroll
            for (int j = 0; j < P / 4; j++)
#pragma unroll
              for (int u = 0; u < BATCH; u++)
#pragma unroll
                for (int half = 0; half < HALVES; half++) {
                  const u32 top = w[half][u * LANE_WORDS + i][0], low = w[half][u * LANE_WORDS + i][1];
                  const u32* const of_x = xs[s][b + u][i] + 2 * j;
                  mma(acc[half][u], pair(top, 2 * j, magic), pair(low, 2 * j, magic), pair(top, 2 * j + 1, magic),
                      pair(low, 2 * j + 1, magic), of_x[0], of_x[1]);
                }
#pragma unroll
          for (int u = 0; u < BATCH; u++) {
            float sum_0 = 0, sum_1 = 0;
            if (!MATRIX_BIASES) {
              const float* const of_x = x_sums + ((s * WARPS + warp) * UNITS + b + u) * 8 + 2 * t;
              sum_0 = of_x[0], sum_1 = of_x[1];
            }
#pragma unroll
            for (int h = 0; h < 2 * HALVES; h++) {
              const float scale = element<S_TYPE>(scale_words[h], b % AT_ONCE + u);
              float* const to = total[h / 2] + h % 2 * 2;
              const float* const of = acc[h / 2][u] + h % 2 * 2;
              to[0] = __fmaf_rn(scale, of[0], to[0]), to[1] = __fmaf_rn(scale, of[1], to[1]);
              if (MATRIX_BIASES) continue;
              float bias = element<S_TYPE>(bias_words[h], b % AT_ONCE + u);
#if X_TYPE == 1
              bias = __fmaf_rn(-CENTRE, scale, bias);
#endif
              float* const rest = offset[h / 2] + h % 2 * 2;
              rest[0] = __fmaf_rn(bias, sum_0, rest[0]), rest[1] = __fmaf_rn(bias, sum_1, rest[1]);
            }
          }
        }
        __syncwarp();
        if (lane < ARRIVALS) barrier_arrive_after(read, never, empty + 8 * slot);
        if (++slot == DEPTH) slot = 0, round++;
      }
      if (++scale_slot == SCALE_DEPTH) scale_slot = 0;
      float4 sums[HALVES];
#pragma unroll
      for (int half = 0; half < HALVES; half++) {
        const auto of = [&](int i) {  // sums of products of u32 fields and raised x become those of codes and x
#if X_TYPE == 1
          return __fmaf_rn(total[half][i], 1.0f / (1 << POSITION), offset[half][i]);
#else
          const bool plain = large >> (2 * t + i % 2) * 4 & 15;  // two factors: one would be no float
          const float sum = plain ? total[half][i] * __uint_as_float((127u + 63u) << 23) : total[half][i];
          return __fmaf_rn(sum, __uint_as_float((127u + (plain ? 70u : 133u - RAISE)) << 23), offset[half][i]);
#endif
        };
        sums[half] = make_float4(of(0), of(1), of(2), of(3));
      }
      send(place, place_round, rank * WARPS + warp, sums);
      if (++place == PLACES) place = 0, place_round++;
    }
  }
}
