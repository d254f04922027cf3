// W8A8: y[m, n] = x_scales[m] * sum_k w_scales[n, k / group_size] * codes_x[m, k] * codes_w[n, k], int8 products exact.
//
//   buffer 0  x         uint   (M, K / 4)               four int8 a word, lowest byte first
//   buffer 1  x_scales  float  (M,)                     one a token
//   buffer 2  w         uint   (N, K / 4)               four int8 a word; or the 8-bit words of the format, whose code
//                                                       is value + 128: flip is 0 for the first, 0x80808080 for these
//   buffer 3  w_scales  float  (N,) if group_size is 0, else (N, K / group_size)
//   buffer 4  y         T      (M, N)                   float, half, bfloat; or int: the sums themselves, no scales
//   buffer 5  M         int                             q8_mv: a template argument; N is 5, K is 6, flip is 7
//   buffer 6  N         int
//   buffer 7  K         int, a multiple of 32 and of group_size
//   buffer 8  flip      uint
//
// With one scale a row the sum is int32 and exact while it fits: K up to 131,071; y = float(sum) * (x_scales * w_scales).
// With groups the int32 sum of a group is exact, and the scaled groups add up in float32; y = that * x_scales.
//
// q8_mm   threadgroup: 128 threads, 2 x 2 simdgroups of 32 x 32; grid: (ceil(N / 64), ceil(M / 64)). Picture: qmm's.
//         There is no int8 product on Apple GPUs before M5, so the 8x8 float32 matrices multiply: a product of two int8
//         is at most 2^14, so 1024 of them add up to at most 2^24 without rounding, in any order. Every 1024 columns (or
//         every group) the float sums move to the int32 (or scaled) ones. Two buffers, one barrier a step, as in qmm.
// q8_mv   M = 1 to 8; threadgroup: 64 threads; grid: ceil(N / 8). Picture: qmv's; a lane has two words of each row in a
//         step of 256 columns. Integer multiply-adds; every word of w is read once for all rows.
//
// q8_rows makes x: codes = clamp(rint(x / scale), -127, 127), scale = max |x| / 127 of the row, 1 for a row of zeros.
//   buffer 0  x       T      (M, K)
//   buffer 1  codes   uint   (M, K / 4)
//   buffer 2  scales  float  (M,)
//   buffer 3  K       int, a multiple of 4
// Threadgroup: 256 threads, one row; grid: M. IEEE float32 operations (safe math mode: the division is correctly rounded);
// a row with NaN or infinity gets a scale that is not finite and codes without meaning.
//
// M and N are ragged inside the kernels. q8_mm is limited by the simdgroup multiply, q8_mv and q8_rows by device memory.
// Not measured on Apple hardware.
#pragma once

#include "tile.h"

METAL_FUNC int byte_at(uint word, int i) { return static_cast<int>(word << (24 - 8 * i)) >> 24; }

// y = sum, or the scaled sum.
template <typename T>
METAL_FUNC void put_row(device T* y, size_t at, int sum, float x_scale, float w_scale) {
  put(y, at, static_cast<float>(sum) * (x_scale * w_scale));
}

METAL_FUNC void put_row(device int* y, size_t at, int sum, float, float) { y[at] = sum; }

