// y = x @ W^T for few rows of x (decode), on the canonical bytes; with indices, y[i] = x[lhs[i]] @ W[rhs[i]]^T.
//
//   x        X    (batches of x, M, K)         X_TYPE 0 float32, 1 float16, 2 bfloat16
//   words    u32  (experts, N, K * BITS / 32)  lowest bits first
//   scales   S    (experts, N, K / GROUP)      S_TYPE likewise; biases too
//   y        X    (batches, M, N)
//
// Tensor cores do the products, 16 rows of W by 8 columns (rows of x), and they are fed integers: a code q becomes the
// 16-bit float u * (C + q) by one shift and one and-or (its bits are placed at the top of the mantissa of 1024 or 128), which
// is exact, so W is never rounded. One group gives acc = sum u (C + q) x in float32, and then
//
//   u * y += scale * acc + (bias - C * scale) * (u * sum x)          float32, sum x once per block
//
// A float32 row of x counts as three bfloat16 rows (high, middle, low part: 24 bits), summed at the end. A NaN or an
// infinity in a row of x makes all of that row of y NaN or infinite; infinity may come out as NaN.
//
//   chunk    16 rows of W x CB bytes with their scales and biases, copied by one warp into its own ring of DEPTH stages
//            (cp.async): no barrier. The scales must travel with the words: loaded one chunk ahead they queue behind all
//            the words in flight, and that latency was the kernel's time
//   piece    16 bytes of a row (8 at 2-bit/32), a word a lane:    lane = 4 * g + t has word t of rows g and g + 8
//            pair p of a word: codes p and p + P / 2, in one register; x lies in shared memory in the same order
//   tile     16 rows of W x K; 2^wk_bits warps take its chunks in turn, their sums meet in shared memory every BUFFERS
//            tiles and are added in order
//   block    WARPS warps, persistent: tiles blockIdx.x, + gridDim.x, ...; x is staged once
//   grid     (blocks, batches * ceil(M / rows of x a block))
//
// K a multiple of GROUP; rows of words multiples of COPY bytes. Any M, N. Limit: the bytes of W at the memory's rate.

#include "halves.cuh"

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define PAIR_BYTES ((BITS == 2 && GROUP == 32) ? 8 : 16)
constexpr int P = PAIR_BYTES * 8 / BITS / 4;   // codes that a lane has of a piece
constexpr int PIECE = 4 * P;                   // codes of a row in a piece

constexpr int CHUNK = CB * 8 / BITS;           // codes of a row in a chunk
constexpr int UNIT = GROUP < CHUNK ? GROUP : CHUNK;
constexpr int UNITS = CHUNK / UNIT;            // of a chunk; a unit has one scale
constexpr int STRIDE = CB + 16;                // bytes between rows of a stage: eight rows, four words each, no bank twice
constexpr int PLANES = P == 16 ? 2 : 1;        // a lane's x of a piece, in 16-byte (P = 4: 8-byte) accesses
constexpr int COLUMN = 20;                     // floats between columns of a warp's sums: no bank twice
constexpr int PARTS = X_TYPE == 0 ? 3 : 1;     // columns of a row of x
constexpr int ROWS = MP / PARTS;               // rows of x a block
constexpr int S_BYTES = S_TYPE == 0 ? 4 : 2;
constexpr int S_WORDS = (UNITS * S_BYTES + 3) / 4;  // of a row of a chunk
constexpr int STAGE = 16 * STRIDE + 2 * 16 * 4 * S_WORDS;
constexpr int BUFFERS = 8 / MP;                // tiles whose sums wait for one barrier
constexpr int X_BATCH = 4;                     // accesses to x in flight a thread

#if X_TYPE == 1
constexpr int POSITION = BITS == 2 ? 8 : BITS == 4 ? 6 : 2;
constexpr u32 MAGIC = 0x64006400u;
constexpr float UNIT_VALUE = 1 << POSITION, CENTRE = 1024 >> POSITION;
#define MMA_TYPE "f16"
#elif BITS == 8
constexpr u32 MAGIC = 0;
constexpr float UNIT_VALUE = 1, CENTRE = -128;  // bfloat16 holds q - 128 but not 256 + q
#define MMA_TYPE "bf16"
#else
constexpr int POSITION = BITS == 2 ? 5 : 3;
constexpr u32 MAGIC = 0x43004300u;
constexpr float UNIT_VALUE = 1 << POSITION, CENTRE = 128 >> POSITION;
#define MMA_TYPE "bf16"
#endif

