// y[m, k] = sum_n g[m, n] * W[n, k], the gradient with respect to x, on the packed bytes of the forward pass.
//
//   buffer 0  g       T     (M, N)
//   buffer 1  words   uint  (N, K * bits / 32)
//   buffer 2  scales  S     (N, K / group_size)
//   buffer 3  biases  S     (N, K / group_size)
//   buffer 4  y       T     (M, K)              *_split: float (splits, M, K), partial sums for sum_splits
//   buffer 5  M       int                       qvm*: a template argument; N is 5, K is 6, span is 7
//   buffer 6  N       int
//   buffer 7  K       int, a multiple of group_size
//   buffer 8  span    int, only *_split: the rows of W in a split, for qmm_n_split a multiple of 32
//
// qmm_n   threadgroup: 32 * WM * WN threads; grid: (ceil(K / BN), ceil(M / BM), splits). The tile, the threads over it,
//         the two buffers and the barrier are qmm's (see there) with K and N exchanged: a step takes 32 rows of W, of
//         each the 2 * bits words that hold the tile's 64 columns, and the scales and biases of the one or two groups
//         that these columns meet. A lane's two elements of a weight matrix are neighbours in one word.
//         Device bytes differ from qmm's in the scales alone: a group of 128 is read by two tiles.
//
// qvm     M = 1 to 8. Threadgroup: 128 threads; grid: (ceil(K / 128), splits).
//
//            k ->    8 codes   8 codes         8 codes
//          row n     lane 0    lane 1    ...   lane 15      group_size / 8 rows in turn: their scales and biases are
//          row n'    lane 16   lane 17   ...   lane 31      loaded by the 16 lanes between them, once, and shuffled
//
//         The four simdgroups take such pairs of blocks of rows in turn and add up through threadgroup memory at the
//         end. Sums: M * 8 floats a lane. Every word, scale and bias is read once for all M rows.
//
// M, N and K are ragged inside the kernels; sums are float32 and so are weights. qmm_n is limited by the simdgroup
// multiply, qvm by the bandwidth of device memory. Not measured on Apple hardware.
#pragma once

#include "tile.h"

