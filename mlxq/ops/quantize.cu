// Rule "affine" of mlxq/format.py (formula: affine_groups there) and weights from codes, to the bit.
//
//   quantize     w        W    (groups, GROUP)              W_TYPE 0 float32, 1 float16, 2 bfloat16
//                words    u32  (groups, GROUP * BITS / 32)
//                scales   S    (groups,)                    S_TYPE likewise; biases too
//                report   u32  (2,)  zero before: weights that are NaN or infinite; other groups that S cannot hold
//   dequantize   the reverse: scale * code, rounded, + bias, rounded, then rounded to W
//
// Every operation is one IEEE float32 operation of the rule: compile with --fmad=false and without fast math. Group i is
// the warp's i-th of a grid of ceil(groups / 8) blocks of 256 threads; element e of lane l is weight 32 * e + l, so the
// rule's sum by halves is element sums, then xor 16, 8, 4, 2, 1. dequantize: a word a thread, 256 a block.
// Limited by three divisions a weight (quantize), by memory (dequantize).

typedef unsigned int u32;
typedef unsigned short u16;
constexpr int EACH = GROUP / 32;
constexpr int PER_WORD = 32 / BITS;
constexpr int WORDS = GROUP / PER_WORD;
constexpr float LEVELS = (1 << BITS) - 1;

template <int TYPE>
__device__ __forceinline__ float load(const void* from, size_t at) {
  if (TYPE == 0) return static_cast<const float*>(from)[at];
  const u16 bits = static_cast<const u16*>(from)[at];
  if (TYPE == 2) return __uint_as_float(static_cast<u32>(bits) << 16);
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

template <int TYPE>
__device__ __forceinline__ u32 pattern(float value) {
  if (TYPE == 0) return __float_as_uint(value);
  u16 bits;
  if (TYPE == 1)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

template <int TYPE>
__device__ __forceinline__ float stored(float value) {
  if (TYPE == 0) return value;
  const u16 bits = pattern<TYPE>(value);
  return load<TYPE>(&bits, 0);
}

template <int TYPE>
__device__ __forceinline__ void keep(void* to, size_t at, float value) {
  if (TYPE == 0)
    static_cast<float*>(to)[at] = value;
  else
    static_cast<u16*>(to)[at] = pattern<TYPE>(value);
}

__device__ __forceinline__ bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }
__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }
__device__ __forceinline__ float across(float value, int distance) { return __shfl_xor_sync(0xffffffffu, value, distance); }

// The lane's codes on one grid, and the group's sum of squared errors in units of the range.
__device__ __forceinline__ float encode(const float* w, float scale, float bias, float unit, u32* codes) {
  float errors[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    float q = (w[e] - bias) / scale;
    q = q > 0.0f ? q : 0.0f;
    q = q < LEVELS ? q : LEVELS;
    q = rintf(q);
    codes[e] = static_cast<u32>(q);
    const float error = (w[e] - (scale * q + bias)) * unit;
    const float squared = error * error;
    errors[e] = squared < MLXQ_ERROR_BELOW ? 0.0f : squared;
  }
#pragma unroll
  for (int n = EACH / 2; n > 0; n /= 2)
#pragma unroll
    for (int e = 0; e < n; e++) errors[e] = errors[e] + errors[e + n];
  float sum = errors[0];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum = sum + across(sum, distance);
  return sum;
}

