// Many rows times packed weights on Hopper: weights unpacked in registers, where the matrix units read them.
//
//   FORWARD = 1   y (M, N) = x (M, K) @ W^T          out = N (the rows of W), reduced = K (its columns)
//   FORWARD = 0   y (M, K) = x (M, N) @ W            out = K, reduced = N: the gradient of the other, on the same bytes
//
//   x  X (M, reduced), X_TYPE 1 float16, 2 bfloat16      words u32 (N, K * BITS / 32)
//   y  X (M, out)                                        scales, biases S (N, K / GROUP), S_TYPE 0 float32, 1 float16, 2 bfloat16
//
// A block makes 128 * HALVES out x BN rows of x, y transposed: W is the left operand. Warpgroups multiply, 64 out each, and two
// are a half with words, scales and sums of its own; both halves read the same x. One warp asks for words and scales, another
// for x; all come as boxes of tensors, each kind in a ring of its own. BLOCKS share a multiprocessor: while one waits the
// others issue; two halves do so too, and x comes from L2 half as often.
//
//   step     64 reduced columns: a stage of x (BN, 64), swizzled as wgmma reads it; 64 x 64 weights a warpgroup
//   words    FORWARD: 128 bytes of 128 rows (16 / BITS steps); otherwise 16 * BITS bytes (128 columns) of 128 rows (2 steps)
//   scales   16 bytes of 128 rows: FORWARD as many steps as they last; otherwise those with the groups of the 128 columns
//            (a copy that does not begin at 16 bytes is an illegal instruction)
//   weights  a thread unpacks what wgmma wants from it: pairs of neighbours along the reduced columns, of out g and g + 8. A pair
//            is masked where it stands, so its halves are code * 2^position; one multiplication undoes the positions, one
//            fma makes scale * code + bias, rounded once to X. bfloat16: the bits of a masked field are a subnormal, code *
//            2^(position - 133); float16: 1024 + code * 2^position
//   TURNED   (FORWARD, BITS < 8) neighbours of wgmma need not be neighbours of W if x agrees: of a step thread t has columns
//            16 t to 16 t + 15, and its pair p is columns 16 t + p and 16 t + 8 + p, which stand 16 bits apart in a word or at
//            the same place of two: one byte-permute serves eight pairs. x follows: its eight pieces of eight columns are
//            a matrix of 8 x 8, which two warps turn in its stage. With bfloat16 scales a weight is made 2^-32 of itself by one
//            fma from the subnormal (scales below 2^26), and the sums are multiplied by 2^32
//            Not FORWARD: ldmatrix turns words as they are read: of 8 rows x 16 bytes thread (g, t) gets the g-th 16 bits of rows
//            2 t and 2 t + 1, which are 16 / BITS pairs; its warp unpacks two of them, for out g and g + 8 of wgmma, and the
//            8 / BITS warps that read the same bytes the others. Two idle warps write the scales and biases of a pair of rows
//            beside each other, where they lie and as the fma wants them: eight loads a step instead of 32. FOLDED as above
//   BUFFERS  2: the next step is unpacked while the matrix units multiply; 1: other blocks fill that time
//   GROUPED  words, scales, biases have a third dimension, experts; x is sorted by them, and tiles[blockIdx.z] says whose rows a
//            block has and which (experts.cu); rows[] says where in y a row of x belongs. A block without rows leaves
//   split    the blocks of a cluster share the reduced columns; their float32 sums meet through distributed shared memory
//            and are added in rank order: the same bits every time
//   PARTS    where clusters of so many ranks as would fill the chip do not lie on it (30 of 4 blocks, of 132 multiprocessors),
//            so many clusters of fewer ranks share the columns, neighbours along gridDim.z; y is their float32
//            sums (PARTS, M, out), and add_parts makes X of them, in their order
//
// Rows of words and of scales of whole 16 bytes, reduced a multiple of 8. Ragged M, N, K: zeros are read, nothing is written.
// Limit: bytes of W for few rows, the matrix units for many; between them issue slots, some three instructions a weight.

