// What the shaders share: reading codes and scales, and the lane's place in an 8x8 simdgroup matrix.
//
//   W[n, k] = scales[n, k / group_size] * code[n, k] + biases[n, k / group_size]
//
//   words           uint  (N, K * bits / 32)   codes little-endian along K: code k of a row is in word k * bits / 32
//   scales, biases  S     (N, K / group_size)  S: float, half or bfloat, whatever T, the type of activations, is
//
// K is a multiple of group_size (32, 64 or 128); M and N are any. Pointers need the alignment of their element only:
// no vector is loaded through one. Sums are float32. Nothing here was run on Apple hardware; what was checked, and on
// what, is in tests/test_shaders.py and tools/results.
#pragma once

#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

using namespace metal;

// Before every loop that indexes an array of registers: rolled up, the array would live in device memory.
#define MLXQ_UNROLL _Pragma("clang loop unroll(full)")

// A scale or a bias as float. float16 goes through integers where it is subnormal: devices may flush those.
METAL_FUNC float scale_value(float stored) { return stored; }

METAL_FUNC float scale_value(bfloat stored) { return static_cast<float>(stored); }

METAL_FUNC float scale_value(half stored) {
  const uint pattern = as_type<ushort>(stored);
  const uint magnitude = pattern & 0x7fffu;
  const float small = static_cast<float>(magnitude) * 5.9604645e-08f;  // 2^-24: exact
  const float tiny = pattern > 0x7fffu ? -small : small;
  return magnitude < 0x400u ? tiny : static_cast<float>(stored);
}

// The code that starts at this bit of a word.
template <int bits>
METAL_FUNC float code_at(uint word, uint shift) {
  return static_cast<float>((word >> shift) & ((1u << bits) - 1u));
}

// Code i of consecutive words held in registers; i is known when compiled.
template <int bits>
METAL_FUNC float code_of(const thread uint* words, int i) {
  return code_at<bits>(words[i * bits / 32], static_cast<uint>(i * bits % 32));
}

// A lane holds two neighbours of a row of an 8x8 simdgroup matrix, at [row, column] and [row, column + 1]. This is the
// order that MLX's own kernels rely on.
METAL_FUNC short matrix_row(ushort lane) { return static_cast<short>((lane / 4 & 4) + lane / 2 % 4); }

METAL_FUNC short matrix_column(ushort lane) { return static_cast<short>((lane / 4 & 2) * 2 + lane % 2 * 2); }

// y = x rounded to its type; bfloat by a cast only.
template <typename T>
METAL_FUNC void put(device T* y, size_t at, float value) {
  y[at] = static_cast<T>(value);
}