// One tile of y, rows first_row to last_row of it. If GATHER, row m is that of g's row g_rows[m / block] * block +
// m % block. The partial or whole sums over rows [begin, end) of W go to y as Out.
template <typename T, typename S, typename Out, int bits, int group_size, int BM, int BN, int WM, int WN, bool GATHER>
METAL_FUNC void qmm_n_tile(const device T* g, const device uint* words, const device S* scales, const device S* biases,
                           device Out* y, const device int* g_rows, int block, int first_row, int last_row,
                           int first_column, int N, int K, int begin, int end, threadgroup T* g_tile,
                           threadgroup uint* word_tile, threadgroup float* scale_tile, ushort simdgroup, ushort lane) {
  constexpr int THREADS = 32 * WM * WN;
  constexpr int TM = BM / WM / 8;  // matrices of a simdgroup
  constexpr int TN = BN / WN / 8;
  constexpr int G_STRIDE = 32 + 16 / sizeof(T);  // padding: eight rows of a fragment fall into different banks
  constexpr int WIDTH = BN * bits / 32;          // words of a row of W in the tile
  constexpr int W_STRIDE = WIDTH + 1;
  constexpr int GROUPS = BN > group_size ? BN / group_size : 1;
  constexpr int G_LOADS = BM * 8 / THREADS;  // a thread's runs of four g
  constexpr int W_LOADS = 32 * WIDTH / THREADS;
  static_assert(G_LOADS * THREADS == BM * 8 && W_LOADS * THREADS == 32 * WIDTH && THREADS >= 64 * GROUPS,
                "threads must divide a tile");
  const int thread_index = simdgroup * 32 + lane;
  const int words_per_row = K / 32 * bits;
  const int groups_per_row = K / group_size;
  const int row_of_lane = matrix_row(lane);
  const int column_of_lane = matrix_column(lane);
  const int row0 = simdgroup / WN * (BM / WM);
  const int column0 = simdgroup % WN * (BN / WN);

  // What this thread fetches: rows of g, words of a row of W and groups are the same in all steps.
  const device T* g_from[G_LOADS];
  bool g_exists[G_LOADS];
  MLXQ_UNROLL
  for (int i = 0; i < G_LOADS; i++) {
    const int item = thread_index + i * THREADS;
    const int m = first_row + item / 8;
    g_exists[i] = m < last_row;
    const int row = !g_exists[i] ? 0 : GATHER ? g_rows[m / block] * block + m % block : m;
    g_from[i] = g + static_cast<size_t>(row) * N;
  }
  const int g_column = thread_index % 8 * 4;
  const int first_word = first_column / 32 * bits;
  const int scale_row = thread_index % (32 * GROUPS) / GROUPS;
  const int scale_group = first_column / group_size + thread_index % GROUPS;
  const bool scale_exists = thread_index < 64 * GROUPS && scale_group < groups_per_row;

  T g_next[G_LOADS][4];
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
  // Step n fetches what step n + 32 multiplies; the first round only fetches.
  for (int n = begin - 32; n < end; n += 32) {
    const int next = n + 32;
    if (next < end) {
      MLXQ_UNROLL
      for (int i = 0; i < G_LOADS; i++) {
        MLXQ_UNROLL
        for (int j = 0; j < 4; j++) {
          const int column = next + g_column + j;
          g_next[i][j] = g_exists[i] && column < end ? g_from[i][column] : static_cast<T>(0.0f);
        }
      }
      MLXQ_UNROLL
      for (int i = 0; i < W_LOADS; i++) {
        const int item = thread_index + i * THREADS;
        const int row = next + item / WIDTH;
        const int word = first_word + item % WIDTH;
        words_next[i] =
            row < end && word < words_per_row ? words[static_cast<size_t>(row) * words_per_row + word] : 0u;
      }
      scale_next = 0.0f;
      if (scale_exists && next + scale_row < end) {
        const size_t at = static_cast<size_t>(next + scale_row) * groups_per_row + scale_group;
        scale_next = thread_index < 32 * GROUPS ? scale_value(scales[at]) : scale_value(biases[at]);
      }
    }
    if (n >= begin) {
      const int buffer = (n - begin) / 32 & 1;
      const threadgroup T* g_now = g_tile + buffer * BM * G_STRIDE;
      const threadgroup uint* words_now = word_tile + buffer * 32 * W_STRIDE;
      const threadgroup float* scales_now = scale_tile + buffer * 64 * GROUPS;
      MLXQ_UNROLL
      for (int kk = 0; kk < 32; kk += 8) {
        simdgroup_float8x8 g_matrix[TM];
        MLXQ_UNROLL
        for (int i = 0; i < TM; i++) {
          const threadgroup T* pair = g_now + (row0 + i * 8 + row_of_lane) * G_STRIDE + kk + column_of_lane;
          g_matrix[i].thread_elements()[0] = static_cast<float>(pair[0]);
          g_matrix[i].thread_elements()[1] = static_cast<float>(pair[1]);
        }
        const int row = kk + row_of_lane;
        MLXQ_UNROLL
        for (int j = 0; j < TN; j++) {
          const int column = column0 + j * 8 + column_of_lane;
          const int group = row * GROUPS + column / group_size;
          const float scale = scales_now[group];
          const float bias = scales_now[32 * GROUPS + group];
          const uint word = words_now[row * W_STRIDE + column * bits / 32];
          const uint bit = static_cast<uint>(column * bits % 32);
          simdgroup_float8x8 w_matrix;
          w_matrix.thread_elements()[0] = metal::fma(scale, code_at<bits>(word, bit), bias);
          w_matrix.thread_elements()[1] = metal::fma(scale, code_at<bits>(word, bit + bits), bias);
          MLXQ_UNROLL
          for (int i = 0; i < TM; i++) {
            simdgroup_multiply_accumulate(sums[i][j], g_matrix[i], w_matrix, sums[i][j]);
          }
        }
      }
    }
    if (next < end) {
      const int buffer = (next - begin) / 32 & 1;
      threadgroup T* g_then = g_tile + buffer * BM * G_STRIDE;
      threadgroup uint* words_then = word_tile + buffer * 32 * W_STRIDE;
      MLXQ_UNROLL
      for (int i = 0; i < G_LOADS; i++) {
        const int item = thread_index + i * THREADS;
        MLXQ_UNROLL
        for (int j = 0; j < 4; j++) {
          g_then[item / 8 * G_STRIDE + g_column + j] = g_next[i][j];
        }
      }
      MLXQ_UNROLL
      for (int i = 0; i < W_LOADS; i++) {
        const int item = thread_index + i * THREADS;
        words_then[item / WIDTH * W_STRIDE + item % WIDTH] = words_next[i];
      }
      if (thread_index < 64 * GROUPS) {
        scale_tile[buffer * 64 * GROUPS + thread_index] = scale_next;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  MLXQ_UNROLL
  for (int i = 0; i < TM; i++) {
    const int m = first_row + row0 + i * 8 + row_of_lane;
    MLXQ_UNROLL
    for (int j = 0; j < TN; j++) {
      const int k = first_column + column0 + j * 8 + column_of_lane;
      MLXQ_UNROLL
      for (int e = 0; e < 2; e++) {
        if (m < last_row && k + e < K) {
          put(y, static_cast<size_t>(m) * K + k + e, sums[i][j].thread_elements()[e]);
        }
      }
    }
  }
}

template <typename T, typename S, int bits, int group_size, int BM, int BN, int WM, int WN>
[[kernel]] void qmm_n(const device T* g [[buffer(0)]], const device uint* words [[buffer(1)]],
                      const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
                      device T* y [[buffer(4)]], constant int& M [[buffer(5)]], constant int& N [[buffer(6)]],
                      constant int& K [[buffer(7)]], uint3 tile [[threadgroup_position_in_grid]],
                      ushort simdgroup [[simdgroup_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup T g_tile[2 * BM * (32 + 16 / sizeof(T))];
  threadgroup uint word_tile[2 * 32 * (BN * bits / 32 + 1)];
  threadgroup float scale_tile[2 * 64 * (BN > group_size ? BN / group_size : 1)];
  const int first_row = static_cast<int>(tile.y) * BM;
  qmm_n_tile<T, S, T, bits, group_size, BM, BN, WM, WN, false>(g, words, scales, biases, y, nullptr, 1, first_row, M,
                                                               static_cast<int>(tile.x) * BN, N, K, 0, N, g_tile,
                                                               word_tile, scale_tile, simdgroup, lane);
}

template <typename T, typename S, int bits, int group_size, int BM, int BN, int WM, int WN>
[[kernel]] void qmm_n_split(const device T* g [[buffer(0)]], const device uint* words [[buffer(1)]],
                            const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
                            device float* partials [[buffer(4)]], constant int& M [[buffer(5)]],
                            constant int& N [[buffer(6)]], constant int& K [[buffer(7)]],
                            constant int& span [[buffer(8)]], uint3 tile [[threadgroup_position_in_grid]],
                            ushort simdgroup [[simdgroup_index_in_threadgroup]],
                            ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup T g_tile[2 * BM * (32 + 16 / sizeof(T))];
  threadgroup uint word_tile[2 * 32 * (BN * bits / 32 + 1)];
  threadgroup float scale_tile[2 * 64 * (BN > group_size ? BN / group_size : 1)];
  const int first_row = static_cast<int>(tile.y) * BM;
  const int begin = static_cast<int>(tile.z) * span;
  partials += static_cast<size_t>(tile.z) * M * K;
  qmm_n_tile<T, S, float, bits, group_size, BM, BN, WM, WN, false>(
      g, words, scales, biases, partials, nullptr, 1, first_row, M, static_cast<int>(tile.x) * BN, N, K, begin,
      metal::min(begin + span, N), g_tile, word_tile, scale_tile, simdgroup, lane);
}

// 128 columns of y from the first on, for all M rows of g; the sums over rows [begin, end) of W go to y as Out.
template <typename T, typename S, typename Out, int bits, int group_size, int M>
METAL_FUNC void qvm_columns(const device T* g, const device uint* words, const device S* scales, const device S* biases,
                            device Out* y, int N, int K, int first, int begin, int end, threadgroup float* sums_of,
                            ushort simdgroup, ushort lane) {
  constexpr int GROUPS = 128 / group_size;  // of the 128 columns
  constexpr int ROWS = 16 / GROUPS;         // whose scales 16 lanes hold
  constexpr int WORDS = bits == 8 ? 2 : 1;  // eight codes; of 2 bits, half a word
  const int words_per_row = K / 32 * bits;
  const int groups_per_row = K / group_size;
  const int half_lane = lane % 16;
  const int half_start = lane - half_lane;
  const int column = first + half_lane * 8;
  const bool inside = column < K;
  const int group = first / group_size + half_lane % GROUPS;
  const int group_of_lane = half_lane * 8 / group_size;

  float sums[M][8];
  MLXQ_UNROLL
  for (int m = 0; m < M; m++) {
    MLXQ_UNROLL
    for (int i = 0; i < 8; i++) {
      sums[m][i] = 0.0f;
    }
  }
  for (int base = begin + simdgroup * 2 * ROWS; base < end; base += 8 * ROWS) {
    const int row0 = base + lane / 16 * ROWS;
    const int scale_row = row0 + half_lane / GROUPS;
    const bool exists = scale_row < end && group < groups_per_row;
    const size_t at = static_cast<size_t>(scale_row) * groups_per_row + group;
    const float scales_held = exists ? scale_value(scales[at]) : 0.0f;
    const float biases_held = exists ? scale_value(biases[at]) : 0.0f;
    float g_held[M];
    MLXQ_UNROLL
    for (int m = 0; m < M; m++) {
      const bool wanted = half_lane < ROWS && row0 + half_lane < end;
      g_held[m] = wanted ? static_cast<float>(g[static_cast<size_t>(m) * N + row0 + half_lane]) : 0.0f;
    }
    for (int r = 0; r < ROWS; r++) {
      uint packed[WORDS];
      MLXQ_UNROLL
      for (int i = 0; i < WORDS; i++) {
        packed[i] = 0u;
      }
      if (inside && row0 + r < end) {
        const device uint* from = words + static_cast<size_t>(row0 + r) * words_per_row;
        if (bits == 2) {  // two lanes share a word: each reads its half
          packed[0] = reinterpret_cast<const device ushort*>(from)[column / 8];
        } else {
          MLXQ_UNROLL
          for (int i = 0; i < WORDS; i++) {
            packed[i] = from[column * bits / 32 + i];
          }
        }
      }
      const ushort holder = static_cast<ushort>(half_start + r * GROUPS + group_of_lane);
      const float scale = simd_shuffle(scales_held, holder);
      const float bias = simd_shuffle(biases_held, holder);
      float weights[8];
      MLXQ_UNROLL
      for (int i = 0; i < 8; i++) {
        weights[i] = metal::fma(scale, code_of<bits>(packed, i), bias);
      }
      MLXQ_UNROLL
      for (int m = 0; m < M; m++) {
        const float value = simd_shuffle(g_held[m], static_cast<ushort>(half_start + r));
        MLXQ_UNROLL
        for (int i = 0; i < 8; i++) {
          sums[m][i] = metal::fma(value, weights[i], sums[m][i]);
        }
      }
    }
  }
  MLXQ_UNROLL
  for (int m = 0; m < M; m++) {
    MLXQ_UNROLL
    for (int i = 0; i < 8; i++) {
      const float both = sums[m][i] + simd_shuffle_xor(sums[m][i], 16);
      if (lane < 16) {
        sums_of[(simdgroup * M + m) * 128 + half_lane * 8 + i] = both;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int k = simdgroup * 32 + lane;
  if (first + k < K) {
    MLXQ_UNROLL
    for (int m = 0; m < M; m++) {
      const float sum = (sums_of[m * 128 + k] + sums_of[(M + m) * 128 + k]) +
                        (sums_of[(2 * M + m) * 128 + k] + sums_of[(3 * M + m) * 128 + k]);
      put(y, static_cast<size_t>(m) * K + first + k, sum);
    }
  }
}

template <typename T, typename S, int bits, int group_size, int M>
[[kernel]] void qvm(const device T* g [[buffer(0)]], const device uint* words [[buffer(1)]],
                    const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
                    device T* y [[buffer(4)]], constant int& N [[buffer(5)]], constant int& K [[buffer(6)]],
                    uint3 tile [[threadgroup_position_in_grid]], ushort simdgroup [[simdgroup_index_in_threadgroup]],
                    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[4 * M * 128];
  qvm_columns<T, S, T, bits, group_size, M>(g, words, scales, biases, y, N, K, static_cast<int>(tile.x) * 128, 0, N,
                                            sums, simdgroup, lane);
}

template <typename T, typename S, int bits, int group_size, int M>
[[kernel]] void qvm_split(const device T* g [[buffer(0)]], const device uint* words [[buffer(1)]],
                          const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
                          device float* partials [[buffer(4)]], constant int& N [[buffer(5)]],
                          constant int& K [[buffer(6)]], constant int& span [[buffer(7)]],
                          uint3 tile [[threadgroup_position_in_grid]],
                          ushort simdgroup [[simdgroup_index_in_threadgroup]],
                          ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[4 * M * 128];
  const int begin = static_cast<int>(tile.y) * span;
  partials += static_cast<size_t>(tile.y) * M * K;
  qvm_columns<T, S, float, bits, group_size, M>(g, words, scales, biases, partials, N, K,
                                                static_cast<int>(tile.x) * 128, begin, metal::min(begin + span, N),
                                                sums, simdgroup, lane);
}
