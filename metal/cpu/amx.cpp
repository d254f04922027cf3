// AMX: products of 16x32 by 32x16 bfloat16 tiles, for transpose=true and more than a few rows.
//
//   y[m, n] = sum_k W[n, k] * x[m, k],   W[n, k] = fma(scale, code, bias) in float32, then rounded to bfloat16
//
//   amx:bf16    x bfloat16: one product.
//   amx:split   x float32 or float16: x = x_hi + x_lo and W = W_hi + W_lo, each part a bfloat16;
//               W_lo x_hi + W_hi x_hi + W_hi x_lo. Lost: W_lo x_lo (2^-16 of |W x| at most) and what two parts cannot
//               hold (2^-17 each): 3e-5 at worst, in the Frobenius norm 2.5e-6 each and 4.3e-6 together.
//
// Sums are float32 in tiles. Subnormals count as zero in AMX, so do W's and y's here. In amx:split a row of x that is
// not finite, rounds to infinity or is tiny throughout goes to scalar_row; amx:bf16 needs no such care.
//
// W is the left operand: its tile is 16 rows n of 32 k each, as W lies in memory, so that codes become tiles without
// a transposition. x is the right operand (rows: pairs of k, columns: 16 rows m of x), so y comes out transposed:
//
//            m0..15    m16..31                    left tile     right tile (VNNI)      sums
//          +---------+---------+     n0..15       k0 ... k31    m0 m0 m1 m1 ...        m0 m1 ... m15
//   W tile | sums 0  | sums 1  |                n0  . . .       k0 k1 k0 k1         n0  .
//          +---------+---------+                n1              k2 k3 k2 k3         n1
//   W tile | sums 2  | sums 3  |     n16..31    ...             ...                 ...
//          +---------+---------+
//
// One thread takes its columns n in blocks of 32 and each block over all of K. A *unit* is 8 words (32 bytes) of a row
// of W: it is broadcast to both halves of a register, shifted, and looked up (vpermw) in a table of the group's 2^bits
// weights, two codes of each 16 bits at a time. So k comes in this order within a unit, and prepare gives x the same:
//
//   4-bit, 64 codes, 2 tiles:   tile t, lane i < 16: k = 4 i + 2 t;   lane 16 + i: k = 4 i + 2 t + 1
//   2-bit, 128 codes, 4 tiles:  tile t, lane i < 16: k = 8 i + 2 t;   lane 16 + i: k = 8 i + 2 t + 1
//   8-bit, 32 codes, 1 tile:    as they come; no table, each code is converted and multiplied
//
// A *step* is 32 KB of a block's tiles. While AMX multiplies step s by the first 32 rows of
// x, the vector units build step s + 1, some rows of it between two tiles' products. Then the other rows of x are
// multiplied by step s, 32 at a time, with their sums put aside until the next step. x stays in L2: more rows than that
// are taken in passes, each of which builds W anew.
//
//   prepared row   [hi: K_padded bfloat16] [lo: K_padded bfloat16, split only] [64 bytes: flag, split only] [64 bytes
//                  if that makes an odd number of cache lines: 16 rows must not fall into one set of L1]
//   xv             [rows / 16][K_padded / 32][plane] right tiles of 1 KB: prepared rows transposed, once per run
//   w              [2 steps][tiles in a step][2][plane] left tiles of 1 KB
//   aside          [rows / 32][4] tiles of sums
//
// K is padded to whole units with zeros in x and in the scales and biases. What limits: up to 32 rows the building,
// about 10 instructions for 64 codes; above, the tiles: a product takes 16 cycles and a load from L1 8, side by side on
// a quiet core, but four loads and four products take 230 cycles instead of 64 while the core's other hardware thread
// is busy.
// gcc 12's AVX-512 intrinsics start from a register that they leave undefined, and it warns of its own header.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstdlib>

#include "kernel.h"
#include "numeric.h"

#include "amx_tiles.h"

