// Kernels with float32 FMA sums, written once over a vector policy V (avx2.cpp, avx512.cpp, neon.cpp).
//
// Codes leave the words a field at a time: V::L words make a register; field j of every lane is one register of codes.
// L words hold a *chunk* of L * per consecutive codes (per = 32 / bits), and lane i of field j is code i * per + j:
//
//     words    | w0: c0 c1 .. c7 | w1: c8 c9 .. c15 | ...        4 bits, per = 8
//     field 0  | c0              | c8               | ...        one register
//     field 1  | c1              | c9               | ...
//
// x is stored in that order once, zero padded to whole chunks, so weights are never shuffled. Scales become a register
// with one lane per word (a word never spans two groups). Three kernels:
//
// dot       transpose, few rows. Codes stay integers-as-floats; per chunk and per (row of x, row of words):
//             part = sum over fields of x_j * code_j       y += scale * part + bias * (sum over fields of x_j)
//           MR rows x NR rows of words in registers: a word is read and decoded once for MR rows. A field is masked
//           where it lies and converted, so it carries a factor 2^(bits * j), which x has divided out (exact).
//           Limit: instructions per code (mask, convert, FMA), then the memory that streams the words.
// strip     transpose, many rows. NR rows x k_block codes are dequantized into a scratch that stays in L1; all rows of
//           an x block that stays in L2 run over it in MR x NR register tiles, lanes along K, summed across at the end:
//
//             for x block: for NR rows of words: for k_block: dequantize; for MR rows: tile += x . w      Limit: FMA.
//
// straight  not transposed, lanes along K. 512 columns x n_block rows are dequantized into a scratch in L2; tiles of
//           SR rows x 4 registers run over it with x broadcast; partial sums wait in a scratch between n_blocks.
//
// Ragged edges: the last chunk's words and scales are loaded under a mask (nothing outside the arrays is read, absent
// lanes are zero); a tile that lacks rows repeats its last one and does not store the copies.
// In `dot` the sums are of scale * code and bias apart; for x with NaN, Inf, or values near the ends of the exponent
// range that differs from float arithmetic on dequantized weights, so such rows are marked and go through scalar_row.
#pragma once

#include <utility>

#include "kernel.h"
#include "numeric.h"

#define MLXQ_INLINE inline __attribute__((always_inline))
#define MLXQ_LAMBDA __attribute__((always_inline))