#define F16 X_TYPE
#define LEFT_TRANSPOSED 0
#include "hopper.cuh"
#include "copies.cuh"

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr int S_BYTES = S_TYPE == 0 ? 4 : 2;
constexpr int W_STEPS = FORWARD ? 16 / BITS : 2;
constexpr int S_STEPS = FORWARD ? 16 / S_BYTES * GROUP / 64 : 2;
constexpr int UNIT = W_STEPS;  // steps that a rank's share is a multiple of
constexpr int UNROLL = W_STEPS > MOST_UNROLLED ? MOST_UNROLLED : W_STEPS;
constexpr int REGISTERS = HALVES == 2 ? 112 : BLOCKS == 1 ? 240 : BLOCKS == 2 ? 104 : 72;  // of a thread that multiplies
constexpr int WORKERS = 8 * HALVES;                          // warps that multiply
constexpr int W_ROW = FORWARD ? 128 : 16 * BITS;             // bytes
constexpr int W_HALF = 128 * W_ROW, S_HALF = 2 * 128 * 16;
constexpr int W_STAGE = HALVES * W_HALF, S_STAGE = HALVES * S_HALF, X_STAGE = BN * 128;
constexpr int COLUMN = 132;                                  // floats of a row of x in the sums: no bank twice
constexpr u32 FIELD = (1u << BITS) - 1;

template <int TYPE>
__device__ __forceinline__ float low_value(u32 pair) {
  return TYPE == 2 ? __uint_as_float(pair << 16) : half_value(pair & 0xffffu);
}

template <int TYPE>
__device__ __forceinline__ float high_value(u32 pair) {
  return TYPE == 2 ? __uint_as_float(pair & 0xffff0000u) : half_value(pair >> 16);
}

// What brings a pair with fields at these positions to code * LIFT.
struct Undo {
  u32 by, less;
};
__device__ __forceinline__ Undo undo(int low, int high) {
#if X_TYPE == 2
  return {u32(254 - low) << 7 | u32(254 - high) << 23, 0u};
#else
  return {u32(15 - low) << 10 | u32(15 - high) << 26, 0x80008000u | u32(25 - low) << 10 | u32(25 - high) << 26};
#endif
}
constexpr float LIFT = X_TYPE == 2 ? 0.015625f : 1.0f;  // 2^(127 - 133)
#define X_TURNED (FORWARD && TURNED)
#define W_TURNED (!FORWARD)
#define FOLDED ((X_TURNED || W_TURNED) && X_TYPE == 2 && S_TYPE == 2)

// Of a row or a pair of rows: scale / LIFT and bias.
struct Scales {
#if X_TYPE == S_TYPE
  u32 s, b;
#else
  float s[2], b[2];
#endif
};

__device__ __forceinline__ float stored(const char* at) {
  return S_TYPE == 0 ? *reinterpret_cast<const float*>(at) : low_value<S_TYPE>(*reinterpret_cast<const u16*>(at));
}

template <int FURTHER>  // bytes from the first row's to the second's, which are the same if 0
__device__ __forceinline__ Scales scales_of(const char* first) {
  const char* const second = first + FURTHER;
  constexpr int BIASES = 128 * 16;
#if X_TYPE == S_TYPE
  const u32 s = *reinterpret_cast<const u16*>(first), b = *reinterpret_cast<const u16*>(first + BIASES);
  const u32 s2 = FURTHER == 0 ? s : *reinterpret_cast<const u16*>(second);
  const u32 b2 = FURTHER == 0 ? b : *reinterpret_cast<const u16*>(second + BIASES);
  const u32 pair = __byte_perm(s, s2, 0x5410);
  return {X_TYPE == 2 && !FOLDED ? mul2(pair, 0x42804280u) : pair, __byte_perm(b, b2, 0x5410)};  // bfloat16: by 64
#else
  Scales out;
  const char* const at[2] = {first, second};
#pragma unroll
  for (int i = 0; i < 2; i++) out.s[i] = stored(at[i]) * (1.0f / LIFT), out.b[i] = stored(at[i] + BIASES);
  return out;
#endif
}