__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

// Element i of an array of S_TYPE held in 32-bit registers.
template <int TYPE>
__device__ __forceinline__ float element(const u32* words, int i) {
  if (TYPE == 0) return __uint_as_float(words[i]);
  const u32 word = words[i / 2];
  if (TYPE == 2) return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
  return half_value(i % 2 ? word >> 16 : word);
}

__device__ __forceinline__ u16 bf16_bits(float value) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

template <int TYPE>
__device__ __forceinline__ void store(void* to, size_t at, float value) {
  if (TYPE == 0) {
    static_cast<float*>(to)[at] = value;
  } else if (TYPE == 1) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    static_cast<u16*>(to)[at] = bits;
  } else {
    static_cast<u16*>(to)[at] = bf16_bits(value);
  }
}

// The words of a lane in a piece, both rows, as pairs of 16-bit floats.
struct Codes {
  u32 pairs[P / 2];
};

// magic is MAGIC in a register: an instruction holds one constant, and two of them cost two instructions a pair.
__device__ __forceinline__ Codes codes_of(u32 word, int t, u32 magic) {
  Codes out;
#if X_TYPE != 1 && BITS == 8
#pragma unroll
  for (int p = 0; p < 2; p++) {
    const float low = __uint_as_float(prmt(word, 0x4b000000u, 0x7540 + p)) - 8388736.0f;  // 2^23 + q - (2^23 + 128)
    const float high = __uint_as_float(prmt(word, 0x4b000000u, 0x7542 + p)) - 8388736.0f;
    out.pairs[p] = prmt(__float_as_uint(low), __float_as_uint(high), 0x7632);
  }
#else
  constexpr u32 MASK = (((1u << BITS) - 1u) << POSITION) * 0x10001u;
  if (PAIR_BYTES == 8) word = prmt(word, 0u, t % 2 ? 0x4342 : 0x4140);
#pragma unroll
  for (int p = 0; p < P / 2; p++) {
    constexpr int AT = POSITION;
    const int shift = BITS * p - AT;
    const u32 moved = shift >= 0 ? word >> (shift & 31) : word << (-shift & 31);
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out.pairs[p]) : "r"(moved), "n"(MASK), "r"(magic));  // moved & MASK | magic
  }
#endif
  return out;
}

__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <int BYTES>
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool valid) {
  const int size = valid ? BYTES : 0;  // the rest is zeros
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(size) : "memory");
}

// Scales and biases of the units of a chunk, 16 rows, into a stage; past the end of a row zeros.
__device__ __forceinline__ void load_scales(u32 to, const char* scales, const char* biases, int first, int N, int at,
                                            int bytes, int lane) {
  constexpr int ROW = 4 * S_WORDS;  // bytes in the stage
  constexpr int STEP = S_VECTOR < 4 ? 4 : S_VECTOR < ROW ? S_VECTOR : ROW;
  constexpr int ACROSS = ROW / STEP;
#pragma unroll
  for (int i = 0; i < 32 * ACROSS; i += 32) {
    const int row = (i + lane) / ACROSS % 16, from = at + (i + lane) % ACROSS * STEP;
    const char* base = (i + lane) / ACROSS >= 16 ? biases : scales;
    base += size_t(min(first + row, N - 1)) * bytes;
    const bool valid = from < bytes;
    const u32 place = to + (i + lane) * STEP;
    if (S_VECTOR >= 4 && UNITS * S_BYTES >= 4) {
      copy_async<STEP>(place, base + (valid ? from : 0), valid);
    } else {  // two-byte scales that stand alone, or rows of an odd number of them
      const u32 low = valid ? *reinterpret_cast<const u16*>(base + from) : 0;
      const u32 high = UNITS > 1 && from + 2 < bytes ? *reinterpret_cast<const u16*>(base + from + 2) : 0;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(place), "r"(low | high << 16) : "memory");
    }
  }
}