template <typename T, int group_size>
[[kernel]] void q8_mm(const device uint* x [[buffer(0)]], const device float* x_scales [[buffer(1)]],
                      const device uint* w [[buffer(2)]], const device float* w_scales [[buffer(3)]],
                      device T* y [[buffer(4)]], constant int& M [[buffer(5)]], constant int& N [[buffer(6)]],
                      constant int& K [[buffer(7)]], constant uint& flip [[buffer(8)]],
                      uint3 tile [[threadgroup_position_in_grid]],
                      ushort simdgroup [[simdgroup_index_in_threadgroup]],
                      ushort lane [[thread_index_in_simdgroup]]) {
  constexpr int STRIDE = 9;    // words of a row in a tile: 32 codes and one of padding
  constexpr int EXACT = 1024;  // columns whose sum of products is exact in float32
  constexpr int SPAN = group_size == 0 ? EXACT : group_size;
  threadgroup uint x_tile[2 * 64 * 9];
  threadgroup uint w_tile[2 * 64 * 9];
  const int thread_index = simdgroup * 32 + lane;
  const int words_per_row = K / 4;
  const int row_of_lane = matrix_row(lane);
  const int column_of_lane = matrix_column(lane);
  const int first_row = static_cast<int>(tile.y) * 64;
  const int first_column = static_cast<int>(tile.x) * 64;
  const int row0 = simdgroup / 2 * 32;
  const int column0 = simdgroup % 2 * 32;

  uint x_next[4], w_next[4];
  simdgroup_float8x8 sums[4][4];
  int totals[4][4][2];
  float scaled[4][4][2];
  MLXQ_UNROLL
  for (int i = 0; i < 4; i++) {
    MLXQ_UNROLL
    for (int j = 0; j < 4; j++) {
      sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      MLXQ_UNROLL
      for (int e = 0; e < 2; e++) {
        totals[i][j][e] = 0;
        scaled[i][j][e] = 0.0f;
      }
    }
  }
  // Step k fetches what step k + 32 multiplies; the first round only fetches.
  for (int k = -32; k < K; k += 32) {
    const int next = k + 32;
    if (next < K) {
      MLXQ_UNROLL
      for (int i = 0; i < 4; i++) {
        const int row = thread_index / 8 + i * 16;
        const int word = next / 4 + thread_index % 8;
        const int m = first_row + row;
        const int n = first_column + row;
        x_next[i] = m < M ? x[static_cast<size_t>(m) * words_per_row + word] : 0u;
        w_next[i] = n < N ? w[static_cast<size_t>(n) * words_per_row + word] ^ flip : 0u;
      }
    }
    if (k >= 0) {
      const threadgroup uint* x_now = x_tile + (k / 32 & 1) * 64 * STRIDE;
      const threadgroup uint* w_now = w_tile + (k / 32 & 1) * 64 * STRIDE;
      MLXQ_UNROLL
      for (int kk = 0; kk < 32; kk += 8) {
        simdgroup_float8x8 x_matrix[4];
        const int pair = kk + column_of_lane;
        MLXQ_UNROLL
        for (int i = 0; i < 4; i++) {
          const uint word = x_now[(row0 + i * 8 + row_of_lane) * STRIDE + pair / 4];
          x_matrix[i].thread_elements()[0] = static_cast<float>(byte_at(word, pair % 4));
          x_matrix[i].thread_elements()[1] = static_cast<float>(byte_at(word, pair % 4 + 1));
        }
        const int at = kk + row_of_lane;
        MLXQ_UNROLL
        for (int j = 0; j < 4; j++) {
          const threadgroup uint* word = w_now + (column0 + j * 8 + column_of_lane) * STRIDE + at / 4;
          simdgroup_float8x8 w_matrix;
          w_matrix.thread_elements()[0] = static_cast<float>(byte_at(word[0], at % 4));
          w_matrix.thread_elements()[1] = static_cast<float>(byte_at(word[STRIDE], at % 4));
          MLXQ_UNROLL
          for (int i = 0; i < 4; i++) {
            simdgroup_multiply_accumulate(sums[i][j], x_matrix[i], w_matrix, sums[i][j]);
          }
        }
      }
      if (next % SPAN == 0 || next == K) {
        MLXQ_UNROLL
        for (int j = 0; j < 4; j++) {
          float scale[2] = {0.0f, 0.0f};
          if (group_size != 0) {
            MLXQ_UNROLL
            for (int e = 0; e < 2; e++) {
              const int n = first_column + column0 + j * 8 + column_of_lane + e;
              scale[e] = n < N ? w_scales[static_cast<size_t>(n) * (K / SPAN) + k / SPAN] : 0.0f;
            }
          }
          MLXQ_UNROLL
          for (int i = 0; i < 4; i++) {
            MLXQ_UNROLL
            for (int e = 0; e < 2; e++) {
              const float sum = sums[i][j].thread_elements()[e];
              if (group_size == 0) {
                totals[i][j][e] += static_cast<int>(sum);
              } else {
                scaled[i][j][e] = metal::fma(scale[e], sum, scaled[i][j][e]);
              }
            }
            sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
          }
        }
      }
    }
    if (next < K) {
      threadgroup uint* x_then = x_tile + (next / 32 & 1) * 64 * STRIDE;
      threadgroup uint* w_then = w_tile + (next / 32 & 1) * 64 * STRIDE;
      MLXQ_UNROLL
      for (int i = 0; i < 4; i++) {
        const int at = (thread_index / 8 + i * 16) * STRIDE + thread_index % 8;
        x_then[at] = x_next[i];
        w_then[at] = w_next[i];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  MLXQ_UNROLL
  for (int i = 0; i < 4; i++) {
    const int m = first_row + row0 + i * 8 + row_of_lane;
    const float x_scale = m < M ? x_scales[m] : 0.0f;
    MLXQ_UNROLL
    for (int j = 0; j < 4; j++) {
      MLXQ_UNROLL
      for (int e = 0; e < 2; e++) {
        const int n = first_column + column0 + j * 8 + column_of_lane + e;
        if (m < M && n < N) {
          const size_t at = static_cast<size_t>(m) * N + n;
          if (group_size == 0) {
            put_row(y, at, totals[i][j][e], x_scale, w_scales[n]);
          } else {
            put(y, at, scaled[i][j][e] * x_scale);
          }
        }
      }
    }
  }
}

template <typename T, int group_size, int M>
[[kernel]] void q8_mv(const device uint* x [[buffer(0)]], const device float* x_scales [[buffer(1)]],
                      const device uint* w [[buffer(2)]], const device float* w_scales [[buffer(3)]],
                      device T* y [[buffer(4)]], constant int& N [[buffer(5)]], constant int& K [[buffer(6)]],
                      constant uint& flip [[buffer(7)]], uint3 tile [[threadgroup_position_in_grid]],
                      ushort simdgroup [[simdgroup_index_in_threadgroup]],
                      ushort lane [[thread_index_in_simdgroup]]) {
  constexpr int ROWS = 4;
  constexpr int GROUP = group_size == 0 ? 256 : group_size;
  constexpr int GROUPS = 256 / GROUP;  // of a step
  const int first = static_cast<int>(tile.x) * 8 + simdgroup * 4;
  const int rows = metal::min(ROWS, N - first);
  if (rows <= 0) {
    return;
  }
  const int words_per_row = K / 4;
  const int groups_per_row = K / GROUP;
  w += static_cast<size_t>(first) * words_per_row;
  w_scales += static_cast<size_t>(first) * (group_size == 0 ? 1 : groups_per_row);
  int totals[M][ROWS];
  float scaled[M][ROWS];
  MLXQ_UNROLL
  for (int m = 0; m < M; m++) {
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      totals[m][r] = 0;
      scaled[m][r] = 0.0f;
    }
  }
  for (int k = 0; k < K; k += 256) {
    const int word = k / 4 + lane * 2;
    const bool inside = word < words_per_row;
    float held = 0.0f;
    if (group_size != 0) {
      const int row = lane / GROUPS;
      const int group = k / GROUP + lane % GROUPS;
      held = row < rows && group < groups_per_row ? w_scales[row * groups_per_row + group] : 0.0f;
    }
    uint packed[ROWS][2];
    float scale[ROWS];
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      MLXQ_UNROLL
      for (int i = 0; i < 2; i++) {
        packed[r][i] = inside && r < rows ? w[r * words_per_row + word + i] ^ flip : 0u;
      }
      scale[r] = group_size == 0 ? 0.0f : simd_shuffle(held, static_cast<ushort>(r * GROUPS + lane * 8 / GROUP));
    }
    MLXQ_UNROLL
    for (int m = 0; m < M; m++) {
      uint x_words[2];
      MLXQ_UNROLL
      for (int i = 0; i < 2; i++) {
        x_words[i] = inside ? x[static_cast<size_t>(m) * words_per_row + word + i] : 0u;
      }
      MLXQ_UNROLL
      for (int r = 0; r < ROWS; r++) {
        int sum = 0;
        MLXQ_UNROLL
        for (int i = 0; i < 8; i++) {
          sum += byte_at(x_words[i / 4], i % 4) * byte_at(packed[r][i / 4], i % 4);
        }
        if (group_size == 0) {
          totals[m][r] += sum;
        } else {
          scaled[m][r] = metal::fma(scale[r], static_cast<float>(sum), scaled[m][r]);
        }
      }
    }
  }
  MLXQ_UNROLL
  for (int m = 0; m < M; m++) {
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const size_t at = static_cast<size_t>(m) * N + first + r;
      const bool writes = lane == 0 && r < rows;
      if (group_size == 0) {
        const int total = simd_sum(totals[m][r]);
        if (writes) {
          put_row(y, at, total, x_scales[m], w_scales[r]);
        }
      } else {
        const float total = simd_sum(scaled[m][r]);
        if (writes) {
          put(y, at, total * x_scales[m]);
        }
      }
    }
  }
}