namespace mlxq {
namespace {

// From this many rows on this family is faster than avx512_vnni, whose float16 needs two planes where float32 needs
// three (tools/results/amx-*.json).
constexpr int bf16_from_rows = 6;
constexpr int f32_from_rows = 16;
constexpr int f16_from_rows = 32;

constexpr int tile_bytes = 1024;
constexpr int tile_k = 32;
constexpr int block_columns = 32;
constexpr int block_rows = 32;
constexpr int unit_words = 8;
// 32 KB of W in a step. Half of that is 10 % slower from M=128 on, as sums are put aside twice as often.
template <int planes>
constexpr int step_tiles = 16 / planes;
#ifdef MLXQ_EMULATE_AMX
constexpr size_t pass_bytes = 64 << 10;  // small shapes take several passes
#else
constexpr size_t pass_bytes = 1 << 20;  // of transposed x: half of a 2 MB L2
#endif
constexpr int least_pass_rows = 64;

constexpr int unit_codes(int bits) { return 32 * unit_words / bits; }

int padded_k(const Qmm& q) {
  int codes = unit_codes(q.bits);
  return (q.K + codes - 1) / codes * codes;
}

int padded_groups(const Qmm& q) { return (padded_k(q) + q.group_size - 1) / q.group_size; }

inline __m512i lanes16(int (*value)(int)) {
  alignas(64) uint16_t lanes[32];
  for (int i = 0; i < 32; ++i) {
    lanes[i] = uint16_t(value(i));
  }
  return _mm512_load_si512(lanes);
}

inline __m512i lanes32(int (*value)(int)) {
  alignas(64) int32_t lanes[16];
  for (int i = 0; i < 16; ++i) {
    lanes[i] = value(i);
  }
  return _mm512_load_si512(lanes);
}

// Two vectors of float32 rounded to bfloat16, a in the low half.
inline __m512i round_pair(__m512 a, __m512 b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }

inline __m512 low_half(__m512i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bf16)), 16));
}

inline __m512 high_half(__m512i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bf16, 1)), 16));
}

inline __m512 load16(const void* p, DType dtype, int64_t i, __mmask16 lanes) {
  if (dtype == DType::f32) {
    return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(p) + i);
  }
  __m256i halves = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(p) + i);
  if (dtype == DType::f16) {
    return _mm512_cvtph_ps(halves);
  }
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// ---- prepare: rows of x as bfloat16 planes, k in the order of the tiles

template <int planes>
size_t row_bytes(const Qmm& q) {
  size_t lines = size_t(padded_k(q)) * 2 * planes / 64 + (planes == 2);
  return 64 * (lines | 1);
}

uint32_t* row_flag(char* row, const Qmm& q) { return reinterpret_cast<uint32_t*>(row + size_t(padded_k(q)) * 4); }

template <int bits>
inline void store_unit(const __m512i* natural, char* out) {
  if constexpr (bits == 8) {
    _mm512_store_si512(out, natural[0]);
  } else if constexpr (bits == 4) {
    const __m512i first = lanes16([](int i) { return 4 * (i % 16) + i / 16; });
    for (int t = 0; t < 2; ++t) {
      __m512i from = _mm512_add_epi16(first, _mm512_set1_epi16(short(2 * t)));
      _mm512_store_si512(out + 64 * t, _mm512_permutex2var_epi16(natural[0], from, natural[1]));
    }
  } else {
    const __m512i first = lanes16([](int i) { return (8 * (i % 16) + i / 16) % 64; });
    for (int t = 0; t < 4; ++t) {
      __m512i from = _mm512_add_epi16(first, _mm512_set1_epi16(short(2 * t)));
      __m512i low = _mm512_permutex2var_epi16(natural[0], from, natural[1]);
      __m512i high = _mm512_permutex2var_epi16(natural[2], from, natural[3]);
      _mm512_store_si512(out + 64 * t, _mm512_mask_mov_epi16(low, 0xff00ff00, high));
    }
  }
}

template <int bits, int planes>
void prepare_row(const Qmm& q, int64_t base, char* row) {
  constexpr int vectors = unit_codes(bits) / 32;
  size_t plane_bytes = size_t(padded_k(q)) * 2;
  __m512i largest = _mm512_setzero_si512();
  for (int k = 0; k < q.K; k += unit_codes(bits)) {
    __m512i hi[vectors], lo[vectors];
    for (int v = 0; v < vectors; ++v) {
      if (k + 32 * v >= q.K) {
        hi[v] = lo[v] = _mm512_setzero_si512();
      } else if constexpr (planes == 1) {
        hi[v] = _mm512_loadu_si512(static_cast<const uint16_t*>(q.x) + base + k + 32 * v);
      } else {
        __m512 a = load16(q.x, q.x_dtype, base + k + 32 * v, 0xffff);
        __m512 b = load16(q.x, q.x_dtype, base + k + 32 * v + 16, 0xffff);
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(a), magnitude));
        largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(b), magnitude));
        hi[v] = round_pair(a, b);
        lo[v] = round_pair(_mm512_sub_ps(a, low_half(hi[v])), _mm512_sub_ps(b, high_half(hi[v])));
      }
    }
    store_unit<bits>(hi, row + 2 * k);
    if constexpr (planes == 2) {
      store_unit<bits>(lo, row + plane_bytes + 2 * k);
    }
  }
  if constexpr (planes == 2) {
    // 0x7f7f8000 rounds to infinity as bfloat16. Below 2^-100 the parts' products come near the subnormals.
    int top = _mm512_reduce_max_epi32(largest);
    *row_flag(row, q) = top >= 0x7f7f8000 || (top > 0 && top < (127 - 100) << 23);
  }
}