// A masked pair as weights.
__device__ __forceinline__ u32 weights(u32 pair, const Undo& of, const Scales& scale) {
  const u32 code = X_TYPE == 2 ? mul2(pair, of.by) : fma2(pair, of.by, of.less);
#if X_TYPE == S_TYPE
  return fma2(code, scale.s, scale.b);
#else
  return round2(fmaf(low_value<X_TYPE>(code), scale.s[0], scale.b[0]), fmaf(high_value<X_TYPE>(code), scale.s[1], scale.b[1]));
#endif
}

__device__ __forceinline__ u32 masked(u32 bytes, u32 mask) {
  return X_TYPE == 2 ? bytes & mask : and_or(bytes, mask, 0x64006400u);
}

__device__ __forceinline__ u64 descriptor(u32 at) {
  return u64((at & 0x3ffffu) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

#if W_TURNED
// Exponents of pairs of bfloat16: of 1, of what a subnormal code lacks, of 2^-32.
constexpr u32 BY_UNIT = 127 * 0x00800080u, BY_LIFT = 133 * 0x00800080u, BY_PART = u32(127 - 32) * 0x00800080u;

// Of rows 2 j and 2 j + 1 of a stage, whose scales begin at `pair`: those of the i-th group from `first` on go to the i-th 8 bytes, of
// one type with their biases; otherwise as floats, and biases where biases were.
__device__ __forceinline__ void pack_scales(char* pair, int first) {
  constexpr int GROUPS = 128 / GROUP;
#if X_TYPE == S_TYPE
  Scales found[GROUPS];
#pragma unroll
  for (int i = 0; i < GROUPS; i++) found[i] = scales_of<16>(pair + first + i * S_BYTES);
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    const u32 s = FOLDED ? mul2(found[i].s, BY_PART + BY_LIFT) : found[i].s, b = FOLDED ? mul2(found[i].b, BY_PART) : found[i].b;
    *reinterpret_cast<uint2*>(pair + 8 * i) = make_uint2(s, b);
  }
#else
#pragma unroll
  for (int part = 0; part < 2; part++) {  // scales, biases
    const char* const at = pair + part * 2048 + first;
    const float by = part ? 1.0f : 1.0f / LIFT;
    float2 found[GROUPS];
#pragma unroll
    for (int i = 0; i < GROUPS; i++) found[i] = make_float2(by * stored(at + i * S_BYTES), by * stored(at + i * S_BYTES + 16));
#pragma unroll
    for (int i = 0; i < GROUPS; i++) *reinterpret_cast<float2*>(pair + part * 2048 + 8 * i) = found[i];
  }
#endif
}

__device__ __forceinline__ Scales packed_scales(const char* at) {
#if X_TYPE == S_TYPE
  const uint2 both = *reinterpret_cast<const uint2*>(at);
  return {both.x, both.y};
#else
  const float2 s = *reinterpret_cast<const float2*>(at), b = *reinterpret_cast<const float2*>(at + 2048);
  return {{s.x, s.y}, {b.x, b.y}};
#endif
}

// The pair that stands BITS * PLACE above the lowest bits of `pairs`, as weights.
template <int PLACE>
__device__ __forceinline__ u32 weights_at(u32 pairs, const Scales& scale) {
  constexpr int POSITION = BITS == 8 ? 0 : BITS * PLACE;
  constexpr u32 ABOVE = X_TYPE == 2 ? 0u : 0x64u;
  const u32 pair = BITS == 8 && PLACE ? __byte_perm(pairs, ABOVE, 0x4341) : masked(pairs, FIELD * 0x10001u << POSITION);
#if FOLDED
  return fma2(pair, POSITION ? mul2(scale.s, BY_UNIT - POSITION * 0x00800080u) : scale.s, scale.b);
#else
  return weights(pair, undo(POSITION, POSITION), scale);
#endif
}
#endif

#if X_TURNED
// Pairs p = 0..7 of a row, code * 2^position(p): columns 16 t + p and 16 t + 8 + p of a step.
__device__ __forceinline__ int position(int p) { return BITS * (p % (8 / BITS)); }

__device__ __forceinline__ void pairs_of(const char* from, u32* pairs) {
#if BITS == 2
  const u32 word = *reinterpret_cast<const u32*>(from), parts[2] = {word, word >> 8};
#else
  const uint2 both = *reinterpret_cast<const uint2*>(from);
  const u32 low = __byte_perm(both.x, both.y, 0x5410), high = __byte_perm(both.x, both.y, 0x7632);
  const u32 parts[4] = {low, low >> 8, high, high >> 8};
#endif
#pragma unroll
  for (int p = 0; p < 8; p++) pairs[p] = masked(parts[p * BITS / 8], FIELD * 0x10001u << position(p));
}
#endif

extern "C" __global__ void __launch_bounds__(32 * WORKERS + 128, BLOCKS)
qmm_stream(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap s_map,
           const __grid_constant__ TensorMap b_map, char* __restrict__ y, int M, int N, int K, const uint4* tiles,
           const int* rows) {
  SHARED_MEMORY(shared);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, rank = blockIdx.x, ranks = gridDim.x;
  const int half = warp / 8 % HALVES, helper = warp - WORKERS;
  const int out0 = (blockIdx.y * HALVES + half) * 128, outs = FORWARD ? N : K, reduced = FORWARD ? K : N;
  const u32 base = shared_address(shared);
  constexpr int W_RING = X_STAGES * X_STAGE, S_RING = W_RING + W_STAGES * W_STAGE, BARRIERS = S_RING + S_STAGES * S_STAGE;
  const u32 x_full = base + BARRIERS, x_empty = x_full + 8 * X_STAGES, w_full = x_empty + 8 * X_STAGES;
  const u32 w_empty = w_full + 8 * W_STAGES, s_full = w_empty + 8 * W_STAGES, s_empty = s_full + 8 * S_STAGES;
  const u32 x_ready = X_TURNED ? s_empty + 8 * S_STAGES : x_full, s_ready = W_TURNED ? s_empty + 8 * S_STAGES : s_full;
  if (tid == 0) {
    for (int i = 0; i < X_STAGES; i++) barrier_init(x_full + 8 * i, 1), barrier_init(x_empty + 8 * i, WORKERS * ARRIVALS);
    for (int i = 0; i < W_STAGES; i++) barrier_init(w_full + 8 * i, 1), barrier_init(w_empty + 8 * i, WORKERS * ARRIVALS);
    for (int i = 0; i < S_STAGES; i++) barrier_init(s_full + 8 * i, 1), barrier_init(s_empty + 8 * i, WORKERS * ARRIVALS);
    for (int i = 0; i < X_STAGES * X_TURNED; i++) barrier_init(x_ready + 8 * i, 2 * ARRIVALS);
    for (int i = 0; i < S_STAGES * W_TURNED; i++) barrier_init(s_ready + 8 * i, 2 * ARRIVALS);
    barriers_ready();
  }
  __syncthreads();
#if GROUPED
  predecessor_done();
  const uint4 tile = tiles[blockIdx.z];
  const int expert = tile.x, m0 = tile.y, end_of_rows = tile.y + tile.z;
  if (tile.z == 0) return;  // the whole cluster
#else
  const int m0 = blockIdx.z / PARTS * BN, end_of_rows = M;
#endif
  const int part = blockIdx.z % PARTS;
  auto weights_copy = [&](u32 to, const TensorMap& map, int column, int row, u32 done) {
#if GROUPED
    tensor_copy(to, map, column, row, expert, done);
#else
    tensor_copy(to, map, column, row, done);
#endif
  };
  const int shares = ranks * PARTS, steps = (reduced + 63) / 64, share = ((steps + shares - 1) / shares + UNIT - 1) / UNIT * UNIT;
  const int begin = (part * ranks + rank) * share, end = min(begin + share, steps);  // the host starts no rank without a step

  if (helper >= 0) {
    registers_down<BLOCKS == 2 || HALVES == 2 ? 32 : 24>();
    dependents_may_start();
    if (helper == 0 && lane == 0) {  // words and scales
      int w_slot = 0, w_round = 0, s_slot = 0, s_round = 0;
#pragma unroll 1
      for (int step = begin; step < end; step++) {
        if (step % S_STEPS == 0 || step == begin) {
          if (s_round) barrier_wait(s_empty + 8 * s_slot, (s_round - 1) & 1);
          const u32 to = base + S_RING + s_slot * S_STAGE, done = s_full + 8 * s_slot;
          barrier_expect(done, S_STAGE);
#pragma unroll
          for (int h = 0; h < HALVES; h++) {
            const int out = out0 + 128 * h, row = FORWARD ? out : step * 64;
            const int column = FORWARD ? step / S_STEPS * 16 : out / GROUP * S_BYTES / 16 * 16;
            weights_copy(to + h * S_HALF, s_map, column, row, done);
            weights_copy(to + h * S_HALF + 2048, b_map, column, row, done);
          }
          if (++s_slot == S_STAGES) s_slot = 0, s_round++;
        }
        if (step % W_STEPS == 0) {
          if (w_round) barrier_wait(w_empty + 8 * w_slot, (w_round - 1) & 1);
          const u32 to = base + W_RING + w_slot * W_STAGE, done = w_full + 8 * w_slot;
          barrier_expect(done, W_STAGE);
#pragma unroll
          for (int h = 0; h < HALVES; h++) {
            const int out = out0 + 128 * h;
            weights_copy(to + h * W_HALF, w_map, FORWARD ? step / W_STEPS * 128 : out / 8 * BITS, FORWARD ? out : step * 64, done);
          }
          if (++w_slot == W_STAGES) w_slot = 0, w_round++;
        }
      }
    } else if (helper == 1 && lane == 0) {  // x
      predecessor_done();
      int slot = 0, round = 0;
#pragma unroll 1
      for (int step = begin; step < end; step++) {
        if (round) barrier_wait(x_empty + 8 * slot, (round - 1) & 1);
        barrier_expect(x_full + 8 * slot, X_STAGE);
        tensor_copy(base + slot * X_STAGE, x_map, step * 64, m0, x_full + 8 * slot);
        if (++slot == X_STAGES) slot = 0, round++;
      }
    } else if (X_TURNED && helper >= 2) {  // x, turned where it lies: a lane says where a piece of eight columns is
      const u32 own = base + (helper - 2) * 512 + lane / 8 * 128 + (lane % 8 ^ ((helper - 2) * 4 + lane / 8)) * 16;
      int slot = 0, parity = 0;
#pragma unroll 1
      for (int step = begin; step < end; step++) {
        barrier_wait(x_full + 8 * slot, parity);
        u32 pieces = own + slot * X_STAGE;
#pragma unroll 1
        for (int m = 0; m < BN; m += 16, pieces += 2048) {  // eight rows, and the eight after them
          u32 four[2][4];
          load_turned(four[0], pieces), load_turned(four[1], pieces + 1024);
          store_matrices(four[0], pieces), store_matrices(four[1], pieces + 1024);
        }
        fence_async();
        __syncwarp();
        if (lane < ARRIVALS) barrier_arrive(x_ready + 8 * slot);
        if (++slot == X_STAGES) slot = 0, parity ^= 1;
      }
#if W_TURNED
    } else if (helper >= 2) {  // scales, a pair of rows a lane
      char* const own = shared + S_RING + (helper - 2) * 1024 + lane * 32;
      int slot = 0, parity = 0;
#pragma unroll 1
      for (int step = begin; step < end; step += S_STEPS) {
        barrier_wait(s_full + 8 * slot, parity);
#pragma unroll
        for (int h = 0; h < HALVES; h++) pack_scales(own + slot * S_STAGE + h * S_HALF, (out0 + 128 * h) / GROUP * S_BYTES % 16);
        fence_async();  // the copy engine writes there next
        __syncwarp();
        if (lane < ARRIVALS) barrier_arrive(s_ready + 8 * slot);
        if (++slot == S_STAGES) slot = 0, parity ^= 1;
      }
#endif
    }
  } else {
    registers_up<REGISTERS>();
    dependents_may_start();
    const int g = lane / 4, t = lane % 4, first = warp % 8 * 16;  // of the warp's 16 out in its half
    constexpr int READERS = 8 / BITS;  // warps of the same words, if those are turned
    const int out = W_TURNED ? warp % 8 / READERS * (128 / BITS) + g * (16 / BITS) + warp % READERS * 2 : first + g;
    constexpr int NEXT_OUT = W_TURNED ? 1 : 8;
    float sums[BN / 2];
#pragma unroll
    for (int i = 0; i < BN / 2; i++) sums[i] = opaque(0.0f);
#if FORWARD
#if !TURNED
    const Undo of = undo(0, BITS == 8 ? 0 : BITS);
#endif
#else
    const int behind = warp % READERS * 2 * BITS;  // bits of other warps
    const int flat = lane * W_ROW + warp % 8 / READERS * 16;
    const u32 own = base + W_RING + half * W_HALF + (flat ^ (flat >> 7 & (BITS - 1)) << 4);  // row `lane` of a stage
    const char* const of_groups = shared + S_RING + half * S_HALF + t * 32 + out / GROUP * 8;
#endif
    // Where weights are unpacked from scales in any order, all must be there before a stage is given back: they are when they
    // have been multiplied. To look at every one before the product cost 1 us of 35.
    constexpr bool LATE = W_TURNED && BUFFERS == 1;
    u32 left[BUFFERS][16];
    const u32 never = u32(M) >> 31;
    int w_slot = 0, w_parity = 0, s_slot = 0, s_parity = 0, x_slot = 0, x_parity = 0;
    const auto scale_step = [&](int step, int in_w) { return (W_STEPS % S_STEPS ? step : in_w) & (S_STEPS - 1); };
    auto give_back = [&](u32 read, int in_w, int in_s) {  // words and scales to the copy engine
      if (in_w == W_STEPS - 1) {
        if (lane < ARRIVALS) barrier_arrive_after(read, never, w_empty + 8 * w_slot);
        if (++w_slot == W_STAGES) w_slot = 0, w_parity ^= 1;
      }
      if (in_s == S_STEPS - 1) {
        if (lane < ARRIVALS) barrier_arrive_after(read, never, s_empty + 8 * s_slot);
        if (++s_slot == S_STAGES) s_slot = 0, s_parity ^= 1;
      }
    };
    auto unpack = [&](u32* to, int step, int in_w) {
      const int in_s = scale_step(step, in_w);
      if (in_w == 0) barrier_wait(w_full + 8 * w_slot, w_parity);
      if (in_s == 0 || (W_STEPS % S_STEPS && step == begin)) barrier_wait(s_ready + 8 * s_slot, s_parity);
      const char* const w_stage = shared + W_RING + w_slot * W_STAGE + half * W_HALF;
#if X_TURNED
#pragma unroll
      for (int h = 0; h < 2; h++) {  // out g and g + 8
        const int row = first + g + 8 * h;
        const char* const s_row = shared + S_RING + s_slot * S_STAGE + half * S_HALF + row * 16;
        const Scales scale = scales_of<0>(s_row + u32(in_s * 64 + t * 16) / GROUP * S_BYTES);
        u32 pairs[8];
#if FOLDED
        const u32 bias = mul2(scale.b, u32(127 - 32) * 0x00800080u);
#endif
        pairs_of(w_stage + row * 128 + ((in_w * BITS / 2 + t * BITS / 8) ^ g) * 16 + t * BITS * 2 % 16, pairs);
#pragma unroll
        for (int p = 0; p < 8; p++) {
#if FOLDED
          to[2 * p + h] = fma2(pairs[p], mul2(scale.s, u32(127 + 133 - 32 - position(p)) * 0x00800080u), bias);
#else
          to[2 * p + h] = weights(pairs[p], undo(position(p), position(p)), scale);
#endif
        }
      }
#elif FORWARD
      const char* const s_row = shared + S_RING + s_slot * S_STAGE + half * S_HALF + (first + g) * 16;
#pragma unroll
      for (int h = 0; h < 2; h++) {  // out g and g + 8
        const char* const row = w_stage + (first + g + 8 * h) * 128;
        Scales scale;
#pragma unroll
        for (int s = 0; s < 4; s++) {  // 16 columns
          if (s * 16 % GROUP == 0) {
            const char* const at = s_row + h * 128 + (in_s * 64 + s * 16) / GROUP * S_BYTES;
            scale = scales_of<0>(at);
          }
          u32 low, high;  // columns 2 t, 2 t + 1 and 2 t + 8, 2 t + 9
#if BITS == 2
          const u32 word = *reinterpret_cast<const u32*>(row + (in_w ^ g) * 16 + s * 4) >> 4 * t;
          low = masked(__byte_perm(word, 0, 0x0000), 0x000c0003u), high = masked(__byte_perm(word, 0, 0x2222), 0x000c0003u);
#elif BITS == 4
          const uint2 both = *reinterpret_cast<const uint2*>(row + ((in_w * 2 + s / 2) ^ g) * 16 + s % 2 * 8);
          low = masked(__byte_perm(both.x, 0, t * 0x1111), 0x00f0000fu), high = masked(__byte_perm(both.y, 0, t * 0x1111), 0x00f0000fu);
#else
          const char* const piece = row + ((in_w * 4 + s) ^ g) * 16 + t / 2 * 4;
          constexpr u32 ABOVE = X_TYPE == 2 ? 0u : 0x64u;
          const u32 select = t % 2 ? 0x4342 : 0x4140;
          low = __byte_perm(*reinterpret_cast<const u32*>(piece), ABOVE, select);
          high = __byte_perm(*reinterpret_cast<const u32*>(piece + 8), ABOVE, select);
#endif
          to[4 * s + h] = weights(low, of, scale), to[4 * s + 2 + h] = weights(high, of, scale);
        }
      }
#else
      u32 pairs[8];
      const u32 words = own + w_slot * W_STAGE + in_w * 64 * W_ROW;
      load_turned(pairs, words), load_turned(pairs + 4, words + 32 * W_ROW);
#pragma unroll
      for (int i = 0; i < 8; i++) {  // rows 8 i + 2 t, + 1
        const Scales scale = packed_scales(of_groups + s_slot * S_STAGE + in_w * 1024 + i * 128);
        const u32 shifted = BITS == 8 ? pairs[i] : pairs[i] >> behind;
        to[2 * i] = weights_at<0>(shifted, scale), to[2 * i + 1] = weights_at<1>(shifted, scale);
      }
#endif
      __syncwarp();
      if (LATE) return;
      u32 read = to[0] | to[15];  // of the first and the last that was asked for
#if W_TURNED  // of all: the compiler asks for scales in any order
#pragma unroll
      for (int i = 1; i < 15; i++) read |= to[i];
#endif
      give_back(read, in_w, in_s);
    };
    auto multiply = [&](const u32* from) {
      barrier_wait(x_ready + 8 * x_slot, x_parity);
      const u64 right = descriptor(base + x_slot * X_STAGE);
      wgmma_begin();
#pragma unroll
      for (int s = 0; s < 4; s++) wgmma(sums, from + 4 * s, right + s * 2);
      wgmma_commit();
    };
    auto multiplied = [&](const u32* from, int slot) {  // after the wait: registers and stage may be used anew
#pragma unroll
      for (int i = 0; i < 16; i++) in_use(from[i]);
      if (lane < ARRIVALS) barrier_arrive(x_empty + 8 * slot);
    };
    if (BUFFERS == 2) unpack(left[0], begin, 0);
#pragma unroll 1
    for (int first_step = begin; first_step < end; first_step += UNROLL) {
#pragma unroll
      for (int i = 0; i < UNROLL; i++) {
        const int step = first_step + i, in_w = (UNROLL == W_STEPS ? i : step) & (W_STEPS - 1);
        if (step >= end) break;
        if (BUFFERS == 1) unpack(left[0], step, in_w);
        multiply(left[i % BUFFERS]);
        if (BUFFERS == 2) {  // while the matrix units multiply
          wgmma_wait<1>(sums);
          if (step > begin) multiplied(left[(i + 1) % 2], x_slot ? x_slot - 1 : X_STAGES - 1);
          if (step + 1 < end) unpack(left[(i + 1) % 2], step + 1, (in_w + 1) & (W_STEPS - 1));
        } else {
          wgmma_wait<0>(sums);
          multiplied(left[0], x_slot);
          if (LATE) give_back(0, in_w, scale_step(step, in_w));
        }
        if (++x_slot == X_STAGES) x_slot = 0, x_parity ^= 1;
      }
    }
    wgmma_wait<0>(sums);
#pragma unroll
    for (int i = 0; i < 16 * BUFFERS; i++) in_use(left[i / 16][i % 16]);
    workers_sync<WORKERS>();  // all have read what the sums are written over

    // sums[4 * j + 2 * i + c]: out and NEXT_OUT * i more, row of x 8 * j + 2 * t + c. Turned words' outs are 16 / BITS apart:
    // with odd rows of eight behind even ones fewer lanes meet in a bank.
    auto place = [](int m) { return (W_TURNED ? m / 8 * 8 + m % 2 * 4 + m % 8 / 2 : m) * COLUMN; };
    const int sums_at = half * BN * COLUMN;
    float* const mine = reinterpret_cast<float*>(shared) + sums_at;
#pragma unroll
    for (int i = 0; i < BN / 2; i++)
      mine[place(i / 4 * 8 + t * 2 + i % 2) + out + i / 2 % 2 * NEXT_OUT] = FOLDED ? sums[i] * 4294967296.0f : sums[i];
    predecessor_done();
    if (ranks > 1)
      cluster_sync();
    else
      workers_sync<WORKERS>();
    const int o = lane * 4;  // four outs of a row of x
#pragma unroll 1
    for (int m = rank + ranks * (warp % 8); m < BN && m0 + m < end_of_rows && out0 + o < outs; m += 8 * ranks) {
      float4 sum = *reinterpret_cast<const float4*>(mine + place(m) + o);
      if (ranks > 1) {
        float4 parts[8];
#pragma unroll
        for (int r = 0; r < 8; r++)
          if (r < ranks) parts[r] = remote(base + (sums_at + place(m) + o) * 4, r);
        sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < 8; r++)
          if (r < ranks) sum.x += parts[r].x, sum.y += parts[r].y, sum.z += parts[r].z, sum.w += parts[r].w;
      }
#if PARTS > 1
      *reinterpret_cast<float4*>(y + (size_t(part * M + m0 + m) * outs + out0 + o) * 4) = sum;  // outs % 4 == 0
      continue;
#endif
      const u32 low = round2(sum.x, sum.y), high = round2(sum.z, sum.w);
      u16* to = reinterpret_cast<u16*>(y) + size_t(GROUPED ? rows[m0 + m] : m0 + m) * outs + out0 + o;
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
}

#if PARTS > 1
extern "C" __global__ void add_parts(const float4* parts, uint2* y, int fours) {
  dependents_may_start();
  predecessor_done();
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= fours) return;
  float4 sum = parts[i];
#pragma unroll
  for (int p = 1; p < PARTS; p++) {
    const float4 part = parts[size_t(p) * fours + i];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  y[i] = make_uint2(round2(sum.x, sum.y), round2(sum.z, sum.w));
}
#endif