__device__ __forceinline__ void read_scales(u32* out, const u32* from) {
#pragma unroll
  for (int i = 0; i < S_WORDS; i += 4) {
    if (S_WORDS >= 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(from + i);
      out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
    } else if (S_WORDS == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      out[0] = v.x, out[1] = v.y;
    } else {
      out[0] = from[0];
    }
  }
}

// A launch may ask to begin while the kernel before it in the stream still runs (programmatic dependent launch). Words,
// scales and biases are read at once, since the host asks only when nothing wrote them lately; whatever the kernel
// before may have written is read, and anything is written, only after this. Then the next kernel may begin likewise.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
qmv(const char* x, const char* __restrict__ words, const char* __restrict__ scales,
    const char* __restrict__ biases, void* __restrict__ y, const int* lhs, const int* rhs, int M,
    int N, int K, int row_blocks, int wk_bits, int blocks_of_x, int experts) {
  extern __shared__ __align__(128) char shared[];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int row_bytes = K / 8 * BITS, scale_bytes = K / GROUP * S_BYTES;
  const int chunks = (row_bytes + CB - 1) / CB, tiles = (N + 15) / 16;
  const int wk = 1 << wk_bits, my_k = warp & (wk - 1), my_slot = warp >> wk_bits, slots = WARPS >> wk_bits;
  const int step = gridDim.x * slots, first = my_slot * gridDim.x + blockIdx.x;
  const int batch = blockIdx.y / row_blocks, row_block = blockIdx.y % row_blocks;
  if (rhs) wait_for_predecessor();
  // an index out of range stands for the last
  const size_t expert = rhs ? min(u32(rhs[batch]), u32(experts - 1)) : batch;
  const size_t block_of_x = lhs ? min(u32(lhs[batch]), u32(blocks_of_x - 1)) : batch;
  words += expert * N * row_bytes;
  scales += expert * N * scale_bytes;
  biases += expert * N * scale_bytes;

  char* xs = shared;                                                             // chunks * CHUNK * MP * 2 bytes
  float* sums = reinterpret_cast<float*>(xs + size_t(chunks) * CHUNK * MP * 2);  // chunks * UNITS * MP
  float* partial = sums + (chunks * UNITS * MP + 31) / 32 * 32;                  // BUFFERS * WARPS * MP * COLUMN
  char* ring = reinterpret_cast<char*>(partial + BUFFERS * WARPS * MP * COLUMN) + warp * DEPTH * STAGE;
  const u32 ring_at = static_cast<u32>(__cvta_generic_to_shared(ring));

  // x: P values of a column at a time, X_BATCH of them in flight a thread
  // (a warp has one column: no division by the number of words)
  const int words_of_row = chunks * CHUNK / P, column = warp % MP, stride = WARPS / MP * 32;
  const int m = row_block * ROWS + column / PARTS;
  const size_t x_row = (block_of_x * M + m) * K;
  const bool x_valid = column < ROWS * PARTS && m < M;
  u32 v[X_BATCH][P / 2];
  auto load_x = [&](int base) {
#pragma unroll
    for (int n = 0; n < X_BATCH; n++) {
      const int k = (base + n * stride) * P;
      const size_t at = x_row + k;
      const bool valid = x_valid && k < K;
#pragma unroll
      for (int j = 0; j < P / 2; j++) v[n][j] = 0;
      if (!valid) continue;
#if X_TYPE == 0
      const float* from = reinterpret_cast<const float*>(x) + at;
#pragma unroll
      for (int j = 0; j < P; j++) {
        const float value = from[j];
        float part = value;
        const float high = __uint_as_float(static_cast<u32>(bf16_bits(value)) << 16);
        if (column % 3 >= 1) part = value - high;
        const float middle = __uint_as_float(static_cast<u32>(bf16_bits(part)) << 16);
        if (column % 3 == 2) part = part - middle;
        v[n][j / 2] |= static_cast<u32>(bf16_bits(part)) << (16 * (j % 2));
      }
#else
      if (P == 4) {
        const uint2 r = __ldg(reinterpret_cast<const uint2*>(x + at * 2));
        v[n][0] = r.x, v[n][1] = r.y;
      } else {
#pragma unroll
        for (int j = 0; j < P / 8; j++) {
          const uint4 r = __ldg(reinterpret_cast<const uint4*>(x + at * 2) + j);
          v[n][4 * j] = r.x, v[n][4 * j + 1] = r.y, v[n][4 * j + 2] = r.z, v[n][4 * j + 3] = r.w;
        }
      }
#endif
    }
  };
  int load_tile = my_k < chunks ? first : tiles, load_chunk = my_k, load_stage = 0;
  auto load = [&]() {
    if (load_tile < tiles) {
      constexpr int ACROSS = CB / COPY, ROWS_AT_ONCE = 32 / ACROSS;
      const int row = lane / ACROSS, at = lane % ACROSS * COPY, from = load_chunk * CB + at, top = load_tile * 16;
      const bool valid = from < row_bytes;
      const char* source = words + (valid ? from : 0);
      const u32 stage = ring_at + load_stage * STAGE, to = stage + row * STRIDE + at;
      if (top + 16 <= N) {
        source += size_t(top + row) * row_bytes;
#pragma unroll
        for (int i = 0; i < 16; i += ROWS_AT_ONCE) {
          copy_async<COPY>(to + i * STRIDE, source, valid);
          source += ROWS_AT_ONCE * row_bytes;
        }
      } else {
        for (int i = 0; i < 16; i += ROWS_AT_ONCE)
          copy_async<COPY>(to + i * STRIDE, source + size_t(min(top + row + i, N - 1)) * row_bytes, valid);
      }
      const int scale_at = UNIT < GROUP ? load_chunk * CHUNK / GROUP * S_BYTES : load_chunk * UNITS * S_BYTES;
      load_scales(stage + 16 * STRIDE, scales, biases, top, N, scale_at, scale_bytes, lane);
      load_chunk += wk;
      if (load_chunk >= chunks) load_chunk = my_k, load_tile += step;
    }
    load_stage = load_stage + 1 == DEPTH ? 0 : load_stage + 1;
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll 1
  for (int d = 0; d < DEPTH - 1; d++) load();
  wait_for_predecessor();
  load_x(warp / MP * 32 + lane);

  // x into the lanes' order, and the units' sums
  for (int base = warp / MP * 32; base < words_of_row; base += X_BATCH * stride) {
    if (base >= stride) load_x(base + lane);
#pragma unroll
    for (int n = 0; n < X_BATCH; n++) {
      const int word = base + n * stride + lane;
      if (word - lane >= words_of_row) break;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < P; j++) sum += element<X_TYPE == 1 ? 1 : 2>(v[n], j);
#pragma unroll
      for (int d = 1; d < UNIT / P; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
      if (word >= words_of_row) continue;
      if (word % (UNIT / P) == 0) sums[word / (UNIT / P) * MP + column] = sum * UNIT_VALUE;
      u32 pairs[P / 2];
#pragma unroll
      for (int p = 0; p < P / 2; p++) pairs[p] = prmt(v[n][p / 2], v[n][p / 2 + P / 4], p % 2 ? 0x7632 : 0x5410);
      const int at = word / 4, of = column * 4 + word % 4;
      if (P == 4) {
        reinterpret_cast<uint2*>(xs)[at * MP * 4 + of] = make_uint2(pairs[0], pairs[1]);
      } else {
#pragma unroll
        for (int j = 0; j < PLANES; j++)
          reinterpret_cast<uint4*>(xs)[(at * PLANES + j) * MP * 4 + of] =
              make_uint4(pairs[4 * j], pairs[4 * j + 1], pairs[4 * j + 2], pairs[4 * j + 3]);
      }
    }
  }
  __syncthreads();

  const int rounds = (tiles - static_cast<int>(blockIdx.x) + step - 1) / step;
  const int x_lane = (g & (MP - 1)) * 4 + t;
  const int column_0 = 2 * t & (MP - 1), column_1 = (2 * t + 1) & (MP - 1);
  u32 magic;
  asm volatile("mov.u32 %0, %1;" : "=r"(magic) : "n"(MAGIC));
  int stage = 0;
  for (int round = 0; round < rounds; round++) {
    const int tile = first + round * step;
    float total[4] = {0, 0, 0, 0};
    if (tile < tiles) {
      for (int chunk = my_k; chunk < chunks; chunk += wk) {
        load();
        asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
        __syncwarp();
        u32 s[2][S_WORDS], b[2][S_WORDS];
        const u32* scales_of = reinterpret_cast<const u32*>(ring + stage * STAGE + 16 * STRIDE);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          read_scales(s[h], scales_of + (g + 8 * h) * S_WORDS);
          read_scales(b[h], scales_of + (16 + g + 8 * h) * S_WORDS);
        }
        const char* rows = ring + stage * STAGE + g * STRIDE + (PAIR_BYTES == 8 ? t / 2 : t) * 4;
        const char* x_chunk = xs + size_t(chunk) * CHUNK * MP * 2;
        const float* chunk_sums = sums + chunk * UNITS * MP;
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
          float acc[4] = {0, 0, 0, 0};
#pragma unroll
          for (int i = 0; i < UNIT / PIECE; i++) {
            const int piece = unit * (UNIT / PIECE) + i;
            const Codes top = codes_of(*reinterpret_cast<const u32*>(rows + piece * PAIR_BYTES), t, magic);
            const Codes low = codes_of(*reinterpret_cast<const u32*>(rows + 8 * STRIDE + piece * PAIR_BYTES), t, magic);
            u32 xv[P / 2];
            if (P == 4) {
              const uint2 v = reinterpret_cast<const uint2*>(x_chunk)[piece * MP * 4 + x_lane];
              xv[0] = v.x, xv[1] = v.y;
            } else {
#pragma unroll
              for (int j = 0; j < PLANES; j++) {
                const uint4 v = reinterpret_cast<const uint4*>(x_chunk)[(piece * PLANES + j) * MP * 4 + x_lane];
                xv[4 * j] = v.x, xv[4 * j + 1] = v.y, xv[4 * j + 2] = v.z, xv[4 * j + 3] = v.w;
              }
            }
#pragma unroll
            for (int j = 0; j < P / 4; j++)
              mma(acc, top.pairs[2 * j], low.pairs[2 * j], top.pairs[2 * j + 1], low.pairs[2 * j + 1], xv[2 * j], xv[2 * j + 1]);
          }
          const float sum_0 = chunk_sums[unit * MP + column_0], sum_1 = chunk_sums[unit * MP + column_1];
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const float scale = element<S_TYPE>(s[h], unit);
            const float bias = element<S_TYPE>(b[h], unit) - CENTRE * scale;
            total[2 * h] = __fmaf_rn(scale, acc[2 * h], __fmaf_rn(bias, sum_0, total[2 * h]));
            total[2 * h + 1] = __fmaf_rn(scale, acc[2 * h + 1], __fmaf_rn(bias, sum_1, total[2 * h + 1]));
          }
        }
        __syncwarp();  // the stage is free for the next load
        stage = stage + 1 == DEPTH ? 0 : stage + 1;
      }
    }
    float* mine = partial + (round % BUFFERS * WARPS + warp) * MP * COLUMN;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int column = 2 * t + j % 2;
      if (column < MP) mine[column * COLUMN + g + 8 * (j / 2)] = total[j];
    }
    if (round % BUFFERS < BUFFERS - 1 && round + 1 < rounds) continue;
    __syncthreads();
    const int waiting = round % BUFFERS + 1, before = round - round % BUFFERS;
    for (int e = tid; e < waiting * slots * 16 * ROWS; e += WARPS * 32) {
      const int row = e % 16, of_x = e / 16 % ROWS, slot = e / (16 * ROWS) % slots, buffer = e / (16 * ROWS) / slots;
      const int n = (slot * gridDim.x + blockIdx.x + (before + buffer) * step) * 16 + row, m = row_block * ROWS + of_x;
      if (n >= N || m >= M) continue;
      const float* from = partial + (buffer * WARPS + (slot << wk_bits)) * MP * COLUMN + of_x * PARTS * COLUMN + row;
      float sum = 0;
#pragma unroll 4
      for (int w = 0; w < wk; w++)
#pragma unroll
        for (int part = 0; part < PARTS; part++) sum += from[w * MP * COLUMN + part * COLUMN];
      store<X_TYPE>(y, (size_t(batch) * M + m) * N + n, sum * (1.0f / UNIT_VALUE));
    }
    if (round + 1 < rounds) __syncthreads();
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}
