// Products with chosen experts (mixture of experts): block b of y is block lhs[b] of x times expert rhs[b] of W.
//
//   gather_qmv, gather_qmm        y[b, m, n] = sum_k x[lhs[b], m, k] * W[rhs[b], n, k]
//   gather_qvm, gather_qmm_n      y[b, m, k] = sum_n x[lhs[b], m, n] * W[rhs[b], n, k]
//
//   buffer 0  x       T     (blocks of x, M, K)     gather_qvm, gather_qmm_n*: (..., M, N)
//   buffer 1  words   uint  (E, N, K * bits / 32)
//   buffer 2  scales  S     (E, N, K / group_size)
//   buffer 3  biases  S     (E, N, K / group_size)
//   buffer 4  y       T     (B, M, N)               gather_qvm, gather_qmm_n*: (B, M, K)
//   buffer 5  lhs     int   (B,)
//   buffer 6  rhs     int   (B,)                    *_sorted: tiles, int (number of tiles, 3), from schedule_tiles
//   buffer 7  M       int                           gather_qmv, gather_qvm: a template argument; N is 7, K is 8
//   buffer 8  N       int
//   buffer 9  K       int, a multiple of group_size
//
// Three ways to do it, by shape; each is the plain kernel of the same name on moved pointers: threadgroup, picture and
// what must divide what are in qmv, qmm and qmm_n.metal.
//   decode, M = 1 to 8        gather_qmv, gather_qvm: grid (ceil(N / 8), B) and (ceil(K / 128), B)
//   blocks of many rows       gather_qmm, gather_qmm_n: grid (ceil(N or K / BN), ceil(M / BM), B)
//   sorted rhs, many blocks   gather_qmm_sorted, gather_qmm_n_sorted: grid (ceil(N or K / BN), number of tiles). The rows
//                             of all blocks of an expert stand together in y; schedule_tiles cuts each run into tiles
//                             of BM rows:
//
//      rows of y   0 ......... 9 | 10 .. 12 | 13 ............ 30         BM = 16
//      expert           2              5               6
//      tiles       (2, 0, 10)    (5, 10, 13) (6, 13, 29) (6, 29, 30)     then (0, 0, 0): nothing to do
//
//                             so that an expert's words are read once per BM of its rows, never once per block.
//                             At most ceil(B * M / BM) + min(E, B) tiles exist: the host launches so many.
//
// Indices are not checked here: an expert or a block that does not exist is the caller's mistake (the primitive's).
// Accumulators are float32, edges ragged inside the kernels. Limited by what limits the plain kernels; unsorted decoding
// by the words of every block's expert, read once a block. Not measured on Apple hardware.
#pragma once

#include "qmm.metal"
#include "qmm_n.metal"
#include "qmv.metal"

template <typename T, typename S, int bits, int group_size, int M>
[[kernel]] void gather_qmv(const device T* x [[buffer(0)]], const device uint* words [[buffer(1)]],
                           const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
                           device T* y [[buffer(4)]], const device int* lhs [[buffer(5)]],
                           const device int* rhs [[buffer(6)]], constant int& N [[buffer(7)]],
                           constant int& K [[buffer(8)]], uint3 tile [[threadgroup_position_in_grid]],
                           ushort simdgroup [[simdgroup_index_in_threadgroup]],
                           ushort lane [[thread_index_in_simdgroup]]) {
  const size_t expert_rows = static_cast<size_t>(rhs[tile.y]) * N;
  x += static_cast<size_t>(lhs[tile.y]) * M * K;
  words += expert_rows * (K / 32 * bits);
  scales += expert_rows * (K / group_size);
  biases += expert_rows * (K / group_size);
  y += static_cast<size_t>(tile.y) * M * N;
  const int first = static_cast<int>(tile.x) * 8 + simdgroup * 4;
  qmv_rows<T, S, bits, group_size, M>(x, words, scales, biases, y, N, K, first, lane);
}

template <typename T, typename S, int bits, int group_size, int M>
[[kernel]] void gather_qvm(const device T* x [[buffer(0)]], const device uint* words [[buffer(1)]],
                           const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
                           device T* y [[buffer(4)]], const device int* lhs [[buffer(5)]],
                           const device int* rhs [[buffer(6)]], constant int& N [[buffer(7)]],
                           constant int& K [[buffer(8)]], uint3 tile [[threadgroup_position_in_grid]],
                           ushort simdgroup [[simdgroup_index_in_threadgroup]],
                           ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[4 * M * 128];
  const size_t expert_rows = static_cast<size_t>(rhs[tile.y]) * N;
  x += static_cast<size_t>(lhs[tile.y]) * M * N;
  words += expert_rows * (K / 32 * bits);
  scales += expert_rows * (K / group_size);
  biases += expert_rows * (K / group_size);
  y += static_cast<size_t>(tile.y) * M * K;
  qvm_columns<T, S, T, bits, group_size, M>(x, words, scales, biases, y, N, K, static_cast<int>(tile.x) * 128, 0, N,
                                            sums, simdgroup, lane);
}