template <int planes>
void prepare(const Qmm& q, char* prepared, int row_begin, int row_end) {
  size_t bytes = row_bytes<planes>(q);
  for (int m = row_begin; m < row_end; ++m) {
    int64_t base = int64_t(q.x_rows ? q.x_rows[m] : m) * q.K;
    char* row = prepared + m * bytes;
    if (q.bits == 2) {
      prepare_row<2, planes>(q, base, row);
    } else if (q.bits == 4) {
      prepare_row<4, planes>(q, base, row);
    } else {
      prepare_row<8, planes>(q, base, row);
    }
  }
  _mm256_zeroupper();
}

// ---- run: x's tiles

// Column i of rows becomes row i.
inline void transpose16(__m512i (&rows)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {
    __m512i a = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), b = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    __m512i c = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]), d = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int j = 0; j < 4; ++j) {
    __m512i a = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88), b = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88), d = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    rows[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

template <int planes>
void transpose_rows(const Qmm& q, const char* prepared, int m_begin, int m_end, char* xv) {
  size_t bytes = row_bytes<planes>(q), plane_bytes = size_t(padded_k(q)) * 2;
  int k_tiles = padded_k(q) / tile_k;
  for (int m = m_begin; m < m_end; m += 16) {
    int rows = m_end - m < 16 ? m_end - m : 16;
    for (int t = 0; t < k_tiles; ++t) {
      for (int p = 0; p < planes; ++p) {
        __m512i lines[16];
        for (int i = 0; i < 16; ++i) {
          lines[i] = i < rows ? _mm512_load_si512(prepared + (m + i) * bytes + p * plane_bytes + 64 * t)
                              : _mm512_setzero_si512();
        }
        transpose16(lines);
        for (int i = 0; i < 16; ++i) {
          _mm512_store_si512(xv + 64 * i, lines[i]);
        }
        xv += tile_bytes;
      }
    }
  }
}

// ---- run: W's tiles

// Scales and biases of rows [n, n + rows) as float32, a row every padded_groups.
void widen(const Qmm& q, int n, int rows, float* scales, float* biases) {
  int groups = q.K / q.group_size, stride = padded_groups(q);
  for (int r = 0; r < rows; ++r) {
    for (int g = 0; g < stride; g += 16) {
      __mmask16 there = groups - g >= 16 ? 0xffff : __mmask16((1u << (groups - g > 0 ? groups - g : 0)) - 1);
      __mmask16 wanted = stride - g >= 16 ? 0xffff : __mmask16((1u << (stride - g)) - 1);
      int64_t at = int64_t(n + r) * groups + g;
      _mm512_mask_storeu_ps(scales + r * stride + g, wanted, load16(q.scales, q.scale_dtype, at, there));
      _mm512_mask_storeu_ps(biases + r * stride + g, wanted, load16(q.biases, q.scale_dtype, at, there));
    }
  }
}

// The values of one register of tables: the low 16 lanes serve a unit's first groups.
template <int bits, int group>
struct Unit {
  static constexpr int codes = unit_codes(bits);
  static constexpr int tiles = codes / tile_k;
  static constexpr int groups = codes > group ? codes / group : 1;
  static constexpr int entries = groups << bits;  // 16 or fewer fit both halves of a vpermw table; 32 fill it

  // Float32 weights of a unit's groups: code i % 2^bits of group i >> bits in lane i (4-bit groups of 32: of `which`).
  static inline __m512 values(const float* scales, const float* biases, int which) {
    constexpr int mask = (1 << bits) - 1;
    const __m512 code = _mm512_cvtepi32_ps(lanes32([](int i) { return i & mask; }));
    if constexpr (bits == 4 || groups == 1) {
      return _mm512_fmadd_ps(_mm512_set1_ps(scales[which]), code, _mm512_set1_ps(biases[which]));
    } else {
      const __m512i from = lanes32([](int i) { return (i >> bits) & (groups - 1); });
      constexpr __mmask16 there = (1 << groups) - 1;
      __m512 s = _mm512_maskz_loadu_ps(there, scales), b = _mm512_maskz_loadu_ps(there, biases);
      return _mm512_fmadd_ps(_mm512_permutexvar_ps(from, s), code, _mm512_permutexvar_ps(from, b));
    }
  }

  // words: 8 of them, or `words_left` at the end of a row. out: the row's 64 bytes in the first tile.
  template <int planes>
  static inline void build(const uint32_t* words, int words_left, const float* scales, const float* biases, char* out) {
    constexpr int next_tile = 2 * planes * tile_bytes;
    if constexpr (bits == 8) {
      const __m512 s = _mm512_set1_ps(*scales), b = _mm512_set1_ps(*biases);
      const __m128i* bytes = reinterpret_cast<const __m128i*>(words);
      __m512 w0 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes))), s, b);
      __m512 w1 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes + 1))), s, b);
      __m512i hi = round_pair(w0, w1);
      _mm512_store_si512(out, hi);
      if constexpr (planes == 2) {
        _mm512_store_si512(out + tile_bytes,
                           round_pair(_mm512_sub_ps(w0, low_half(hi)), _mm512_sub_ps(w1, high_half(hi))));
      }
    } else {
      __m512i row = words_left >= unit_words
                        ? _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)))
                        : _mm512_broadcast_i64x4(_mm256_maskz_loadu_epi32(__mmask8((1 << words_left) - 1), words));
      __m512 w0 = values(scales, biases, 0), w1 = entries > 16 ? values(scales, biases, 1) : w0;
      __m512i hi = round_pair(w0, w1), lo = hi;
      if constexpr (planes == 2) {
        lo = round_pair(_mm512_sub_ps(w0, low_half(hi)), _mm512_sub_ps(w1, high_half(hi)));
      }
      const __m512i by = lanes16([](int i) { return bits * (i / 16); });
      const __m512i which = lanes16([](int i) { return (i % 16 * (16 / bits) / group) << bits; });
      for (int t = 0; t < tiles; ++t) {
        __m512i index = _mm512_srlv_epi16(row, _mm512_add_epi16(by, _mm512_set1_epi16(short(2 * bits * t))));
        if constexpr (groups > 1) {  // else the table repeats every 2^bits lanes and the bits above do no harm
          index = _mm512_ternarylogic_epi32(index, _mm512_set1_epi16((1 << bits) - 1), which, 0xea);  // a & b | c
        }
        _mm512_store_si512(out + t * next_tile, _mm512_permutexvar_epi16(index, hi));
        if constexpr (planes == 2) {
          _mm512_store_si512(out + t * next_tile + tile_bytes, _mm512_permutexvar_epi16(index, lo));
        }
      }
    }
  }
};

