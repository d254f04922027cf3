// W8A8, W4A8, W2A8: int8 activations times packed weights, every group's sum of products exact.
//
//   buffer 0  x         uint   (M, K / 4)               four int8 a word, lowest byte first
//   buffer 1  x_scales  float  (M,), or (M, K / group_size) if grouped is 2
//   buffer 2  words     uint   (N, K * bits / 32)       of the format: codes 0 to 2^bits - 1
//   buffer 3  scales    S      (N, K / group_size)      float, half or bfloat
//   buffer 4  biases    S      (N, K / group_size)      not read if grouped is 0
//   buffer 5  y         float  (M, N)
//   buffer 6  M         int                             q8_mv: a template argument; N is 6, K is 7
//   buffer 7  N         int
//   buffer 8  K         int, a multiple of group_size
//
// With z = 2^(bits - 1), S_g the exact sum of x * (code - z) over a group and X_g that of x, grouped says how many of
// the two operands have a scale for each group:
//
//   0   y = float(sum over K of x * (code - z)) * (x_scale * scales[n, 0])     the sum in int32, K up to 131,071
//   1   y = x_scale * sum over groups of (scale * S_g + (bias + z * scale) * X_g)      groups added in float32
//   2   y = sum over groups of (scale * x_scale * S_g + (bias + z * scale) * (x_scale * X_g))           likewise
//
// q8_mm   threadgroup: 128 threads, 2 x 2 simdgroups of 32 x 32; grid: (ceil(N / 64), ceil(M / 64)). Picture: qmm's.
//         Words are unpacked to int8 on their way into the tile. There is no int8 product on Apple GPUs before M5, so the
//         8x8 float32 matrices multiply: a product of two int8 is at most 2^14, so 1024 of them add up to at most 2^24
//         without rounding, in any order. Every 1024 columns (or every group) the float sums move to the int32 (or
//         scaled) ones. Two buffers, one barrier a step, as in qmm. Of each row of x the eight threads that fetch it add
//         up X_g, and leave it and its x_scale beside the tiles.
// q8_mv   M = 1 to 8; threadgroup: 64 threads; grid: ceil(N / 8). Picture: qmv's; a lane has 8 codes of each row in a
//         step of 256 columns. Integer multiply-adds; every word is read once for all rows of x. The 4 to 16 lanes of a
//         group exchange their four sums so that lane i of them holds S_g of row i: one scale and bias a lane and step.
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

// Four codes less z as int8: the codes are those of chunk i of a row, 8 / bits chunks a word.
template <int bits>
METAL_FUNC uint signed_codes(uint word, int i) {
  uint codes = word >> (i % (8 / bits) * 4 * bits);
  if (bits == 4) {
    codes = (codes & 0xffu) | (codes & 0xff00u) << 8;
    codes = (codes | codes << 4) & 0x0f0f0f0fu;
  }
  if (bits == 2) {
    codes = (codes & 0xfu) | (codes & 0xf0u) << 12;
    codes = (codes | codes << 6) & 0x03030303u;
  }
  // A byte above 127 lends nothing to its neighbour; z of 8 bits is that bit itself.
  const uint zeros = bits == 8 ? 0u : (1u << (bits - 1)) * 0x01010101u;
  return bits == 8 ? codes ^ 0x80808080u : ((codes | 0x80808080u) - zeros) ^ 0x80808080u;
}

// Bytes 0 + 1 and 2 + 3, each byte as int8 + 128, in 16 bits each: they hold the sums of up to 128 words.
METAL_FUNC uint byte_pairs(uint word) {
  const uint raised = word ^ 0x80808080u;
  return (raised & 0x00ff00ffu) + (raised >> 8 & 0x00ff00ffu);
}

// The sum of a group's codes, out of its byte_pairs.
template <int group_size>
METAL_FUNC float group_sum(uint pairs) {
  return static_cast<float>(static_cast<int>((pairs & 0xffffu) + (pairs >> 16)) - 128 * group_size);
}

