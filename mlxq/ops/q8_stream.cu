// 8-bit activations times packed weights on Hopper: weights unpacked in registers for the integer matrix instructions.
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
// A block makes 128 out (rows of W, the left operand) x BN rows of x, y transposed. Two warpgroups multiply, 64 out each; warp 8
// asks for words and scales, warp 9 for x; all come as boxes of tensors, each kind in a ring of its own. BLOCKS share a
// multiprocessor.
//
//   step     128 columns: a stage of x (BN, 128), swizzled as wgmma reads it
//   words    128 bytes of 128 rows: 8 / BITS steps
//   codes    a thread unpacks what wgmma wants from it: four neighbours of out g and g + 8 in a register, each at the top of its
//            byte, top bit turned: (code - z) * 2^(8 - BITS) as int8, one LOP3. The sums are as much larger: at most
//            127 * 128 * K, and scales take it back (a power of two: exact)
//   scales   (PER_ROW 0) 16 bytes of 128 rows, as many steps as they last
//   X_g      (PER_ROW 0) warps 10 and 11 add up each stage of x, as floats where the four of a thread lie together
//   drain    (PER_ROW 0) an element and group cost three instructions: to float, and two multiply-adds (sums that begin at
//            the bits of 1.5 * 2^23 need an addition instead of a conversion: slower, measured). Meanwhile the other warpgroup's products run, and those of other blocks
//   BUFFERS  2: the next columns are unpacked while the matrix units multiply
//   split    the blocks of a cluster share the columns and add up in rank order: the same bits every time
//
// Words' rows of whole 16 bytes, and with PER_ROW 0 the scales'. Ragged M, N, K: zeros are read, nothing is written.
// Limit: bytes of W for few rows, the matrix units or L2's bytes for many, with groups the issue slots of the drain.

#define F16 Y_TYPE
#define LEFT_TRANSPOSED 0
#include "hopper.cuh"
#include "copies.cuh"

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr int S_BYTES = S_TYPE == 0 ? 4 : 2;
constexpr int W_STEPS = 8 / BITS;
constexpr int S_STEPS = 16 / S_BYTES * GROUP / 128;
constexpr int SPAN = PER_ROW ? 128 : GROUP;    // columns whose products one int32 sum takes
constexpr int SPANS = 128 / SPAN;              // of a step
constexpr int UNROLL = BUFFERS == 2 && SPANS == 1 ? 2 : 1;  // steps: with two sets of codes an even number of spans
constexpr int SPAN_REGISTERS = SPAN / 8;       // of a thread's codes
constexpr int X_SUMS = PER_ROW ? 0 : (X_SCALES == 2 ? 2 : 1) * SPANS * BN;  // floats of a stage: X_g [SPANS][BN], their x_scales
constexpr int W_STAGE = 128 * 128, S_STAGE = 2 * 128 * 16, X_STAGE = BN * 128;
constexpr int COLUMN = 132;                    // floats of a row of x in the sums: no bank twice
constexpr int WORKER = BLOCKS == 1 ? 232 : BLOCKS == 2 ? 104 : 72, HELPER = BLOCKS == 1 ? 40 : BLOCKS == 2 ? 32 : 24;  // registers
constexpr float DOWN = 1.0f / (1 << (8 - BITS)), ZERO = 1 << (BITS - 1);


// Four codes as int8, (code - z) * 2^(8 - BITS): columns 4 * (lane % 4) to + 3 of the 16 in `word` (2 bits), of the 8 (4 bits).
__device__ __forceinline__ u32 four_of(u32 word, int t) {
#if BITS == 8
  return word ^ 0x80808080u;
#elif BITS == 4
  return __byte_perm(word << 4, word, t % 2 ? 0x7362 : 0x5140) & 0xf0f0f0f0u ^ 0x80808080u;
#else
  const u32 even = __byte_perm(word, 0, 0x4440 + t) * 0x00040040u, odd = even << 6;
  return (even & 0x00c000c0u | odd & 0xc000c000u) ^ 0x80808080u;
#endif
}

__device__ __forceinline__ float stored(const char* at) {
  if (S_TYPE == 0) return *reinterpret_cast<const float*>(at);
  const u32 half = *reinterpret_cast<const u16*>(at);
  return S_TYPE == 2 ? __uint_as_float(half << 16) : half_value(half);
}

