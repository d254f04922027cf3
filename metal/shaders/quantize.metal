// Codes, scales and biases by rule "affine" of mlxq/format.py, and weights from them, to the bit.
//
// The rule, with its three grids, is written in format.affine_groups; every operation below is one IEEE float32 operation
// of it. So this file must be compiled without fast math, with correctly rounded division (Metal's safe math mode, which
// is MLX's; on CUDA --prec-div=true --fmad=false; on a CPU -ffp-contract=off): nothing is contracted, no division is made
// a product, none of the results depends on float32 subnormals. float16 is read and written through integers.
//
//   quantize      buffer 0  w        W     (groups, group_size)    W: float, half or bfloat
//                 buffer 1  words    uint  (groups, group_size * bits / 32)
//                 buffer 2  scales   S     (groups,)
//                 buffer 3  biases   S     (groups,)
//                 buffer 4  report   uint  (2,)    added up: weights that are NaN or infinite; other groups that S
//                                  cannot hold. The host clears it and raises the errors; such groups get zeros.
//                 buffer 5  groups   int
//   dequantize    buffer 0  words    uint  (groups, group_size * bits / 32)
//                 buffer 1  scales   S     (groups,)
//                 buffer 2  biases   S     (groups,)
//                 buffer 3  w        W     (groups, group_size): scale * code, rounded, then + bias, rounded, then to W
//                 buffer 4  groups   int
//
// Groups of a matrix (..., N, K) stand one after the other, so shapes do not matter here. Threadgroup: 256 threads;
// grid: ceil(groups / 8) threadgroups for both. A simdgroup has one group:
//
//   lane      0                1        ...  31             element e of lane l is weight 32 * e + l of the group, so
//   weights   0, 32, 64, 96    1, 33         31, 63, 95     the rule's sum by halves adds elements, then lanes ^ 16, 8,
//                                                           4, 2, 1; a + b is b + a to the bit
//
// Limited by three divisions a weight (quantize), by memory (dequantize). Not run on Apple hardware.
#pragma once

#include <metal_atomic>

#include "../../mlxq/format.h"
#include "tile.h"

#pragma METAL fp contract(off)

// To the storage type S and back: nearest, ties to even; overflow gives infinity.
METAL_FUNC float stored(float value, float) { return value; }

METAL_FUNC float stored(float value, bfloat) {
  const uint pattern = as_type<uint>(value);
  return as_type<float>((pattern + (0x7fffu + ((pattern >> 16) & 1u))) & 0xffff0000u);
}