struct Block {
  const Qmm& q;
  int n;             // first column
  int columns;       // 1 .. 32
  int k_tiles;
  const float* scales;
  const float* biases;
  int group_stride;
};

// `count` rows, from row r of the block, of step `step`; all in one tile. full: all tiles of the step exist.
template <int bits, int group, int planes, bool full>
inline void build_some(const Block& block, int step, int r, int count, char* out) {
  using U = Unit<bits, group>;
  constexpr int step_codes = step_tiles<planes> * tile_k, step_words = step_codes * bits / 32;
  const int64_t words_per_row = int64_t(block.q.K) * bits / 32;
  const int first_word = step * step_words, first_group = step * step_codes / group;
  const int units = full ? step_tiles<planes> / U::tiles : (block.k_tiles - step * step_tiles<planes>) / U::tiles;
  int words_left = full ? step_words : int(words_per_row) - first_word;
  const uint32_t* words = block.q.words + (block.n + r) * words_per_row + first_word;
  const float* scales = block.scales + r * block.group_stride + first_group;
  const float* biases = block.biases + r * block.group_stride + first_group;
  char* row = out + (r / 16) * planes * tile_bytes + r % 16 * 64;
  for (int i = 0; i < count; ++i) {
    for (int line = 0; line < step_words; line += 16) {  // the next block's, which is then in L2 when its turn comes
      _mm_prefetch(reinterpret_cast<const char*>(words + block_columns * words_per_row + line), _MM_HINT_T1);
    }
#pragma GCC unroll 8
    for (int u = 0; u < units; ++u) {
      U::template build<planes>(words + u * unit_words, words_left - u * unit_words, scales + u * U::codes / group,
                                biases + u * U::codes / group, row + u * U::tiles * 2 * planes * tile_bytes);
    }
    words += words_per_row;
    scales += block.group_stride;
    biases += block.group_stride;
    row += 64;
  }
}