// Adds up over the lanes whose numbers differ in the bits from `from` up to, but not with, `to`.
template <int from, int to, typename V>
METAL_FUNC V sum_of_lanes(V value) {
  MLXQ_UNROLL
  for (int bit = from; bit < to; bit *= 2) {
    value += simd_shuffle_xor(value, static_cast<ushort>(bit));
  }
  return value;
}

template <typename S, int bits, int group_size, int grouped>
[[kernel]] void q8_mm(const device uint* x [[buffer(0)]], const device float* x_scales [[buffer(1)]],
                      const device uint* words [[buffer(2)]], const device S* scales [[buffer(3)]],
                      const device S* biases [[buffer(4)]], device float* y [[buffer(5)]],
                      constant int& M [[buffer(6)]], constant int& N [[buffer(7)]], constant int& K [[buffer(8)]],
                      uint3 tile [[threadgroup_position_in_grid]],
                      ushort simdgroup [[simdgroup_index_in_threadgroup]],
                      ushort lane [[thread_index_in_simdgroup]]) {
  constexpr int STRIDE = 9;    // words of a row in a tile: 32 codes and one of padding
  constexpr int EXACT = 1024;  // columns whose sum of products is exact in float32
  constexpr int SPAN = grouped == 0 ? EXACT : group_size;
  constexpr float ZERO = 1 << (bits - 1);
  threadgroup uint x_tile[2 * 64 * 9];
  threadgroup uint w_tile[2 * 64 * 9];
  threadgroup float x_sums[2 * 64];  // X_g * x_scale of this group, and of the next
  threadgroup float x_factors[2 * 64];
  const int thread_index = simdgroup * 32 + lane;
  const int groups_per_row = K / group_size;
  const int row_of_lane = matrix_row(lane);
  const int column_of_lane = matrix_column(lane);
  const int first_row = static_cast<int>(tile.y) * 64;
  const int first_column = static_cast<int>(tile.x) * 64;
  const int row0 = simdgroup / 2 * 32;
  const int column0 = simdgroup % 2 * 32;

  uint x_next[4], w_next[bits / 2];
  uint x_pairs[4] = {0u, 0u, 0u, 0u};
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
        const int m = first_row + thread_index / 8 + i * 16;
        x_next[i] = m < M ? x[static_cast<size_t>(m) * (K / 4) + next / 4 + thread_index % 8] : 0u;
      }
      MLXQ_UNROLL
      for (int i = 0; i < bits / 2; i++) {
        const int n = first_column + thread_index / bits + i * (128 / bits);
        const size_t step = static_cast<size_t>(n) * (K / 32) + next / 32;  // of `bits` words
        w_next[i] = n < N ? words[step * bits + thread_index % bits] : 0u;
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
        float x_sum[4], x_factor[4];
        if (grouped != 0) {
          MLXQ_UNROLL
          for (int i = 0; i < 4; i++) {
            const int at = (k / SPAN & 1) * 64 + row0 + i * 8 + row_of_lane;
            x_sum[i] = x_sums[at];
            x_factor[i] = grouped == 2 ? x_factors[at] : 1.0f;
          }
        }
        MLXQ_UNROLL
        for (int j = 0; j < 4; j++) {
          float scale[2] = {0.0f, 0.0f};
          float rest[2] = {0.0f, 0.0f};
          if (grouped != 0) {
            MLXQ_UNROLL
            for (int e = 0; e < 2; e++) {
              const int n = first_column + column0 + j * 8 + column_of_lane + e;
              if (n < N) {
                const size_t at = static_cast<size_t>(n) * groups_per_row + k / SPAN;
                scale[e] = scale_value(scales[at]);
                rest[e] = scale_value(biases[at]) + ZERO * scale[e];
              }
            }
          }
          MLXQ_UNROLL
          for (int i = 0; i < 4; i++) {
            MLXQ_UNROLL
            for (int e = 0; e < 2; e++) {
              const float sum = sums[i][j].thread_elements()[e];
              if (grouped == 0) {
                totals[i][j][e] += static_cast<int>(sum);
              } else {
                scaled[i][j][e] += metal::fma(scale[e] * x_factor[i], sum, rest[e] * x_sum[i]);
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
        x_then[(thread_index / 8 + i * 16) * STRIDE + thread_index % 8] = x_next[i];
      }
      MLXQ_UNROLL
      for (int i = 0; i < bits / 2; i++) {
        const int at = (thread_index / bits + i * (128 / bits)) * STRIDE + thread_index % bits * (8 / bits);
        MLXQ_UNROLL
        for (int chunk = 0; chunk < 8 / bits; chunk++) {
          w_then[at + chunk] = signed_codes<bits>(w_next[i], chunk);
        }
      }
      if (grouped != 0) {
        MLXQ_UNROLL
        for (int i = 0; i < 4; i++) {
          x_pairs[i] += byte_pairs(x_next[i]);
        }
        if ((next + 32) % SPAN == 0) {
          MLXQ_UNROLL
          for (int i = 0; i < 4; i++) {
            const float sum = group_sum<group_size>(sum_of_lanes<1, 8>(x_pairs[i]));
            x_pairs[i] = 0u;
            if (thread_index % 8 == 0) {
              const int row = thread_index / 8 + i * 16;
              const int m = first_row + row;
              const int at = (next / SPAN & 1) * 64 + row;
              float factor = 1.0f;
              if (grouped == 2) {
                factor = m < M ? x_scales[static_cast<size_t>(m) * groups_per_row + next / SPAN] : 0.0f;
                x_factors[at] = factor;
              }
              x_sums[at] = sum * factor;
            }
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  MLXQ_UNROLL
  for (int i = 0; i < 4; i++) {
    const int m = first_row + row0 + i * 8 + row_of_lane;
    const float x_scale = grouped == 2 || m >= M ? 1.0f : x_scales[m];
    MLXQ_UNROLL
    for (int j = 0; j < 4; j++) {
      MLXQ_UNROLL
      for (int e = 0; e < 2; e++) {
        const int n = first_column + column0 + j * 8 + column_of_lane + e;
        if (m < M && n < N) {
          const size_t at = static_cast<size_t>(m) * N + n;
          if (grouped == 0) {
            const float scale = scale_value(scales[static_cast<size_t>(n) * groups_per_row]);
            y[at] = static_cast<float>(totals[i][j][e]) * (x_scale * scale);
          } else {
            y[at] = scaled[i][j][e] * x_scale;
          }
        }
      }
    }
  }
}

template <typename S, int bits, int group_size, int grouped, int M>
[[kernel]] void q8_mv(const device uint* x [[buffer(0)]], const device float* x_scales [[buffer(1)]],
                      const device uint* words [[buffer(2)]], const device S* scales [[buffer(3)]],
                      const device S* biases [[buffer(4)]], device float* y [[buffer(5)]],
                      constant int& N [[buffer(6)]], constant int& K [[buffer(7)]],
                      uint3 tile [[threadgroup_position_in_grid]],
                      ushort simdgroup [[simdgroup_index_in_threadgroup]],
                      ushort lane [[thread_index_in_simdgroup]]) {
  constexpr int ROWS = 4;
  constexpr int WORDS = bits == 8 ? 2 : 1;  // with the 8 codes of a lane; two lanes share a word of 2-bit codes
  constexpr int LANES = group_size / 8;     // of a group
  constexpr float ZERO = 1 << (bits - 1);
  const int first = static_cast<int>(tile.x) * 8 + simdgroup * 4;
  const int rows = metal::min(ROWS, N - first);
  if (rows <= 0) {
    return;
  }
  const int words_per_row = K / 32 * bits;
  const int groups_per_row = K / group_size;
  words += static_cast<size_t>(first) * words_per_row;
  scales += static_cast<size_t>(first) * groups_per_row;
  biases += static_cast<size_t>(first) * groups_per_row;
  const int row_of_lane = lane % ROWS;
  const bool odd = lane % 2 == 1;
  const bool high = lane % 4 >= 2;
  int totals[M][ROWS];
  float scaled[M];  // of row_of_lane
  MLXQ_UNROLL
  for (int m = 0; m < M; m++) {
    scaled[m] = 0.0f;
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      totals[m][r] = 0;
    }
  }
  for (int k = 0; k < K; k += 256) {
    const int at = k + lane * 8;
    const bool inside = at < K;
    uint codes[ROWS][2];
    MLXQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
      uint held[WORDS];
      MLXQ_UNROLL
      for (int i = 0; i < WORDS; i++) {
        held[i] = inside && r < rows ? words[r * words_per_row + at * bits / 32 + i] : 0u;
      }
      MLXQ_UNROLL
      for (int i = 0; i < 2; i++) {
        codes[r][i] = signed_codes<bits>(held[i * WORDS / 2], lane * 2 + i);
      }
    }
    const int group = at / group_size;
    const bool holds = inside && row_of_lane < rows && lane % LANES < ROWS;
    float scale = 0.0f;
    float rest = 0.0f;
    if (grouped != 0 && holds) {
      scale = scale_value(scales[row_of_lane * groups_per_row + group]);
      rest = scale_value(biases[row_of_lane * groups_per_row + group]) + ZERO * scale;
    }
    MLXQ_UNROLL
    for (int m = 0; m < M; m++) {
      uint x_words[2];
      MLXQ_UNROLL
      for (int i = 0; i < 2; i++) {
        x_words[i] = inside ? x[static_cast<size_t>(m) * (K / 4) + at / 4 + i] : 0u;
      }
      int sums[ROWS];
      MLXQ_UNROLL
      for (int r = 0; r < ROWS; r++) {
        sums[r] = 0;
        MLXQ_UNROLL
        for (int i = 0; i < 8; i++) {
          sums[r] += byte_at(x_words[i / 4], i % 4) * byte_at(codes[r][i / 4], i % 4);
        }
        totals[m][r] += sums[r];
      }
      if (grouped != 0) {
        const int below = (odd ? sums[1] : sums[0]) + simd_shuffle_xor(odd ? sums[0] : sums[1], 1);
        const int above = (odd ? sums[3] : sums[2]) + simd_shuffle_xor(odd ? sums[2] : sums[3], 1);
        const int row_sum = (high ? above : below) + simd_shuffle_xor(high ? below : above, 2);
        const float sum = static_cast<float>(sum_of_lanes<4, LANES>(row_sum));
        const uint pairs = byte_pairs(x_words[0]) + byte_pairs(x_words[1]);
        const float x_sum = group_sum<group_size>(sum_of_lanes<1, LANES>(pairs));
        float factor = 1.0f;
        if (grouped == 2) {
          factor = holds ? x_scales[static_cast<size_t>(m) * groups_per_row + group] : 0.0f;
        }
        scaled[m] += metal::fma(scale * factor, sum, rest * (x_sum * factor));
      }
    }
  }
  MLXQ_UNROLL
  for (int m = 0; m < M; m++) {
    const size_t at = static_cast<size_t>(m) * N + first;
    if (grouped == 0) {
      MLXQ_UNROLL
      for (int r = 0; r < ROWS; r++) {
        const int total = simd_sum(totals[m][r]);
        if (lane == 0 && r < rows) {
          y[at + r] = static_cast<float>(total) * (x_scales[m] * scale_value(scales[r * groups_per_row]));
        }
      }
    } else {
      const float total = sum_of_lanes<4, 32>(scaled[m]);
      if (lane < rows) {
        y[at + lane] = grouped == 2 ? total : total * x_scales[m];
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