template <typename T, typename S, int bits, int group_size, int BM, int BN, int WM, int WN>
[[kernel]] void gather_qmm(const device T* x [[buffer(0)]], const device uint* words [[buffer(1)]],
                           const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
                           device T* y [[buffer(4)]], const device int* lhs [[buffer(5)]],
                           const device int* rhs [[buffer(6)]], constant int& M [[buffer(7)]],
                           constant int& N [[buffer(8)]], constant int& K [[buffer(9)]],
                           uint3 tile [[threadgroup_position_in_grid]],
                           ushort simdgroup [[simdgroup_index_in_threadgroup]],
                           ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup T x_tile[2 * BM * (32 + 16 / sizeof(T))];
  threadgroup uint word_tile[2 * BN * (bits + 1)];
  threadgroup float scale_tile[4 * BN];
  const size_t expert_rows = static_cast<size_t>(rhs[tile.z]) * N;
  x += static_cast<size_t>(lhs[tile.z]) * M * K;
  words += expert_rows * (K / 32 * bits);
  scales += expert_rows * (K / group_size);
  biases += expert_rows * (K / group_size);
  y += static_cast<size_t>(tile.z) * M * N;
  const int first_row = static_cast<int>(tile.y) * BM;
  qmm_tile<T, S, T, bits, group_size, BM, BN, WM, WN, false>(x, words, scales, biases, y, nullptr, 1, first_row, M,
                                                             static_cast<int>(tile.x) * BN, N, K, 0, K, x_tile,
                                                             word_tile, scale_tile, simdgroup, lane);
}

template <typename T, typename S, int bits, int group_size, int BM, int BN, int WM, int WN>
[[kernel]] void gather_qmm_n(const device T* x [[buffer(0)]], const device uint* words [[buffer(1)]],
                             const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
                             device T* y [[buffer(4)]], const device int* lhs [[buffer(5)]],
                             const device int* rhs [[buffer(6)]], constant int& M [[buffer(7)]],
                             constant int& N [[buffer(8)]], constant int& K [[buffer(9)]],
                             uint3 tile [[threadgroup_position_in_grid]],
                             ushort simdgroup [[simdgroup_index_in_threadgroup]],
                             ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup T x_tile[2 * BM * (32 + 16 / sizeof(T))];
  threadgroup uint word_tile[2 * 32 * (BN * bits / 32 + 1)];
  threadgroup float scale_tile[2 * 64 * (BN > group_size ? BN / group_size : 1)];
  const size_t expert_rows = static_cast<size_t>(rhs[tile.z]) * N;
  x += static_cast<size_t>(lhs[tile.z]) * M * N;
  words += expert_rows * (K / 32 * bits);
  scales += expert_rows * (K / group_size);
  biases += expert_rows * (K / group_size);
  y += static_cast<size_t>(tile.z) * M * K;
  const int first_row = static_cast<int>(tile.y) * BM;
  qmm_n_tile<T, S, T, bits, group_size, BM, BN, WM, WN, false>(x, words, scales, biases, y, nullptr, 1, first_row, M,
                                                               static_cast<int>(tile.x) * BN, N, K, 0, N, x_tile,
                                                               word_tile, scale_tile, simdgroup, lane);
}

template <typename T, typename S, int bits, int group_size, int BM, int BN, int WM, int WN>
[[kernel]] void gather_qmm_sorted(const device T* x [[buffer(0)]], const device uint* words [[buffer(1)]],
                                  const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
                                  device T* y [[buffer(4)]], const device int* lhs [[buffer(5)]],
                                  const device int* tiles [[buffer(6)]], constant int& M [[buffer(7)]],
                                  constant int& N [[buffer(8)]], constant int& K [[buffer(9)]],
                                  uint3 tile [[threadgroup_position_in_grid]],
                                  ushort simdgroup [[simdgroup_index_in_threadgroup]],
                                  ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup T x_tile[2 * BM * (32 + 16 / sizeof(T))];
  threadgroup uint word_tile[2 * BN * (bits + 1)];
  threadgroup float scale_tile[4 * BN];
  const int begin = tiles[3 * tile.y + 1];
  const int end = tiles[3 * tile.y + 2];
  if (begin == end) {
    return;
  }
  const size_t expert_rows = static_cast<size_t>(tiles[3 * tile.y]) * N;
  words += expert_rows * (K / 32 * bits);
  scales += expert_rows * (K / group_size);
  biases += expert_rows * (K / group_size);
  qmm_tile<T, S, T, bits, group_size, BM, BN, WM, WN, true>(x, words, scales, biases, y, lhs, M, begin, end,
                                                            static_cast<int>(tile.x) * BN, N, K, 0, K, x_tile,
                                                            word_tile, scale_tile, simdgroup, lane);
}

