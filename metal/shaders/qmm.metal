// y[m, n] = sum_k x[m, k] * W[n, k] for many rows of x, on 8x8 simdgroup matrices.
//
//   buffer 0  x       T     (M, K)
//   buffer 1  words   uint  (N, K * bits / 32)
//   buffer 2  scales  S     (N, K / group_size)
//   buffer 3  biases  S     (N, K / group_size)
//   buffer 4  y       T     (M, N)              qmm_split: float (splits, M, N), partial sums for sum_splits
//   buffer 5  M       int
//   buffer 6  N       int
//   buffer 7  K       int, a multiple of group_size
//   buffer 8  span    int, only qmm_split: the columns of K in a split, a multiple of 32 and of group_size
//
// Threadgroup: 32 * WM * WN threads; grid: (ceil(N / BN), ceil(M / BM), splits). Built for BM x BN of 64 x 64 and
// 32 x 64 on 2 x 2 simdgroups and of 16 x 64 on 1 x 4.
//
//              n ->  0 .. 31    32 .. 63          A simdgroup owns 32 x 32 of y: 16 accumulator matrices.
//   m  0 .. 31        sg 0        sg 1            Per step of 32 along K the threadgroup holds in its memory
//     32 .. 63        sg 2        sg 3              x      64 rows of 32 values, as T
//                                                   words  64 rows of `bits` words, still packed
//                                                   scale, bias  64 floats each, fetched when a group begins
//
// Codes become float weights on the way from threadgroup memory into a matrix, so weights are never rounded to T and W
// takes bits / 32 of the room: two buffers of everything fit (13.5 KiB for half and 4 bits), and the next step's loads are
// in flight, in registers, while this one is multiplied. One barrier a step.
//
// Both edges of the tile are ragged: rows and columns that do not exist are zeros inside and are not written.
// Accumulators: float32 matrices; the operands are float32 too (bfloat matrices are emulated before M5).
// Limited by the simdgroup multiply. A lane decodes its two weights of a W matrix, some 8 instructions, for TM products of
// 16 multiply-adds each; TM is 4, 2 or 2. Device bytes: half of a 32 x 32 tile's. Not measured on Apple hardware.
#pragma once

#include "tile.h"

