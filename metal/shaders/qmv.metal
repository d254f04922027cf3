// y[m, n] = sum_k x[m, k] * W[n, k] for M = 1 to 8 rows of x: every word, scale and bias is read once for all rows.
//
//   buffer 0  x       T     (M, K)
//   buffer 1  words   uint  (N, K * bits / 32)
//   buffer 2  scales  S     (N, K / group_size)
//   buffer 3  biases  S     (N, K / group_size)
//   buffer 4  y       T     (M, N)
//   buffer 5  N       int
//   buffer 6  K       int, a multiple of group_size
//
// Threadgroup: 64 threads, two simdgroups that share nothing; grid: ceil(N / 8) threadgroups. M is a template argument.
//
//            k ->   lane 0      lane 1            lane 31  | lane 0 ...
//   row n           VALUES      VALUES     ...    VALUES   | next step of 32 * VALUES codes
//   row n + 1       VALUES      VALUES     ...    VALUES   |
//   row n + 2       ...                                      one simdgroup; the other has rows n + 4 to n + 7
//   row n + 3
//
// VALUES is 16 codes (2 words; 1 word of 2-bit codes), 8 codes of 8 bits. A step meets STEP / group_size groups in each
// of the four rows: the lanes load these scales and biases between them, one each, and shuffle them to their users, so
// nothing is loaded twice. x is loaded once for four outputs, as MLX's qmv does, straight from the cache.
//
// K need not be a multiple of the step: lanes past the end have zeros. Rows past N read and write nothing.
// Sums: float32, one a lane, row and output; simd_sum at the end. For M = 1 a lane adds scale * sum(code * x) +
// bias * sum(x) of its codes; for more rows a weight is made once, in registers, and used M times.
// Limited by the bandwidth of device memory while M is small, then by the multiply-adds: M a weight beside three
// instructions that make it. Not measured on Apple hardware.
#pragma once

#include "tile.h"

template <typename T, typename S, int bits, int group_size, int M>
METAL_FUNC void qmv_rows(const device T* x, const device uint* words, const device S* scales, const device S* biases,
                         device T* y, int N, int K, int first, ushort lane) {
  constexpr int ROWS = 4;
  constexpr int VALUES = bits == 8 ? 8 : 16;
  constexpr int WORDS = VALUES * bits / 32;
  constexpr int STEP = 32 * VALUES;
  constexpr int GROUPS = STEP / group_size;
  constexpr int SLOTS = (ROWS * GROUPS + 31) / 32;
  const int rows = metal::min(ROWS, N - first);
  if (rows <= 0) {
    return;
  }
  const int words_per_row = K / 32 * bits;
  const int groups_per_row = K / group_size;
  words += static_cast<size_t>(first) * words_per_row;
  scales += static_cast<size_t>(first) * groups_per_row;
  biases += static_cast<size_t>(first) * groups_per_row;

  float sums[M][ROWS];
  MLXQ_UNROLL
  for (int m = 0; m < M; m++) {
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      sums[m][r] = 0.0f;
    }
  }
  for (int k = 0; k < K; k += STEP) {
    float step_scales[SLOTS], step_biases[SLOTS];
    MLXQ_UNROLL
    for (int slot = 0; slot < SLOTS; slot++) {
      const int item = slot * 32 + lane;
      const int row = item / GROUPS;
      const int group = k / group_size + item % GROUPS;
      const bool exists = row < rows && group < groups_per_row;
      step_scales[slot] = exists ? scale_value(scales[row * groups_per_row + group]) : 0.0f;
      step_biases[slot] = exists ? scale_value(biases[row * groups_per_row + group]) : 0.0f;
    }
    const int at = k + lane * VALUES;
    const bool inside = at < K;
    uint packed[ROWS][WORDS];
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      MLXQ_UNROLL
      for (int i = 0; i < WORDS; i++) {
        packed[r][i] = inside && r < rows ? words[r * words_per_row + at * bits / 32 + i] : 0u;
      }
    }
    float scale[ROWS], bias[ROWS];
    const int group_of_lane = lane * VALUES / group_size;
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const ushort holder = static_cast<ushort>(r * GROUPS % 32 + group_of_lane);
      scale[r] = simd_shuffle(step_scales[r * GROUPS / 32], holder);
      bias[r] = simd_shuffle(step_biases[r * GROUPS / 32], holder);
    }
    if (M == 1) {
      float x_values[VALUES];
      float x_sum = 0.0f;
      MLXQ_UNROLL
      for (int i = 0; i < VALUES; i++) {
        x_values[i] = inside ? static_cast<float>(x[at + i]) : 0.0f;
        x_sum += x_values[i];
      }
      MLXQ_UNROLL
      for (int r = 0; r < ROWS; r++) {
        float dot = 0.0f;
        MLXQ_UNROLL
        for (int i = 0; i < VALUES; i++) {
          dot = metal::fma(code_of<bits>(packed[r], i), x_values[i], dot);
        }
        sums[0][r] = metal::fma(scale[r], dot, metal::fma(bias[r], x_sum, sums[0][r]));
      }
    } else {
      // Eight columns at a time: 32 weights and 8 values of x in registers.
      MLXQ_UNROLL
      for (int chunk = 0; chunk < VALUES; chunk += 8) {
        float weights[ROWS][8];
        MLXQ_UNROLL
        for (int r = 0; r < ROWS; r++) {
          MLXQ_UNROLL
          for (int i = 0; i < 8; i++) {
            weights[r][i] = metal::fma(scale[r], code_of<bits>(packed[r], chunk + i), bias[r]);
          }
        }
        MLXQ_UNROLL
        for (int m = 0; m < M; m++) {
          float x_values[8];
          MLXQ_UNROLL
          for (int i = 0; i < 8; i++) {
            x_values[i] = inside ? static_cast<float>(x[static_cast<size_t>(m) * K + at + chunk + i]) : 0.0f;
          }
          MLXQ_UNROLL
          for (int r = 0; r < ROWS; r++) {
            MLXQ_UNROLL
            for (int i = 0; i < 8; i++) {
              sums[m][r] = metal::fma(weights[r][i], x_values[i], sums[m][r]);
            }
          }
        }
      }
    }
  }
  MLXQ_UNROLL
  for (int m = 0; m < M; m++) {
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const float sum = simd_sum(sums[m][r]);
      if (lane == 0 && r < rows) {
        put(y, static_cast<size_t>(m) * N + first + r, sum);
      }
    }
  }
}

template <typename T, typename S, int bits, int group_size, int M>
[[kernel]] void qmv(const device T* x [[buffer(0)]], const device uint* words [[buffer(1)]],
                    const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
                    device T* y [[buffer(4)]], constant int& N [[buffer(5)]], constant int& K [[buffer(6)]],
                    uint3 tile [[threadgroup_position_in_grid]], ushort simdgroup [[simdgroup_index_in_threadgroup]],
                    ushort lane [[thread_index_in_simdgroup]]) {
  const int first = static_cast<int>(tile.x) * 8 + simdgroup * 4;
  qmv_rows<T, S, bits, group_size, M>(x, words, scales, biases, y, N, K, first, lane);
}