template <typename T, typename S, int bits, int group_size, int BM, int BN, int WM, int WN>
[[kernel]] void gather_qmm_n_sorted(const device T* x [[buffer(0)]], const device uint* words [[buffer(1)]],
                                    const device S* scales [[buffer(2)]], const device S* biases [[buffer(3)]],
                                    device T* y [[buffer(4)]], const device int* lhs [[buffer(5)]],
                                    const device int* tiles [[buffer(6)]], constant int& M [[buffer(7)]],
                                    constant int& N [[buffer(8)]], constant int& K [[buffer(9)]],
                                    uint3 tile [[threadgroup_position_in_grid]],
                                    ushort simdgroup [[simdgroup_index_in_threadgroup]],
                                    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup T x_tile[2 * BM * (32 + 16 / sizeof(T))];
  threadgroup uint word_tile[2 * 32 * (BN * bits / 32 + 1)];
  threadgroup float scale_tile[2 * 64 * (BN > group_size ? BN / group_size : 1)];
  const int begin = tiles[3 * tile.y + 1];
  const int end = tiles[3 * tile.y + 2];
  if (begin == end) {
    return;
  }
  const size_t expert_rows = static_cast<size_t>(tiles[3 * tile.y]) * N;
  words += expert_rows * (K / 32 * bits);
  scales += expert_rows * (K / group_size);
  biases += expert_rows * (K / group_size);
  qmm_n_tile<T, S, T, bits, group_size, BM, BN, WM, WN, true>(x, words, scales, biases, y, lhs, M, begin, end,
                                                              static_cast<int>(tile.x) * BN, N, K, 0, N, x_tile,
                                                              word_tile, scale_tile, simdgroup, lane);
}

// Cuts the rows of every expert into tiles of BM.
//
//   buffer 0  rhs    int  (B,), ascending
//   buffer 1  tiles  int  (count, 3): expert, first row, row after the last; rows of zeros fill the end
//   buffer 2  B      int
//   buffer 3  M      int, rows of a block
//   buffer 4  E      int, experts
//   buffer 5  BM     int
//   buffer 6  count  int, ceil(B * M / BM) + min(E, B)
//
// One threadgroup of 256 threads; thread t has the experts from t * ceil(E / 256) on and finds their runs by bisection.
[[kernel]] void schedule_tiles(const device int* rhs [[buffer(0)]], device int* tiles [[buffer(1)]],
                               constant int& B [[buffer(2)]], constant int& M [[buffer(3)]],
                               constant int& E [[buffer(4)]], constant int& BM [[buffer(5)]],
                               constant int& count [[buffer(6)]], ushort thread_index [[thread_index_in_threadgroup]],
                               ushort simdgroup [[simdgroup_index_in_threadgroup]],
                               ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup int totals[8];
  const int each = (E + 255) / 256;
  const int first_expert = metal::min(thread_index * each, E);
  const int last_expert = metal::min(first_expert + each, E);
  int mine = 0;
  int place = 0;
  // The first round counts this thread's tiles, the second writes them behind those of the threads before it.
  for (int round = 0; round < 2; round++) {
    int begin = 0;
    for (int expert = first_expert; expert <= last_expert; expert++) {
      int low = 0;
      int high = B;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (rhs[middle] < expert) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      const int end = low * M;
      if (expert > first_expert) {
        for (int row = begin; row < end; row += BM) {
          if (round == 0) {
            mine++;
          } else {
            tiles[3 * place] = expert - 1;
            tiles[3 * place + 1] = row;
            tiles[3 * place + 2] = metal::min(row + BM, end);
            place++;
          }
        }
      }
      begin = end;
    }
    if (round == 0) {
      const int before = simd_prefix_exclusive_sum(mine);
      if (lane == 31) {
        totals[simdgroup] = before + mine;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      int all = 0;
      for (int i = 0; i < 8; i++) {
        place += i < simdgroup ? totals[i] : 0;
        all += totals[i];
      }
      place += before;
      for (int rest = all + thread_index; rest < count; rest += 256) {
        tiles[3 * rest] = 0;
        tiles[3 * rest + 1] = 0;
        tiles[3 * rest + 2] = 0;
      }
    }
  }
}