// Part `part` of step_tiles of the rows of step `step`.
template <int bits, int group, int planes>
inline void build_part(const Block& block, int step, int part, char* out) {
  constexpr int rows = block_columns / step_tiles<planes>;
  static_assert(16 % rows == 0);
  const int r = part * rows, left = block.columns - r, count = left < rows ? left : rows;
  if (count <= 0) {
    return;
  }
  if ((step + 1) * step_tiles<planes> * tile_k <= block.q.K) {
    build_some<bits, group, planes, true>(block, step, r, count, out);
  } else {
    build_some<bits, group, planes, false>(block, step, r, count, out);
  }
}

// ---- run: products

// Tiles 0..3: sums (n_tile * 2 + m_tile). 4, 5: W. 6, 7: x.

template <int n_tiles, int m_tiles>
inline void zero_sums() {
  _tile_zero(0);
  if constexpr (m_tiles == 2) {
    _tile_zero(1);
  }
  if constexpr (n_tiles == 2) {
    _tile_zero(2);
  }
  if constexpr (n_tiles == 2 && m_tiles == 2) {
    _tile_zero(3);
  }
}

template <int n_tiles, int m_tiles>
inline void load_sums(const char* sums) {
  _tile_loadd(0, sums, 64);
  if constexpr (m_tiles == 2) {
    _tile_loadd(1, sums + tile_bytes, 64);
  }
  if constexpr (n_tiles == 2) {
    _tile_loadd(2, sums + 2 * tile_bytes, 64);
  }
  if constexpr (n_tiles == 2 && m_tiles == 2) {
    _tile_loadd(3, sums + 3 * tile_bytes, 64);
  }
}

template <int n_tiles, int m_tiles>
inline void put_sums(char* sums) {
  _tile_stored(0, sums, 64);
  if constexpr (m_tiles == 2) {
    _tile_stored(1, sums + tile_bytes, 64);
  }
  if constexpr (n_tiles == 2) {
    _tile_stored(2, sums + 2 * tile_bytes, 64);
  }
  if constexpr (n_tiles == 2 && m_tiles == 2) {
    _tile_stored(3, sums + 3 * tile_bytes, 64);
  }
}

template <int n_tiles>
inline void load_w(const char* w, int next) {
  _tile_loadd(4, w, 64);
  if constexpr (n_tiles == 2) {
    _tile_loadd(5, w + next, 64);
  }
}

template <int m_tiles>
inline void load_x(const char* x0, const char* x1) {
  _tile_loadd(6, x0, 64);
  if constexpr (m_tiles == 2) {
    _tile_loadd(7, x1, 64);
  }
}

template <int n_tiles, int m_tiles>
inline void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (m_tiles == 2) {
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (n_tiles == 2) {
    _tile_dpbf16ps(2, 5, 6);
  }
  if constexpr (n_tiles == 2 && m_tiles == 2) {
    _tile_dpbf16ps(3, 5, 7);
  }
}

// One tile along K. w: [2][planes], x0, x1: [planes] tiles. Loading each tile just before or just after its uses makes
// no difference, measured on cores with and without a busy second hardware thread.
template <int planes, int n_tiles, int m_tiles>
inline void multiply_tile(const char* w, const char* x0, const char* x1) {
  stores_done();
  load_x<m_tiles>(x0, x1);
  if constexpr (planes == 2) {
    load_w<n_tiles>(w + tile_bytes, planes * tile_bytes);
    multiply<n_tiles, m_tiles>();
  }
  load_w<n_tiles>(w, planes * tile_bytes);
  multiply<n_tiles, m_tiles>();
  if constexpr (planes == 2) {
    load_x<m_tiles>(x0 + tile_bytes, x1 + tile_bytes);
    multiply<n_tiles, m_tiles>();
  }
}