METAL_FUNC ushort half_pattern(float value) {
  const uint pattern = as_type<uint>(value);
  const uint sign = pattern >> 16 & 0x8000u;
  const uint magnitude = pattern & 0x7fffffffu;
  uint result;
  if (magnitude >= 0x477ff000u) {  // 65520 and more
    result = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14: normal
    result = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else if (magnitude > 0x33000000u) {  // more than 2^-25: subnormal, in units of 2^-24
    const uint shift = 126u - (magnitude >> 23);
    const uint mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    const uint half_unit = 1u << (shift - 1u);
    result = (mantissa + (half_unit - 1u) + (mantissa >> shift & 1u)) >> shift;
  } else {
    result = 0u;
  }
  return static_cast<ushort>(sign | result);
}

METAL_FUNC float stored(float value, half) {
  const ushort pattern = half_pattern(value);
  if ((pattern & 0x7c00u) == 0x7c00u) {
    return as_type<float>(pattern & 0x8000u ? 0xff800000u : 0x7f800000u);
  }
  return scale_value(as_type<half>(pattern));
}

METAL_FUNC void keep(device float* out, int at, float value) { out[at] = value; }

METAL_FUNC void keep(device bfloat* out, int at, float value) {
  out[at] = as_type<bfloat>(static_cast<ushort>(as_type<uint>(stored(value, static_cast<bfloat>(0.0f))) >> 16));
}

METAL_FUNC void keep(device half* out, int at, float value) { out[at] = as_type<half>(half_pattern(value)); }

METAL_FUNC float smallest_scale(float) { return MLXQ_SMALLEST_SCALE_FLOAT32; }
METAL_FUNC float smallest_scale(bfloat) { return MLXQ_SMALLEST_SCALE_BFLOAT16; }
METAL_FUNC float smallest_scale(half) { return MLXQ_SMALLEST_SCALE_FLOAT16; }

METAL_FUNC bool is_finite(float value) { return (as_type<uint>(value) & 0x7f800000u) != 0x7f800000u; }

METAL_FUNC float larger(float a, float b) { return a > b ? a : b; }

// The lane's part of the group on one grid: codes, and the group's sum of squared errors in units of the range.
template <int EACH>
METAL_FUNC float encode(const thread float* w, float scale, float bias, float levels, float unit, thread uint* codes) {
  float errors[EACH];
  MLXQ_UNROLL
  for (int e = 0; e < EACH; e++) {
    float q = (w[e] - bias) / scale;
    q = q > 0.0f ? q : 0.0f;
    q = q < levels ? q : levels;
    q = metal::rint(q);
    codes[e] = static_cast<uint>(q);
    const float product = scale * q;
    const float value = product + bias;
    const float error = (w[e] - value) * unit;
    const float squared = error * error;
    errors[e] = squared < MLXQ_ERROR_BELOW ? 0.0f : squared;
  }
  MLXQ_UNROLL
  for (int n = EACH / 2; n > 0; n /= 2) {
    MLXQ_UNROLL
    for (int e = 0; e < n; e++) {
      errors[e] = errors[e] + errors[e + n];
    }
  }
  float sum = errors[0];
  for (ushort distance = 16; distance > 0; distance /= 2) {
    sum = sum + simd_shuffle_xor(sum, distance);
  }
  return sum;
}

template <typename W, typename S, int bits, int group_size>
[[kernel]] void quantize(const device W* w [[buffer(0)]], device uint* words [[buffer(1)]],
                         device S* scales [[buffer(2)]], device S* biases [[buffer(3)]],
                         device atomic_uint* report [[buffer(4)]], constant int& groups [[buffer(5)]],
                         uint3 tile [[threadgroup_position_in_grid]],
                         ushort simdgroup [[simdgroup_index_in_threadgroup]],
                         ushort lane [[thread_index_in_simdgroup]]) {
  constexpr int EACH = group_size / 32;
  constexpr int PER_WORD = 32 / bits;
  const float levels = static_cast<float>((1 << bits) - 1);
  const int group = static_cast<int>(tile.x) * 8 + simdgroup;
  if (group >= groups) {
    return;
  }
  const device W* from = w + static_cast<size_t>(group) * group_size;
  const S storage = static_cast<S>(0.0f);

  float values[EACH];
  uint bad = 0;
  float low = 3.4028235e38f;
  float high = -3.4028235e38f;
  MLXQ_UNROLL
  for (int e = 0; e < EACH; e++) {
    const float value = scale_value(from[32 * e + lane]);
    bad += is_finite(value) ? 0u : 1u;
    values[e] = metal::abs(value) < MLXQ_FLUSH_BELOW ? 0.0f : value;
    low = values[e] < low ? values[e] : low;
    high = values[e] > high ? values[e] : high;
  }
  for (ushort distance = 16; distance > 0; distance /= 2) {
    const float other = simd_shuffle_xor(low, distance);
    low = other < low ? other : low;
  }
  for (ushort distance = 16; distance > 0; distance /= 2) {
    const float other = simd_shuffle_xor(high, distance);
    high = other > high ? other : high;
  }
  bad = simd_sum(bad);

  const float range = high - low;
  uint codes[EACH];
  MLXQ_UNROLL
  for (int e = 0; e < EACH; e++) {
    codes[e] = 0u;
  }
  float chosen_scale = MLXQ_CONSTANT_SCALE;
  float chosen_bias = stored(low, storage);
  bool held = is_finite(chosen_bias);
  if (!(range < MLXQ_CONSTANT_BELOW)) {
    const float smallest = smallest_scale(storage);
    const float unit = as_type<float>((254u << 23) - (as_type<uint>(range) & 0x7f800000u));  // 2^-floor(log2(range))
    const float half_bin = range * (0.5f / (levels + 1.0f));
    const bool low_edge = metal::abs(low) > metal::abs(high);
    const float edge = low_edge ? low : high;
    const float count = larger(metal::rint(metal::abs(edge) / (range / levels)), 1.0f);
    float grid_bias[3], grid_scale[3];
    grid_bias[0] = stored(low, storage);
    grid_scale[0] = larger(stored((high - grid_bias[0]) / levels, storage), smallest);
    grid_bias[1] = stored(low + half_bin, storage);
    grid_scale[1] = larger(stored(((high - half_bin) - grid_bias[1]) / levels, storage), smallest);
    grid_bias[2] = stored(edge, storage);
    const float steps = larger(stored(metal::abs(grid_bias[2]) / count, storage), smallest);
    grid_scale[2] = low_edge ? steps : -steps;
    float best = as_type<float>(0x7f800000u);
    held = false;
    MLXQ_UNROLL
    for (int i = 0; i < 3; i++) {
      uint tried[EACH];
      const float error = encode<EACH>(values, grid_scale[i], grid_bias[i], levels, unit, tried);
      const bool usable = range < MLXQ_RANGE_LIMIT && is_finite(grid_scale[i]) && is_finite(grid_bias[i]);
      if (usable && error < best) {
        best = error;
        held = true;
        chosen_scale = grid_scale[i];
        chosen_bias = grid_bias[i];
        MLXQ_UNROLL
        for (int e = 0; e < EACH; e++) {
          codes[e] = tried[e];
        }
      }
    }
  }
  if (bad > 0u || !held) {
    chosen_scale = 0.0f;
    chosen_bias = 0.0f;
    MLXQ_UNROLL
    for (int e = 0; e < EACH; e++) {
      codes[e] = 0u;
    }
    if (lane == 0) {
      if (bad > 0u) {
        atomic_fetch_add_explicit(&report[0], bad, memory_order_relaxed);
      } else {
        atomic_fetch_add_explicit(&report[1], 1u, memory_order_relaxed);
      }
    }
  }
  MLXQ_UNROLL
  for (int e = 0; e < EACH; e++) {
    uint word = codes[e] << (lane % PER_WORD * bits);
    for (ushort distance = 1; distance < PER_WORD; distance *= 2) {
      word |= simd_shuffle_xor(word, distance);
    }
    if (lane % PER_WORD == 0) {
      words[static_cast<size_t>(group) * (group_size * bits / 32) + (32 * e + lane) / PER_WORD] = word;
    }
  }
  if (lane == 0) {
    keep(scales, group, chosen_scale);
    keep(biases, group, chosen_bias);
  }
}

template <typename W, typename S, int bits, int group_size>
[[kernel]] void dequantize(const device uint* words [[buffer(0)]], const device S* scales [[buffer(1)]],
                           const device S* biases [[buffer(2)]], device W* w [[buffer(3)]],
                           constant int& groups [[buffer(4)]], uint3 tile [[threadgroup_position_in_grid]],
                           ushort simdgroup [[simdgroup_index_in_threadgroup]],
                           ushort lane [[thread_index_in_simdgroup]]) {
  const int group = static_cast<int>(tile.x) * 8 + simdgroup;
  if (group >= groups) {
    return;
  }
  const device uint* from = words + static_cast<size_t>(group) * (group_size * bits / 32);
  const float scale = scale_value(scales[group]);
  const float bias = scale_value(biases[group]);
  for (int i = lane; i < group_size; i += 32) {
    const float product = scale * code_at<bits>(from[i * bits / 32], static_cast<uint>(i * bits % 32));
    const float value = product + bias;
    w[static_cast<size_t>(group) * group_size + i] = static_cast<W>(value);
  }
}