template <typename T>
[[kernel]] void q8_rows(const device T* x [[buffer(0)]], device uint* codes [[buffer(1)]],
                        device float* scales [[buffer(2)]], constant int& K [[buffer(3)]],
                        uint3 row [[threadgroup_position_in_grid]], ushort simdgroup [[simdgroup_index_in_threadgroup]],
                        ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup float largest[8];
  const int thread_index = simdgroup * 32 + lane;
  x += static_cast<size_t>(row.x) * K;
  codes += static_cast<size_t>(row.x) * (K / 4);
  uint mine = 0;  // |x| as its pattern: ordered like the number, and NaN above all
  for (int k = thread_index; k < K; k += 256) {
    mine = metal::max(mine, as_type<uint>(static_cast<float>(x[k])) & 0x7fffffffu);
  }
  mine = simd_max(mine);
  if (lane == 0) {
    largest[simdgroup] = as_type<float>(mine);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint all = 0;
  MLXQ_UNROLL
  for (int i = 0; i < 8; i++) {
    all = metal::max(all, as_type<uint>(largest[i]));
  }
  const float peak = as_type<float>(all);
  const float scale = all == 0 ? 1.0f : peak / 127.0f;
  for (int word = thread_index; word < K / 4; word += 256) {
    uint packed = 0;
    MLXQ_UNROLL
    for (int i = 0; i < 4; i++) {
      const float value = metal::rint(static_cast<float>(x[4 * word + i]) / scale);
      const int code = static_cast<int>(metal::clamp(value, -127.0f, 127.0f));
      packed |= (static_cast<uint>(code) & 0xffu) << (8 * i);
    }
    codes[word] = packed;
  }
  if (thread_index == 0) {
    scales[row.x] = scale;
  }
}