// sums: [16 n][16 m] float32. Writes rows m .. of y, columns n ..
inline void store_tile(const Qmm& q, const char* sums, int m, int rows, int n, int columns) {
  __m512i lines[16];
  for (int i = 0; i < 16; ++i) {
    lines[i] = _mm512_load_si512(sums + 64 * i);
  }
  transpose16(lines);
  __mmask16 mask = columns >= 16 ? 0xffff : __mmask16((1u << columns) - 1);
  alignas(64) float out[16][16];
  for (int i = 0; i < 16; ++i) {
    _mm512_store_si512(out[i], lines[i]);
  }
  for (int i = 0; i < rows && i < 16; ++i) {
    int64_t at = int64_t(q.y_rows ? q.y_rows[m + i] : m + i) * q.N + n;
    __m512 y = _mm512_load_ps(out[i]);
    if (q.x_dtype == DType::f32) {
      _mm512_mask_storeu_ps(static_cast<float*>(q.y) + at, mask, y);
    } else {
      __m256i half = q.x_dtype == DType::f16 ? _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT)
                                             : (__m256i)_mm512_cvtneps_pbh(y);
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(q.y) + at, mask, half);
    }
  }
}

// One step of a block of W times up to 32 rows of x; between its products the next step of W is built, if `next` says
// where.
template <int bits, int group, int planes, int n_tiles, int m_tiles>
void multiply_step(const Block& block, int step, const char* w, const char* x, int m, int rows, char* sums, bool alone,
                   char* next) {
  constexpr int w_stride = 2 * planes * tile_bytes, x_stride = planes * tile_bytes;
  const int first = step * step_tiles<planes>;
  const bool last = first + step_tiles<planes> >= block.k_tiles;
  const int tiles = last ? block.k_tiles - first : step_tiles<planes>;
  const char* x0 = x + size_t(first) * x_stride;
  const char* x1 = x0 + size_t(block.k_tiles) * x_stride;
  if (step == 0) {
    zero_sums<n_tiles, m_tiles>();
  } else if (!alone) {
    load_sums<n_tiles, m_tiles>(sums);
  }
  auto multiply_at = [&](int t) {
    multiply_tile<planes, n_tiles, m_tiles>(w + t * w_stride, x0 + t * x_stride, x1 + t * x_stride);
  };
  if (next) {  // then this step is full
    for (int t = 0; t < step_tiles<planes>; ++t) {
      multiply_at(t);
      build_part<bits, group, planes>(block, step + 1, t, next);
    }
  } else {
    for (int t = 0; t < tiles; ++t) {
      multiply_at(t);
    }
  }
  if (last || !alone) {
    put_sums<n_tiles, m_tiles>(sums);
  }
  if (last) {
    for (int i = 0; i < n_tiles; ++i) {
      for (int j = 0; j < m_tiles; ++j) {
        store_tile(block.q, sums + (2 * i + j) * tile_bytes, m + 16 * j, rows - 16 * j, block.n + 16 * i,
                   block.columns - 16 * i);
      }
    }
  }
}

// A block of columns for the rows [m_begin, m_end) of x.
template <int bits, int group, int planes, int n_tiles>
void run_block(const Block& block, const char* xv, int m_begin, int m_end, char* w, char* aside) {
  const int steps = (block.k_tiles + step_tiles<planes> - 1) / step_tiles<planes>;
  const size_t x_bytes = size_t(block_rows / 16) * block.k_tiles * planes * tile_bytes;
  const bool alone = m_end - m_begin <= block_rows;
  auto place = [&](int step) { return w + (step & 1) * step_tiles<planes> * 2 * planes * tile_bytes; };
  for (int part = 0; part < step_tiles<planes>; ++part) {
    build_part<bits, group, planes>(block, 0, part, w);
  }
  for (int step = 0; step < steps; ++step) {
    char* next = step + 1 < steps ? place(step + 1) : nullptr;
    const char* x = xv;
    char* sums = aside;
    for (int m = m_begin; m < m_end; m += block_rows) {
      auto multiply_rows = m_end - m > 16 ? multiply_step<bits, group, planes, n_tiles, 2>
                                          : multiply_step<bits, group, planes, n_tiles, 1>;
      multiply_rows(block, step, place(step), x, m, m_end - m, sums, alone, next);
      x += x_bytes;
      sums += 4 * tile_bytes;
      next = nullptr;
    }
  }
}