// One tile of y, rows first_row to last_row of it. If GATHER, row m is that of x's row x_rows[m / block] * block +
// m % block. The partial or whole sums over columns [begin, end) go to y as Out.
template <typename T, typename S, typename Out, int bits, int group_size, int BM, int BN, int WM, int WN, bool GATHER>
METAL_FUNC void qmm_tile(const device T* x, const device uint* words, const device S* scales, const device S* biases,
                         device Out* y, const device int* x_rows, int block, int first_row, int last_row,
                         int first_column, int N, int K, int begin, int end, threadgroup T* x_tile,
                         threadgroup uint* word_tile, threadgroup float* scale_tile, ushort simdgroup, ushort lane) {
  constexpr int THREADS = 32 * WM * WN;
  constexpr int TM = BM / WM / 8;  // matrices of a simdgroup
  constexpr int TN = BN / WN / 8;
  constexpr int X_STRIDE = 32 + 16 / sizeof(T);  // padding: eight rows of a fragment fall into different banks
  constexpr int W_STRIDE = bits + 1;
  constexpr int X_LOADS = BM * 8 / THREADS;  // a thread's runs of four x
  constexpr int W_LOADS = BN * bits / THREADS;
  static_assert(X_LOADS * THREADS == BM * 8 && W_LOADS * THREADS == BN * bits && THREADS >= 2 * BN,
                "threads must divide a tile");
  const int thread_index = simdgroup * 32 + lane;
  const int words_per_row = K / 32 * bits;
  const int groups_per_row = K / group_size;
  const int row_of_lane = matrix_row(lane);
  const int column_of_lane = matrix_column(lane);
  const int row0 = simdgroup / WN * (BM / WM);
  const int column0 = simdgroup % WN * (BN / WN);

  // What this thread fetches: rows of x and of W are the same in all steps.
  const device T* x_from[X_LOADS];
  bool x_exists[X_LOADS];
  MLXQ_UNROLL
  for (int i = 0; i < X_LOADS; i++) {
    const int item = thread_index + i * THREADS;
    const int m = first_row + item / 8;
    x_exists[i] = m < last_row;
    const int row = !x_exists[i] ? 0 : GATHER ? x_rows[m / block] * block + m % block : m;
    x_from[i] = x + static_cast<size_t>(row) * K + item % 8 * 4;
  }
  const int scale_column = first_column + thread_index % BN;
  const bool scale_exists = thread_index < 2 * BN && scale_column < N;
  const size_t scale_from = static_cast<size_t>(scale_column) * groups_per_row;

  T x_next[X_LOADS][4];
  uint words_next[W_LOADS];
  float scale_next = 0.0f;

  simdgroup_float8x8 sums[TM][TN];
  MLXQ_UNROLL
  for (int i = 0; i < TM; i++) {
    MLXQ_UNROLL
    for (int j = 0; j < TN; j++) {
      sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  // Step k fetches what step k + 32 multiplies; the first round only fetches.
  for (int k = begin - 32; k < end; k += 32) {
    const int next = k + 32;
    if (next < end) {
      MLXQ_UNROLL
      for (int i = 0; i < X_LOADS; i++) {
        MLXQ_UNROLL
        for (int j = 0; j < 4; j++) {
          x_next[i][j] = x_exists[i] ? x_from[i][next + j] : static_cast<T>(0.0f);
        }
      }
      MLXQ_UNROLL
      for (int i = 0; i < W_LOADS; i++) {
        const int item = thread_index + i * THREADS;
        const int n = first_column + item / bits;
        words_next[i] = n < N ? words[static_cast<size_t>(n) * words_per_row + next / 32 * bits + item % bits] : 0u;
      }
      if (next % group_size == 0 && scale_exists) {
        scale_next = thread_index < BN ? scale_value(scales[scale_from + next / group_size])
                                       : scale_value(biases[scale_from + next / group_size]);
      }
    }
    if (k >= begin) {
      const threadgroup T* x_now = x_tile + (k / 32 & 1) * BM * X_STRIDE;
      const threadgroup uint* words_now = word_tile + (k / 32 & 1) * BN * W_STRIDE;
      const threadgroup float* scales_now = scale_tile + (k / group_size & 1) * 2 * BN;
      float scale[TN][2], bias[TN][2];
      MLXQ_UNROLL
      for (int j = 0; j < TN; j++) {
        const int n = column0 + j * 8 + column_of_lane;
        scale[j][0] = scales_now[n];
        scale[j][1] = scales_now[n + 1];
        bias[j][0] = scales_now[BN + n];
        bias[j][1] = scales_now[BN + n + 1];
      }
      MLXQ_UNROLL
      for (int kk = 0; kk < 32; kk += 8) {
        simdgroup_float8x8 x_matrix[TM];
        MLXQ_UNROLL
        for (int i = 0; i < TM; i++) {
          const threadgroup T* pair = x_now + (row0 + i * 8 + row_of_lane) * X_STRIDE + kk + column_of_lane;
          x_matrix[i].thread_elements()[0] = static_cast<float>(pair[0]);
          x_matrix[i].thread_elements()[1] = static_cast<float>(pair[1]);
        }
        const int bit = (kk + row_of_lane) * bits;
        MLXQ_UNROLL
        for (int j = 0; j < TN; j++) {
          const threadgroup uint* word = words_now + (column0 + j * 8 + column_of_lane) * W_STRIDE + bit / 32;
          simdgroup_float8x8 w_matrix;
          w_matrix.thread_elements()[0] = metal::fma(scale[j][0], code_at<bits>(word[0], bit % 32), bias[j][0]);
          w_matrix.thread_elements()[1] = metal::fma(scale[j][1], code_at<bits>(word[W_STRIDE], bit % 32), bias[j][1]);
          MLXQ_UNROLL
          for (int i = 0; i < TM; i++) {
            simdgroup_multiply_accumulate(sums[i][j], x_matrix[i], w_matrix, sums[i][j]);
          }
        }
      }
    }
    if (next < end) {
      threadgroup T* x_then = x_tile + (next / 32 & 1) * BM * X_STRIDE;
      threadgroup uint* words_then = word_tile + (next / 32 & 1) * BN * W_STRIDE;
      MLXQ_UNROLL
      for (int i = 0; i < X_LOADS; i++) {
        const int item = thread_index + i * THREADS;
        MLXQ_UNROLL
        for (int j = 0; j < 4; j++) {
          x_then[item / 8 * X_STRIDE + item % 8 * 4 + j] = x_next[i][j];
        }
      }
      MLXQ_UNROLL
      for (int i = 0; i < W_LOADS; i++) {
        const int item = thread_index + i * THREADS;
        words_then[item / bits * W_STRIDE + item % bits] = words_next[i];
      }
      if (next % group_size == 0 && thread_index < 2 * BN) {
        scale_tile[(next / group_size & 1) * 2 * BN + thread_index] = scale_next;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  MLXQ_UNROLL
  for (int i = 0; i < TM; i++) {
    const int m = first_row + row0 + i * 8 + row_of_lane;
    MLXQ_UNROLL
    for (int j = 0; j < TN; j++) {
      const int n = first_column + column0 + j * 8 + column_of_lane;
      MLXQ_UNROLL
      for (int e = 0; e < 2; e++) {
        if (m < last_row && n + e < N) {
          put(y, static_cast<size_t>(m) * N + n + e, sums[i][j].thread_elements()[e]);
        }
      }
    }
  }
}

template <typename T, typename S, int bits, int group_size, int BM, int BN, int WM, int WN>
[[kernel]] void qmm(const device T* x [[buffer(0)]], const device uint* words [[buffer(1)]],
                    const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
                    device T* y [[buffer(4)]], constant int& M [[buffer(5)]], constant int& N [[buffer(6)]],
                    constant int& K [[buffer(7)]], uint3 tile [[threadgroup_position_in_grid]],
                    ushort simdgroup [[simdgroup_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup T x_tile[2 * BM * (32 + 16 / sizeof(T))];
  threadgroup uint word_tile[2 * BN * (bits + 1)];
  threadgroup float scale_tile[4 * BN];
  const int first_row = static_cast<int>(tile.y) * BM;
  qmm_tile<T, S, T, bits, group_size, BM, BN, WM, WN, false>(x, words, scales, biases, y, nullptr, 1, first_row, M,
                                                             static_cast<int>(tile.x) * BN, N, K, 0, K, x_tile,
                                                             word_tile, scale_tile, simdgroup, lane);
}

template <typename T, typename S, int bits, int group_size, int BM, int BN, int WM, int WN>
[[kernel]] void qmm_split(const device T* x [[buffer(0)]], const device uint* words [[buffer(1)]],
                          const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
                          device float* partials [[buffer(4)]], constant int& M [[buffer(5)]],
                          constant int& N [[buffer(6)]], constant int& K [[buffer(7)]],
                          constant int& span [[buffer(8)]], uint3 tile [[threadgroup_position_in_grid]],
                          ushort simdgroup [[simdgroup_index_in_threadgroup]],
                          ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup T x_tile[2 * BM * (32 + 16 / sizeof(T))];
  threadgroup uint word_tile[2 * BN * (bits + 1)];
  threadgroup float scale_tile[4 * BN];
  const int first_row = static_cast<int>(tile.y) * BM;
  const int begin = static_cast<int>(tile.z) * span;
  partials += static_cast<size_t>(tile.z) * M * N;
  qmm_tile<T, S, float, bits, group_size, BM, BN, WM, WN, false>(
      x, words, scales, biases, partials, nullptr, 1, first_row, M, static_cast<int>(tile.x) * BN, N, K, begin,
      metal::min(begin + span, K), x_tile, word_tile, scale_tile, simdgroup, lane);
}