// Where X_g of row m of x lies: a thread's four rows of 16 (of accumulators 4 * j .. 4 * j + 7) together.
__device__ __forceinline__ int place(int m) { return m / 16 * 16 + m / 2 % 4 * 4 + m / 8 % 2 * 2 + m % 2; }

__device__ __forceinline__ u64 descriptor(u32 at) {
  return u64((at & 0x3ffffu) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

struct Scales {  // of out g and g + 8 in one group
  float s[2], rest[2];
};

extern "C" __global__ void __launch_bounds__(384, BLOCKS)
q8_stream(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap s_map,
          const __grid_constant__ TensorMap b_map, const float* x_scales, const char* __restrict__ scales,
          char* __restrict__ y, int M, int N, int K) {
  SHARED_MEMORY(shared);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, rank = blockIdx.x, ranks = gridDim.x;
  const int m0 = blockIdx.y * BN, out0 = blockIdx.z * 128;
  const u32 base = shared_address(shared);
  constexpr int W_RING = X_STAGES * X_STAGE, S_RING = W_RING + W_STAGES * W_STAGE;
  constexpr int SUMS = S_RING + S_STAGES * S_STAGE, BARRIERS = SUMS + X_STAGES * X_SUMS * 4;
  const u32 x_full = base + BARRIERS, x_empty = x_full + 8 * X_STAGES, x_added = x_empty + 8 * X_STAGES;
  const u32 w_full = x_added + 8 * X_STAGES, w_empty = w_full + 8 * W_STAGES;
  const u32 s_full = w_empty + 8 * W_STAGES, s_empty = s_full + 8 * S_STAGES;
  const u32 x_ready = PER_ROW ? x_full : x_added;
  float* const x_sums = reinterpret_cast<float*>(shared + SUMS);
  if (tid == 0) {
    for (int i = 0; i < X_STAGES; i++) barrier_init(x_full + 8 * i, 1), barrier_init(x_empty + 8 * i, 8 * ARRIVALS);
    for (int i = 0; i < X_STAGES; i++) barrier_init(x_added + 8 * i, 2 * ARRIVALS);
    for (int i = 0; i < W_STAGES; i++) barrier_init(w_full + 8 * i, 1), barrier_init(w_empty + 8 * i, 8 * ARRIVALS);
    for (int i = 0; i < S_STAGES; i++) barrier_init(s_full + 8 * i, 1), barrier_init(s_empty + 8 * i, 8 * ARRIVALS);
    barriers_ready();
  }
  __syncthreads();
  const int groups_of_row = K / GROUP, steps = (K + 127) / 128;
  const int share = ((steps + ranks - 1) / ranks + W_STEPS - 1) / W_STEPS * W_STEPS;
  const int begin = rank * share, end = min(begin + share, steps);  // the host starts no rank without a step

  if (warp >= 8) {
    registers_down<HELPER>();
    dependents_may_start();
    if (warp == 8 && lane == 0) {  // words and scales
      int w_slot = 0, w_round = 0, s_slot = 0, s_round = 0;
#pragma unroll 1
      for (int step = begin; step < end; step++) {
        if (step % W_STEPS == 0) {
          if (w_round) barrier_wait(w_empty + 8 * w_slot, (w_round - 1) & 1);
          const u32 done = w_full + 8 * w_slot;
          barrier_expect(done, W_STAGE);
          tensor_copy(base + W_RING + w_slot * W_STAGE, w_map, step / W_STEPS * 128, out0, done);
          if (++w_slot == W_STAGES) w_slot = 0, w_round++;
        }
        if (!PER_ROW && (step % S_STEPS == 0 || step == begin)) {
          if (s_round) barrier_wait(s_empty + 8 * s_slot, (s_round - 1) & 1);
          const u32 to = base + S_RING + s_slot * S_STAGE, done = s_full + 8 * s_slot;
          barrier_expect(done, S_STAGE);
          tensor_copy(to, s_map, step / S_STEPS * 16, out0, done);
          tensor_copy(to + 2048, b_map, step / S_STEPS * 16, out0, done);
          if (++s_slot == S_STAGES) s_slot = 0, s_round++;
        }
      }
    } else if (warp == 9 && lane == 0) {  // x
      predecessor_done();
      int slot = 0, round = 0;
#pragma unroll 1
      for (int step = begin; step < end; step++) {
        if (round) barrier_wait(x_empty + 8 * slot, (round - 1) & 1);
        barrier_expect(x_full + 8 * slot, X_STAGE);
        tensor_copy(base + slot * X_STAGE, x_map, step * 128, m0, x_full + 8 * slot);
        if (++slot == X_STAGES) slot = 0, round++;
      }
    } else if (!PER_ROW && warp >= 10) {  // sums of x: a lane a row and group
      if (X_SCALES == 2) predecessor_done();
      int slot = 0, parity = 0;
#pragma unroll 1
      for (int step = begin; step < end; step++) {
        barrier_wait(x_full + 8 * slot, parity);
        float* const to = x_sums + slot * X_SUMS;
#pragma unroll 1
        for (int i = tid - 320; i < BN * SPANS; i += 64) {
          const int m = i % BN, span = i / BN;
          const char* const row = shared + slot * X_STAGE + m * 128;
          float factor = 1;
          if (X_SCALES == 2) {
            const int group_of_x = step * SPANS + span;
            if (m0 + m < M && group_of_x < groups_of_row) factor = x_scales[size_t(m0 + m) * groups_of_row + group_of_x];
          }
          int sum = 0;
#pragma unroll
          for (int c = 0; c < SPAN / 16; c++) {
            const uint4 v = *reinterpret_cast<const uint4*>(row + ((span * (SPAN / 16) + c) ^ m % 8) * 16);
            sum = dot4(v.x, 0x01010101, dot4(v.y, 0x01010101, dot4(v.z, 0x01010101, dot4(v.w, 0x01010101, sum))));
          }
          to[span * BN + place(m)] = static_cast<float>(sum) * factor;
          if (X_SCALES == 2) to[(SPANS + span) * BN + place(m)] = factor;
        }
        __syncwarp();
        if (lane < ARRIVALS) barrier_arrive(x_added + 8 * slot);
        if (++slot == X_STAGES) slot = 0, parity ^= 1;
      }
    }
  } else {
    registers_up<WORKER>();
    dependents_may_start();
    const int group = warp / 4, g = lane / 4, t = lane % 4, first = group * 64 + warp % 4 * 16;  // of the warp's 16 out
    int sums[BN / 2];
    float scaled[PER_ROW ? 1 : BN / 2];
#pragma unroll
    for (int i = 0; i < BN / 2; i++) {
      sums[i] = opaque(0);
      if (!PER_ROW) scaled[PER_ROW ? 0 : i] = 0;
    }
    u32 codes[BUFFERS][SPAN_REGISTERS];
    int w_slot = 0, s_slot = 0, x_slot = 0, parities = 0;  // of x, words and scales: bits 0, 1, 2
    // of the thread's words in a stage, or of the row of 16 bytes that it names
    const u32 own = W_RING + (BITS == 8 ? (first + lane % 16) * 128 + (lane / 16 ^ lane % 8) * 16
                                        : (first + g) * 128 + g * 16 + (BITS == 4 ? t / 2 * 4 : 0));
    const u32 never = u32(M) >> 31;
    auto unpack = [&](u32* to, int step, int span) {
      const int in_w = step % W_STEPS;
      if (in_w == 0 && span == 0) barrier_wait(w_full + 8 * w_slot, parities >> 1 & 1);
      const u32 stage = own + w_slot * W_STAGE;
#pragma unroll
      for (int i = 0; i < SPAN / 32; i++) {  // 32 columns
        const int at = (in_w * 128 + span * SPAN + i * 32) / 8 * BITS;  // bytes
        u32* const four = to + 4 * i;
#if BITS == 8
        load_matrices(four, base + (stage ^ at));
#else
        const char* const from = shared + (stage ^ at / 16 * 16) + at % 16;
#if BITS == 4
        four[0] = *reinterpret_cast<const u32*>(from), four[2] = *reinterpret_cast<const u32*>(from + 8);
        four[1] = *reinterpret_cast<const u32*>(from + 1024), four[3] = *reinterpret_cast<const u32*>(from + 1032);
#else
        const uint2 low = *reinterpret_cast<const uint2*>(from), high = *reinterpret_cast<const uint2*>(from + 1024);
        four[0] = low.x, four[2] = low.y, four[1] = high.x, four[3] = high.y;
#endif
#endif
#pragma unroll
        for (int j = 0; j < 4; j++) four[j] = four_of(four[j], t);
      }
      if (in_w == W_STEPS - 1 && span == SPANS - 1) {
        __syncwarp();
        if (lane < ARRIVALS) barrier_arrive_after(to[0] | to[SPAN_REGISTERS - 1], never, w_empty + 8 * w_slot);
        if (++w_slot == W_STAGES) w_slot = 0, parities ^= 2;
      }
    };
    auto scales_of = [&](int step, int span) {
      Scales of;
      const int in_s = step % S_STEPS;
      if (span == 0 && (in_s == 0 || step == begin)) barrier_wait(s_full + 8 * s_slot, parities >> 2);
      const char* const at = shared + S_RING + s_slot * S_STAGE + (first + g) * 16 + (in_s * SPANS + span) * S_BYTES;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float scale = stored(at + i * 128);
        of.s[i] = scale * DOWN, of.rest[i] = fmaf(scale, ZERO, stored(at + 2048 + i * 128));
      }
      if (in_s == S_STEPS - 1 && span == SPANS - 1) {
        __syncwarp();
        if (lane < ARRIVALS) barrier_arrive_after(__float_as_uint(of.rest[1]), never, s_empty + 8 * s_slot);
        if (++s_slot == S_STAGES) s_slot = 0, parities ^= 4;
      }
      return of;
    };
    auto multiply = [&](const u32* from, int span) {
      if (span == 0) barrier_wait(x_ready + 8 * x_slot, parities & 1);
      const u64 right = descriptor(base + x_slot * X_STAGE + span * SPAN);
      wgmma_begin();
#pragma unroll
      for (int i = 0; i < SPAN / 32; i++) {
        if (PER_ROW || i) wgmma_s8<1>(sums, from + 4 * i, right + i * 2);
        else wgmma_s8<0>(sums, from + 4 * i, right + i * 2);
      }
      wgmma_commit();
    };
    auto multiplied = [&](const u32* from) {  // after the wait: registers may be used anew
#pragma unroll
      for (int i = 0; i < SPAN_REGISTERS; i++) in_use(from[i]);
    };
    auto given_back = [&](int slot) {
      if (lane < ARRIVALS) barrier_arrive(x_empty + 8 * slot);
    };
    auto drain = [&](const Scales& of, int span) {
      const float* const from = x_sums + x_slot * X_SUMS + span * BN + 4 * t;
#pragma unroll
      for (int j = 0; j < BN / 16; j++) {
        const float4 four = *reinterpret_cast<const float4*>(from + 16 * j);
        const float x[4] = {four.x, four.y, four.z, four.w};
        float4 factors = four;
        if (X_SCALES == 2) factors = *reinterpret_cast<const float4*>(from + SPANS * BN + 16 * j);
        const float factor[4] = {factors.x, factors.y, factors.z, factors.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int at = 8 * j + i, of_x = i / 4 * 2 + i % 2, row = i / 2 % 2;
          float sum = static_cast<float>(sums[at]);
          if (X_SCALES == 2) sum *= factor[of_x];
          scaled[PER_ROW ? 0 : at] = fmaf(of.s[row], sum, fmaf(of.rest[row], x[of_x], scaled[PER_ROW ? 0 : at]));
        }
      }
    };

    if (BUFFERS == 2) unpack(codes[0], begin, 0);
#pragma unroll 1
    for (int first_step = begin; first_step < end; first_step += UNROLL) {
#pragma unroll
      for (int i = 0; i < UNROLL; i++) {
        const int step = first_step + i;
        if (step >= end) break;
#pragma unroll(BUFFERS == 1 ? 1 : SPANS)
        for (int span = 0; span < SPANS; span++) {
          const int now = (i * SPANS + span) % 2, before = 1 - now;
          u32* const next = codes[BUFFERS == 2 ? before : 0];
          const bool more = span + 1 < SPANS || step + 1 < end;
          if (BUFFERS == 1) unpack(codes[0], step, span);
          multiply(codes[BUFFERS == 2 ? now : 0], span);
          if (PER_ROW) {
            if (BUFFERS == 2) {  // while the matrix units multiply
              wgmma_wait<1>(sums);
              multiplied(next);
              if (step > begin) given_back(x_slot ? x_slot - 1 : X_STAGES - 1);
              if (more) unpack(next, step + 1, 0);
            } else {
              wgmma_wait<0>(sums);
              multiplied(codes[0]);
              given_back(x_slot);
            }
          } else {
            const Scales of = scales_of(step, span);
            if (BUFFERS == 2 && more) unpack(next, span + 1 < SPANS ? step : step + 1, (span + 1) % SPANS);
            wgmma_wait<0>(sums);
            multiplied(codes[BUFFERS == 2 ? now : 0]);
            drain(of, span);
            __syncwarp();
            if (span == SPANS - 1) given_back(x_slot);
          }
        }
        if (++x_slot == X_STAGES) x_slot = 0, parities ^= 1;
      }
    }
    wgmma_wait<0>(sums);
#pragma unroll
    for (int i = 0; i < BUFFERS * SPAN_REGISTERS; i++) in_use(codes[i / SPAN_REGISTERS][i % SPAN_REGISTERS]);
    workers_sync<8>();  // all have read what the sums are written over

    // sums[4 * j + 2 * i + c]: out g + 8 * i of the warp, row of x 8 * j + 2 * t + c
    float* const mine = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < BN / 2; i++)
      mine[(i / 4 * 8 + t * 2 + i % 2) * COLUMN + first + g + i / 2 % 2 * 8] = PER_ROW ? __uint_as_float(sums[i]) : scaled[PER_ROW ? 0 : i];
    const int o = lane * 4;  // four outs of a row of x
    float scale[4];          // PER_ROW: theirs
#pragma unroll
    for (int j = 0; j < 4; j++)
      scale[j] = PER_ROW && out0 + o + j < N ? stored(scales + size_t(out0 + o + j) * groups_of_row * S_BYTES) : 0.0f;
    predecessor_done();
    if (ranks > 1)
      cluster_sync();
    else
      workers_sync<8>();
#pragma unroll 1
    for (int m = rank + ranks * warp; m < BN && m0 + m < M && out0 + o < N; m += 8 * ranks) {
      float sum[4] = {0, 0, 0, 0};  // PER_ROW: the bits of integers
      float4 parts[8];
#pragma unroll
      for (int r = 0; r < 8; r++) {
        if (r >= ranks) continue;
        if (ranks > 1) parts[r] = remote(base + (m * COLUMN + o) * 4, r);
        else parts[r] = *reinterpret_cast<const float4*>(mine + m * COLUMN + o);
      }
#pragma unroll
      for (int r = 0; r < 8; r++) {
        if (r >= ranks) continue;
        const float part[4] = {parts[r].x, parts[r].y, parts[r].z, parts[r].w};
#pragma unroll
        for (int j = 0; j < 4; j++) sum[j] = PER_ROW ? __uint_as_float(__float_as_uint(sum[j]) + __float_as_uint(part[j])) : sum[j] + part[j];
      }
      const float x_scale = X_SCALES == 2 ? 1.0f : x_scales[X_SCALES ? m0 + m : 0];
#pragma unroll
      for (int j = 0; j < 4; j++)
        sum[j] = PER_ROW ? static_cast<float>(static_cast<int>(__float_as_uint(sum[j]))) * DOWN * (x_scale * scale[j]) : x_scale * sum[j];
      const size_t at = size_t(m0 + m) * N + out0 + o;
      if (Y_TYPE == 0) {
        float* const to = reinterpret_cast<float*>(y) + at;
        if (N % 4 == 0) {
          *reinterpret_cast<float4*>(to) = make_float4(sum[0], sum[1], sum[2], sum[3]);
        } else {
#pragma unroll
          for (int j = 0; j < 4; j++)
            if (out0 + o + j < N) to[j] = sum[j];
        }
      } else {
        u16* const to = reinterpret_cast<u16*>(y) + at;
        const u32 low = round2(sum[0], sum[1]), high = round2(sum[2], sum[3]);
        if (N % 4 == 0) {
          *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
        } else {
          to[0] = static_cast<u16>(low);
          if (out0 + o + 1 < N) to[1] = static_cast<u16>(low >> 16);
          if (out0 + o + 2 < N) to[2] = static_cast<u16>(high);
          if (out0 + o + 3 < N) to[3] = static_cast<u16>(high >> 16);
        }
      }
    }
    if (ranks > 1) cluster_sync();  // nobody's shared memory goes away while it is being read
  }
}