struct Scratch {
  char* bytes = nullptr;
  size_t held = 0;
  ~Scratch() { std::free(bytes); }
  char* get(size_t wanted) {
    if (wanted > held) {
      std::free(bytes);
      held = (wanted + 4095) / 4096 * 4096;
      bytes = static_cast<char*>(std::aligned_alloc(4096, held));
      held = bytes ? held : 0;
    }
    return bytes;
  }
};

size_t lines_of(size_t bytes) { return (bytes + 63) / 64 * 64; }

template <int bits, int group, int planes>
void run_format(const Qmm& q, const char* prepared, int begin, int end) {
  thread_local Scratch scratch;
  const int k_tiles = padded_k(q) / tile_k, group_stride = padded_groups(q);
  const size_t row_tile_bytes = size_t(k_tiles) * planes * tile_bytes;  // of 16 rows of x

  int pass_rows = int(pass_bytes / row_tile_bytes) * 16 / block_rows * block_rows;
  pass_rows = pass_rows < least_pass_rows ? least_pass_rows : pass_rows;
  const int passes = (q.M + pass_rows - 1) / pass_rows;  // of about the same size
  pass_rows = ((q.M + passes - 1) / passes + 15) / 16 * 16;

  const size_t w_bytes = size_t(2) * step_tiles<planes> * 2 * planes * tile_bytes;
  const size_t aside_bytes = size_t((pass_rows + block_rows - 1) / block_rows) * 4 * tile_bytes;
  const size_t group_bytes = lines_of(size_t(block_columns) * group_stride * sizeof(float));
  char* w = scratch.get(w_bytes + aside_bytes + 2 * group_bytes + pass_rows / 16 * row_tile_bytes);
  if (!w) {  // no memory for tiles
    for (int m = 0; m < q.M; ++m) {
      scalar_row(q, m, begin, end);
    }
    return;
  }
  char* aside = w + w_bytes;
  float* scales = reinterpret_cast<float*>(aside + aside_bytes);
  float* biases = reinterpret_cast<float*>(aside + aside_bytes + group_bytes);
  char* xv = aside + aside_bytes + 2 * group_bytes;

  configure(TileConfig{});
  for (int m_begin = 0; m_begin < q.M; m_begin += pass_rows) {
    const int m_end = q.M - m_begin < pass_rows ? q.M : m_begin + pass_rows;
    transpose_rows<planes>(q, prepared, m_begin, m_end, xv);
    for (int n = begin; n < end; n += block_columns) {
      const int columns = end - n < block_columns ? end - n : block_columns;
      const Block block{q, n, columns, k_tiles, scales, biases, group_stride};
      widen(q, n, columns, scales, biases);
      auto run_columns = columns > 16 ? run_block<bits, group, planes, 2> : run_block<bits, group, planes, 1>;
      run_columns(block, xv, m_begin, m_end, w, aside);
    }
  }
  _tile_release();
}

template <int planes>
void run(const Qmm& q, const char* prepared, int begin, int end) {
  switch (q.bits * 1000 + q.group_size) {
#define MLXQ_RUN(bits, group)                           \
  case bits * 1000 + group:                             \
    run_format<bits, group, planes>(q, prepared, begin, end); \
    break;
    MLXQ_FOR_EACH_FORMAT(MLXQ_RUN)
#undef MLXQ_RUN
  }
  _mm256_zeroupper();
  if constexpr (planes == 2) {
    for (int m = 0; m < q.M; ++m) {
      if (*row_flag(const_cast<char*>(prepared) + m * row_bytes<planes>(q), q)) {
        scalar_row(q, m, begin, end);
      }
    }
  }
}

bool serves_bf16(const Qmm& q) { return q.transpose && q.x_dtype == DType::bf16 && q.M >= bf16_from_rows; }
bool serves_split(const Qmm& q) {
  return q.transpose && q.x_dtype != DType::bf16 && q.M >= (q.x_dtype == DType::f32 ? f32_from_rows : f16_from_rows);
}
int unit(const Qmm&) { return block_columns; }

constexpr Kernel kernels[] = {
    {"amx:bf16", serves_bf16, unit, row_bytes<1>, prepare<1>, run<1>},
    {"amx:split", serves_split, unit, row_bytes<2>, prepare<2>, run<2>},
};

bool runs_here() {
  static const bool here = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                           tiles_here(cpuid_amx_bf16);
  return here;
}

}  // namespace

extern const Family amx_family;
const Family amx_family{"amx", runs_here, kernels, 2};

}  // namespace mlxq