extern "C" __global__ void __launch_bounds__(256)
quantize(const void* __restrict__ w, u32* __restrict__ words, void* __restrict__ scales, void* __restrict__ biases,
         u32* __restrict__ report, long long groups) {
  const size_t group = blockIdx.x * size_t(8) + threadIdx.x / 32;
  const u32 lane = threadIdx.x % 32;
  if (group >= groups) return;
  float values[EACH];
  u32 bad = 0;
  float low = 3.4028235e38f, high = -3.4028235e38f;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const float value = load<W_TYPE>(w, group * GROUP + 32 * e + lane);
    bad += is_finite(value) ? 0u : 1u;
    values[e] = fabsf(value) < MLXQ_FLUSH_BELOW ? 0.0f : value;
    low = values[e] < low ? values[e] : low;
    high = values[e] > high ? values[e] : high;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other_low = across(low, distance), other_high = across(high, distance);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
    bad += __shfl_xor_sync(0xffffffffu, bad, distance);
  }
  const float range = high - low;
  u32 codes[EACH] = {};
  float chosen_scale = MLXQ_CONSTANT_SCALE, chosen_bias = stored<S_TYPE>(low);
  bool held = is_finite(chosen_bias);
  if (!(range < MLXQ_CONSTANT_BELOW)) {
    const float smallest = S_TYPE == 0   ? MLXQ_SMALLEST_SCALE_FLOAT32
                           : S_TYPE == 1 ? MLXQ_SMALLEST_SCALE_FLOAT16
                                         : MLXQ_SMALLEST_SCALE_BFLOAT16;
    const float unit = __uint_as_float((254u << 23) - (__float_as_uint(range) & 0x7f800000u));  // 2^-floor(log2(range))
    const float half_bin = range * (0.5f / (LEVELS + 1.0f));
    const bool low_edge = fabsf(low) > fabsf(high);
    const float edge = low_edge ? low : high;
    const float count = larger(rintf(fabsf(edge) / (range / LEVELS)), 1.0f);
    float grid_bias[3], grid_scale[3];
    grid_bias[0] = stored<S_TYPE>(low);
    grid_scale[0] = larger(stored<S_TYPE>((high - grid_bias[0]) / LEVELS), smallest);
    grid_bias[1] = stored<S_TYPE>(low + half_bin);
    grid_scale[1] = larger(stored<S_TYPE>(((high - half_bin) - grid_bias[1]) / LEVELS), smallest);
    grid_bias[2] = stored<S_TYPE>(edge);
    const float steps = larger(stored<S_TYPE>(fabsf(grid_bias[2]) / count), smallest);
    grid_scale[2] = low_edge ? steps : -steps;
    float best = __uint_as_float(0x7f800000u);
    held = false;
#pragma unroll
    for (int i = 0; i < 3; i++) {
      u32 tried[EACH];
      const float error = encode(values, grid_scale[i], grid_bias[i], unit, tried);
      if (range < MLXQ_RANGE_LIMIT && is_finite(grid_scale[i]) && is_finite(grid_bias[i]) && error < best) {
        best = error;
        held = true;
        chosen_scale = grid_scale[i];
        chosen_bias = grid_bias[i];
#pragma unroll
        for (int e = 0; e < EACH; e++) codes[e] = tried[e];
      }
    }
  }
  if (lane == 0 && (bad || !held)) atomicAdd(&report[bad ? 0 : 1], bad ? bad : 1u);
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    u32 word = codes[e] << (lane % PER_WORD * BITS);
#pragma unroll
    for (int distance = 1; distance < PER_WORD; distance *= 2) word |= __shfl_xor_sync(0xffffffffu, word, distance);
    if (lane % PER_WORD == 0) words[group * WORDS + (32 * e + lane) / PER_WORD] = word;
  }
  if (lane == 0) {
    keep<S_TYPE>(scales, group, chosen_scale);
    keep<S_TYPE>(biases, group, chosen_bias);
  }
}

extern "C" __global__ void __launch_bounds__(256)
dequantize(const u32* __restrict__ words, const void* __restrict__ scales, const void* __restrict__ biases,
           void* __restrict__ w, long long groups) {
  const size_t at = blockIdx.x * size_t(256) + threadIdx.x;
  if (at >= groups * WORDS) return;
  const u32 word = words[at];
  const float scale = load<S_TYPE>(scales, at / WORDS), bias = load<S_TYPE>(biases, at / WORDS);
  constexpr int OUT = PER_WORD * (W_TYPE == 0 ? 4 : 2) / 4;  // 32-bit registers of weights
  u32 out[OUT];
#pragma unroll
  for (int i = 0; i < OUT; i++) {
    auto value = [&](int k) { return pattern<W_TYPE>(scale * static_cast<float>((word >> (k * BITS)) & ((1u << BITS) - 1u)) + bias); };
    out[i] = W_TYPE == 0 ? value(i) : value(2 * i) | value(2 * i + 1) << 16;
  }
  if (OUT == 2) {
    static_cast<uint2*>(w)[at] = make_uint2(out[0], out[1]);
  } else {
#pragma unroll
    for (int i = 0; i < OUT / 4; i++)
      static_cast<uint4*>(w)[at * (OUT / 4) + i] = make_uint4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
  }
}