namespace mlxq {
namespace {

// f(integral_constant 0), f(1), ... f(N - 1)
template <int N, class Function>
MLXQ_INLINE void unroll(Function&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) MLXQ_LAMBDA { (f(std::integral_constant<int, I>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }
int x_row(const Qmm& q, int m) { return q.x_rows ? q.x_rows[m] : m; }
int y_row(const Qmm& q, int m) { return q.y_rows ? q.y_rows[m] : m; }

// to[i] (+)= the sum over the lanes of acc[i]; writes whole fours.
template <class V, int N>
MLXQ_INLINE void sum_lanes(const typename V::F* acc, float* to, bool add) {
  unroll<(N + 3) / 4>([&](auto i) MLXQ_LAMBDA {
    constexpr int at = 4 * i, last = N - 1;
    V::sum4(acc[at], acc[at + 1 < last ? at + 1 : last], acc[at + 2 < last ? at + 2 : last],
            acc[at + 3 < last ? at + 3 : last], to + at, add);
  });
}

// Register tiles over dequantized weights; they know neither bits nor groups.
template <class V>
struct Tiles {
  using F = typename V::F;
  static constexpr int L = V::L;
  static constexpr int NR = V::strip_columns, MR = V::strip_rows, SR = V::straight_rows, SC = 4;
  static constexpr int k_block = 1024;  // codes; NR * k_block floats stay in L1
  static constexpr int tile_floats = (MR * NR + 3) / 4 * 4;

  // sums[m * NR + n] += x[m] . w[n], over steps registers
  template <int Rows>
  static void strip_tile(const float* const* x, const float* w, int steps, float* sums) {
    F acc[Rows * NR];
    unroll<Rows * NR>([&](auto i) MLXQ_LAMBDA { acc[i] = V::zero(); });
    for (int k = 0; k < steps * L; k += L) {
      F xk[Rows];
      unroll<Rows>([&](auto m) MLXQ_LAMBDA { xk[m] = V::load(x[m] + k); });
      unroll<NR>([&](auto n) MLXQ_LAMBDA {
        F wk = V::load(w + n * k_block + k);
        unroll<Rows>([&](auto m) MLXQ_LAMBDA { acc[m * NR + n] = V::fma(xk[m], wk, acc[m * NR + n]); });
      });
    }
    sum_lanes<V, Rows * NR>(acc, sums, true);
  }

  // sums[m][SC registers] += x[m][0..rows) * w[0..rows)[SC registers]; rows of w and sums lie stride floats apart.
  template <int Rows>
  static void straight_tile(const float* const* x, const float* w, int rows, int stride,
                            float* sums) {
    F acc[Rows * SC];
    unroll<Rows * SC>([&](auto i) MLXQ_LAMBDA { acc[i] = V::load(sums + i / SC * stride + i % SC * L); });
    for (int n = 0; n < rows; ++n) {
      F wn[SC];
      unroll<SC>([&](auto i) MLXQ_LAMBDA { wn[i] = V::load(w + n * stride + i * L); });
      unroll<Rows>([&](auto m) MLXQ_LAMBDA {
        F xn = V::set(x[m][n]);
        unroll<SC>([&](auto i) MLXQ_LAMBDA { acc[m * SC + i] = V::fma(xn, wn[i], acc[m * SC + i]); });
      });
    }
    unroll<Rows * SC>([&](auto i) MLXQ_LAMBDA { V::store(sums + i / SC * stride + i % SC * L, acc[i]); });
  }

  static void strip(int rows, const float* const* x, const float* w, int steps, float* sums) {
    switch (rows) {
      case 1:
        return strip_tile<1>(x, w, steps, sums);
      case 2:
        return strip_tile<2>(x, w, steps, sums);
      case 3:
        return strip_tile<3>(x, w, steps, sums);
      default:
        return strip_tile<MR>(x, w, steps, sums);
    }
  }

  static void straight(int rows, const float* const* x, const float* w, int n_rows, int stride, float* sums) {
    switch (rows) {
      case 1:
        return straight_tile<1>(x, w, n_rows, stride, sums);
      case 2:
        return straight_tile<2>(x, w, n_rows, stride, sums);
      case 3:
        return straight_tile<3>(x, w, n_rows, stride, sums);
      case 4:
        return straight_tile<(SR < 4 ? SR : 4)>(x, w, n_rows, stride, sums);
      case 5:
        return straight_tile<(SR < 5 ? SR : 5)>(x, w, n_rows, stride, sums);
      default:
        return straight_tile<SR>(x, w, n_rows, stride, sums);
    }
  }
};

template <class V, int B, int R>
struct FloatKernels {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int L = V::L;
  static constexpr int per = 32 / B;          // codes in a word, fields
  static constexpr int chunk = L * per;       // codes in a register of words
  // R: groups that a chunk touches, 1 when a group fills whole chunks.

  // A run of chunks of one row of words, with its scales and biases in float32.
  struct Row {
    const uint32_t* words;
    const float* scales;
    const float* biases;
  };

  // Codes whose scales are widened at a time, and room for them.
  static constexpr int segment = 4096, segment_groups = segment / 32, segment_chunks = segment / chunk;
  struct Room {
    alignas(64) float scales[segment_groups];
    alignas(64) float biases[segment_groups];
  };

  static MLXQ_INLINE const float* widened(const Qmm& q, const void* groups, int64_t at, int count, float* room) {
    if (q.scale_dtype == DType::f32) {
      return static_cast<const float*>(groups) + at;
    }
    V::widen(groups, q.scale_dtype, at, room, count);
    return room;
  }

  // Row n from chunk `first` on, where a group begins, at most `chunks` of them.
  static MLXQ_INLINE Row row(const Qmm& q, int n, int first, int chunks, Room& room) {
    int groups = q.K / q.group_size, from = first * chunk / q.group_size;
    int count = ceil_div(chunks * chunk, q.group_size);
    count = count < groups - from ? count : groups - from;
    int64_t at = int64_t(n) * groups + from;
    return {q.words + int64_t(n) * (q.K / per) + first * L, widened(q, q.scales, at, count, room.scales),
            widened(q, q.biases, at, count, room.biases)};
  }

  // Words, scales and biases of chunk c of the run. tail: how many words the chunk has, 0 when it is whole.
  template <bool Tail>
  static MLXQ_INLINE I words_of(const Row& r, int c, int tail) {
    if constexpr (Tail) {
      return V::words(r.words + c * L, tail);
    } else {
      return V::words(r.words + c * L);
    }
  }

  template <bool Tail>
  static MLXQ_INLINE F groups_of(const Qmm& q, const float* groups, int c, int tail) {
    return V::template groups<R>(groups + c * chunk / q.group_size, Tail ? tail * per / q.group_size : R);
  }

  // ---------------------------------------------------------------- dot

  static constexpr int dot_stride = (per + 1) * L;  // prepared floats per chunk: the fields, then their sum
  static constexpr float largest_x = 0x1p100f, smallest_x = 0x1p-80f;

  static size_t dot_row_bytes(const Qmm& q) {
    return (size_t(ceil_div(q.K, chunk)) * dot_stride + 1 + 15) / 16 * 64;  // and the mark of rows for scalar_row
  }
  static uint32_t& is_marked(const Qmm& q, float* row) {
    return *reinterpret_cast<uint32_t*>(row + ceil_div(q.K, chunk) * dot_stride);
  }

  static void dot_prepare(const Qmm& q, char* prepared, int row_begin, int row_end) {
    size_t bytes = dot_row_bytes(q);
    for (int m = row_begin; m < row_end; ++m) {
      float* to = reinterpret_cast<float*>(prepared + m * bytes);
      int64_t base = int64_t(x_row(q, m)) * q.K;
      float most = 0;
      bool nan = false;
      for (int c = 0; c < ceil_div(q.K, chunk); ++c, to += dot_stride) {
        alignas(64) float x[chunk];
        int have = q.K - c * chunk < chunk ? q.K - c * chunk : chunk;
        V::widen(q.x, q.x_dtype, base + c * chunk, x, have);
        for (int k = have; k < chunk; ++k) {
          x[k] = 0;
        }
        for (int k = 0; k < chunk; ++k) {
          float size = __builtin_fabsf(x[k]);
          most = size > most ? size : most;
          nan |= size != size;
        }
        float* sums = to + per * L;
        for (int i = 0; i < L; ++i) {
          sums[i] = 0;
        }
        for (int j = 0; j < per; ++j) {
          float unscale = V::unscale(B, j);
          for (int i = 0; i < L; ++i) {
            sums[i] += x[i * per + j];
            to[j * L + i] = x[i * per + j] * unscale;
          }
        }
      }
      to = reinterpret_cast<float*>(prepared + m * bytes);
      is_marked(q, to) = nan || most > largest_x || (most < smallest_x && most > 0);
    }
    V::leave();
  }

  template <int MR, int NR>
  static MLXQ_INLINE void dot_tile(const Qmm& q, const float* const* x, const int* n_of, float* sums) {
    F total[MR * NR];
    unroll<MR * NR>([&](auto i) MLXQ_LAMBDA { total[i] = V::zero(); });
    Room room[NR];
    Row rows[NR];
    const float* xs[MR];
    int tail = q.K % chunk / per;
    auto step = [&](int c, auto is_tail) MLXQ_LAMBDA {
      constexpr bool Tail = is_tail;
      I words[NR];
      F part[MR * NR];
      unroll<NR>([&](auto n) MLXQ_LAMBDA { words[n] = words_of<Tail>(rows[n], c, tail); });
      if constexpr (!Tail) {
        unroll<NR>([&](auto n) MLXQ_LAMBDA { V::prefetch(rows[n].words + c * L + V::ahead); });
      }
      unroll<per>([&](auto j) MLXQ_LAMBDA {
        F code[NR];
        unroll<NR>([&](auto n) MLXQ_LAMBDA { code[n] = V::template scaled_code<B, j>(words[n]); });
        unroll<MR>([&](auto m) MLXQ_LAMBDA {
          F xj = V::load(xs[m] + c * dot_stride + j * L);
          unroll<NR>([&](auto n) MLXQ_LAMBDA {
            part[m * NR + n] = j == 0 ? V::mul(xj, code[n]) : V::fma(xj, code[n], part[m * NR + n]);
          });
        });
      });
      unroll<NR>([&](auto n) MLXQ_LAMBDA {
        F scale = groups_of<Tail>(q, rows[n].scales, c, tail), bias = groups_of<Tail>(q, rows[n].biases, c, tail);
        unroll<MR>([&](auto m) MLXQ_LAMBDA {
          F sum = V::load(xs[m] + c * dot_stride + per * L);
          total[m * NR + n] = V::fma(part[m * NR + n], scale, V::fma(sum, bias, total[m * NR + n]));
        });
      });
    };
    int full = q.K / chunk, chunks = ceil_div(q.K, chunk);
    for (int first = 0; first < chunks; first += segment_chunks) {
      unroll<NR>([&](auto n) MLXQ_LAMBDA { rows[n] = row(q, n_of[n], first, segment_chunks, room[n]); });
      unroll<MR>([&](auto m) MLXQ_LAMBDA { xs[m] = x[m] + first * dot_stride; });
      int whole = full - first < segment_chunks ? full - first : segment_chunks;
      for (int c = 0; c < whole; ++c) {
        step(c, std::false_type{});
      }
      if (whole < segment_chunks && tail) {
        step(whole, std::true_type{});
      }
    }
    sum_lanes<V, MR * NR>(total, sums, false);
  }

  template <int MR, int NR>
  static void dot_rows(const Qmm& q, const char* prepared, int m_begin, int begin, int end) {
    size_t bytes = dot_row_bytes(q);
    const float* x[MR];
    int have = q.M - m_begin < MR ? q.M - m_begin : MR;
    for (int m = 0; m < MR; ++m) {
      x[m] = reinterpret_cast<const float*>(prepared + (m_begin + (m < have ? m : have - 1)) * bytes);
    }
    for (int n = begin; n < end; n += NR) {
      int rows[NR];
      for (int i = 0; i < NR; ++i) {
        rows[i] = n + i < end ? n + i : end - 1;
      }
      alignas(64) float sums[(MR * NR + 3) / 4 * 4];
      dot_tile<MR, NR>(q, x, rows, sums);
      for (int m = 0; m < have; ++m) {
        V::narrow(sums + m * NR, q.y, q.x_dtype, int64_t(y_row(q, m_begin + m)) * q.N + n,
                  end - n < NR ? end - n : NR);
      }
    }
    for (int m = 0; m < have; ++m) {
      if (is_marked(q, const_cast<float*>(x[m]))) {
        scalar_row(q, m_begin + m, begin, end);
      }
    }
  }

  // Words of `dot_columns` rows stay in L1 while every block of four rows of x passes over them.
  static constexpr int dot_columns = 16;

  static void dot_run(const Qmm& q, const char* prepared, int begin, int end) {
    int step = q.M <= 4 ? end - begin : dot_columns;
    for (int n = begin; n < end; n += step) {
      int n_end = n + step < end ? n + step : end;
      for (int m = 0; m < q.M; m += 4) {
        switch (q.M - m) {
          case 1:
            dot_rows<1, V::dot_tile_1>(q, prepared, m, n, n_end);
            break;
          case 2:
            dot_rows<2, V::dot_tile_2>(q, prepared, m, n, n_end);
            break;
          default:
            dot_rows<4, V::dot_tile_4>(q, prepared, m, n, n_end);
        }
      }
    }
    V::leave();
  }

  static int dot_unit(const Qmm&) { return V::dot_tile_1; }

  // ---------------------------------------------------------------- strip

  static constexpr int NR = Tiles<V>::NR, MR = Tiles<V>::MR, tile_floats = Tiles<V>::tile_floats;
  static constexpr int k_block = Tiles<V>::k_block, k_chunks = k_block / chunk;
  static constexpr int x_block_floats = 128 * 1024, most_tiles = 64;

  static size_t strip_row_bytes(const Qmm& q) { return size_t(ceil_div(q.K, chunk)) * chunk * 4; }

  static void strip_prepare(const Qmm& q, char* prepared, int row_begin, int row_end) {
    size_t bytes = strip_row_bytes(q);
    for (int m = row_begin; m < row_end; ++m) {
      float* to = reinterpret_cast<float*>(prepared + m * bytes);
      int64_t base = int64_t(x_row(q, m)) * q.K;
      for (int c = 0; c < ceil_div(q.K, chunk); ++c, to += chunk) {
        alignas(64) float x[chunk];
        int have = q.K - c * chunk < chunk ? q.K - c * chunk : chunk;
        V::widen(q.x, q.x_dtype, base + c * chunk, x, have);
        for (int k = have; k < chunk; ++k) {
          x[k] = 0;
        }
        for (int j = 0; j < per; ++j) {
          for (int i = 0; i < L; ++i) {
            to[j * L + i] = x[i * per + j];
          }
        }
      }
    }
    V::leave();
  }

  // Chunk c of the run as floats, per * L of them.
  template <bool Tail>
  static MLXQ_INLINE void dequantize_chunk(const Qmm& q, const Row& r, int c, int tail, float* to) {
    I words = words_of<Tail>(r, c, tail);
    F scale = groups_of<Tail>(q, r.scales, c, tail), bias = groups_of<Tail>(q, r.biases, c, tail);
    unroll<per>([&](auto j) MLXQ_LAMBDA {
      V::store(to + j * L, V::fma(V::template code<B, j>(words), scale, bias));
    });
  }

  static MLXQ_INLINE void dequantize(const Qmm& q, int n, int first, int chunks, float* to) {
    Room room;
    Row r = row(q, n, first, chunks, room);
    int whole = q.K / chunk - first < chunks ? q.K / chunk - first : chunks;
    for (int c = 0; c < whole; ++c) {
      dequantize_chunk<false>(q, r, c, 0, to + c * chunk);
    }
    if (whole < chunks) {
      dequantize_chunk<true>(q, r, whole, q.K % chunk / per, to + whole * chunk);
    }
  }

  static void strip_run(const Qmm& q, const char* prepared, int begin, int end) {
    alignas(64) static thread_local float w[NR * k_block];
    alignas(64) static thread_local float sums[most_tiles * tile_floats];
    size_t row_floats = strip_row_bytes(q) / 4;
    const float* x = reinterpret_cast<const float*>(prepared);
    int chunks = ceil_div(q.K, chunk);
    int tiles_per_block = int(x_block_floats / (row_floats * MR));
    tiles_per_block = tiles_per_block < 8 ? 8 : tiles_per_block > most_tiles ? most_tiles : tiles_per_block;
    int block = tiles_per_block * MR;
    for (int m_begin = 0; m_begin < q.M; m_begin += block) {
      int m_end = m_begin + block < q.M ? m_begin + block : q.M;
      for (int n = begin; n < end; n += NR) {
        for (int i = 0; i < tiles_per_block * tile_floats; ++i) {
          sums[i] = 0;
        }
        for (int c_begin = 0; c_begin < chunks; c_begin += k_chunks) {
          int c_end = c_begin + k_chunks < chunks ? c_begin + k_chunks : chunks;
          for (int i = 0; i < NR; ++i) {
            dequantize(q, n + i < end ? n + i : end - 1, c_begin, c_end - c_begin, w + i * k_block);
          }
          float* tile = sums;
          for (int m = m_begin; m < m_end; m += MR, tile += tile_floats) {
            const float* rows[MR];
            for (int i = 0; i < MR; ++i) {
              rows[i] = x + (m + i < m_end ? m + i : m_end - 1) * row_floats + size_t(c_begin) * chunk;
            }
            int steps = (c_end - c_begin) * per;
            Tiles<V>::strip(m_end - m, rows, w, steps, tile);
          }
        }
        for (int m = m_begin; m < m_end; ++m) {
          const float* from = sums + (m - m_begin) / MR * tile_floats + (m - m_begin) % MR * NR;
          V::narrow(from, q.y, q.x_dtype, int64_t(y_row(q, m)) * q.N + n, end - n < NR ? end - n : NR);
        }
      }
    }
    V::leave();
  }

  static int strip_unit(const Qmm&) { return NR; }

  // ---------------------------------------------------------------- straight

  static constexpr int SR = Tiles<V>::SR, SC = Tiles<V>::SC;
  // Columns at a time: enough that rows of words and scales are read by whole cache lines.
  static constexpr int straight_chunks = 512 / chunk ? 512 / chunk : 1;
  static constexpr int n_block = 64;               // n_block * 512 floats stay in L2
  static constexpr int straight_block = 8 * SR;    // rows of x, so that their sums do too

  static size_t straight_row_bytes(const Qmm& q) { return size_t(ceil_div(q.N, 16)) * 64; }

  static void straight_prepare(const Qmm& q, char* prepared, int row_begin, int row_end) {
    size_t bytes = straight_row_bytes(q);
    for (int m = row_begin; m < row_end; ++m) {
      V::widen(q.x, q.x_dtype, int64_t(x_row(q, m)) * q.N, reinterpret_cast<float*>(prepared + m * bytes), q.N);
    }
    V::leave();
  }

  static MLXQ_INLINE const uint32_t* group_ahead(const Qmm& q, const void* groups, int n, int k) {
    int64_t at = (int64_t(n) * q.K + k) / q.group_size;
    return reinterpret_cast<const uint32_t*>(static_cast<const char*>(groups) +
                                             at * (q.scale_dtype == DType::f32 ? 4 : 2));
  }

  static void straight_run(const Qmm& q, const char* prepared, int begin, int end) {
    alignas(64) static thread_local float w[n_block * straight_chunks * chunk];
    alignas(64) static thread_local float sums[straight_block * straight_chunks * chunk];
    size_t row_floats = straight_row_bytes(q) / 4;
    const float* x = reinterpret_cast<const float*>(prepared);
    for (int k = begin; k < end; k += straight_chunks * chunk) {
      int columns = end - k < straight_chunks * chunk ? end - k : straight_chunks * chunk;
      int chunks = ceil_div(columns, chunk), stride = chunks * chunk;
      for (int m_begin = 0; m_begin < q.M; m_begin += straight_block) {
        int m_end = m_begin + straight_block < q.M ? m_begin + straight_block : q.M;
        for (int i = 0; i < (m_end - m_begin) * stride; ++i) {
          sums[i] = 0;
        }
        for (int n_begin = 0; n_begin < q.N; n_begin += n_block) {
          int rows = q.N - n_begin < n_block ? q.N - n_begin : n_block;
          for (int n = 0; n < rows; ++n) {
            for (int ahead = 0; ahead < columns / per; ahead += 16) {
              V::prefetch(q.words + int64_t(n_begin + n + 8) * (q.K / per) + k / per + ahead);
            }
            V::prefetch(group_ahead(q, q.scales, n_begin + n + 8, k));
            V::prefetch(group_ahead(q, q.biases, n_begin + n + 8, k));
            dequantize(q, n_begin + n, k / chunk, chunks, w + n * stride);
          }
          for (int m = m_begin; m < m_end; m += SR) {
            const float* xs[SR];
            for (int i = 0; i < SR; ++i) {
              xs[i] = x + (m + i < m_end ? m + i : m_end - 1) * row_floats + n_begin;
            }
            for (int at = 0; at < stride; at += SC * L) {
              Tiles<V>::straight(m_end - m, xs, w + at, rows, stride, sums + (m - m_begin) * stride + at);
            }
          }
        }
        for (int m = m_begin; m < m_end; ++m) {
          const float* from = sums + (m - m_begin) * stride;
          for (int at = 0; at < columns; at += chunk, from += chunk) {
            alignas(64) float y[chunk];
            for (int i = 0; i < L; ++i) {
              for (int j = 0; j < per; ++j) {
                y[i * per + j] = from[j * L + i];
              }
            }
            int here = columns - at < chunk ? columns - at : chunk;
            V::narrow(y, q.y, q.x_dtype, int64_t(y_row(q, m)) * q.K + k + at, here);
          }
        }
      }
    }
    V::leave();
  }

  static int straight_unit(const Qmm& q) { return chunk > q.group_size ? chunk : q.group_size; }  // whole groups
};

// f(kernels of q's format): the list of formats and storage types, in one place.
template <class V, class Function>
auto for_format(const Qmm& q, Function&& f) {
#define MLXQ_CASE(BITS, GROUP_SIZE)                                                                   \
  if (q.bits == BITS && q.group_size == GROUP_SIZE) {                                                 \
    constexpr int groups = V::L * 32 / BITS / GROUP_SIZE;                                             \
    return f(FloatKernels<V, BITS, groups ? groups : 1>{});                                           \
  }
  MLXQ_FOR_EACH_FORMAT(MLXQ_CASE)
#undef MLXQ_CASE
  __builtin_unreachable();
}

template <class V>
struct FloatFamily {
  static bool serves_dot(const Qmm& q) { return q.transpose && q.M <= V::dot_rows; }
  static bool serves_strip(const Qmm& q) { return q.transpose; }
  static bool serves_straight(const Qmm& q) { return !q.transpose; }

#define MLXQ_KERNEL(name)                                                                              \
  static int name##_unit(const Qmm& q) {                                                               \
    return for_format<V>(q, [&](auto k) { return decltype(k)::name##_unit(q); });                      \
  }                                                                                                    \
  static size_t name##_row_bytes(const Qmm& q) {                                                       \
    return for_format<V>(q, [&](auto k) { return decltype(k)::name##_row_bytes(q); });                 \
  }                                                                                                    \
  static void name##_prepare(const Qmm& q, char* prepared, int row_begin, int row_end) {               \
    for_format<V>(q, [&](auto k) { decltype(k)::name##_prepare(q, prepared, row_begin, row_end); });   \
  }                                                                                                    \
  static void name##_run(const Qmm& q, const char* prepared, int begin, int end) {                     \
    for_format<V>(q, [&](auto k) { decltype(k)::name##_run(q, prepared, begin, end); });               \
  }
  MLXQ_KERNEL(dot)
  MLXQ_KERNEL(strip)
  MLXQ_KERNEL(straight)
#undef MLXQ_KERNEL
};

// Initializer of a Kernel: name is a string literal, kernel one of dot, strip, straight.
#define MLXQ_FLOAT_KERNEL(V, name, kernel)                                                    \
  {                                                                                           \
    name, FloatFamily<V>::serves_##kernel, FloatFamily<V>::kernel##_unit,                     \
        FloatFamily<V>::kernel##_row_bytes, FloatFamily<V>::kernel##_prepare,                 \
        FloatFamily<V>::kernel##_run                                                          \
  }

}  // namespace
}  // namespace mlxq
