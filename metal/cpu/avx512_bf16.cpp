// AVX-512 BF16: large products of bfloat16 activations.
//
// vdpbf16ps multiplies 16 pairs of bfloat16 and adds both products to 16 float32 sums. Lanes run along N: 32 rows of W are
// dequantized (float32 scale * code + bias, then rounded to bfloat16) into a panel of pairs along K,
//
//   panel[k / 2][2][16 rows of W][k, k + 1]
//
// which stays in the L2 cache; each row of x, copied as it is, contributes one broadcast pair per step. 12 rows of x by
// 32 rows of W fill 24 accumulators, which hold the sum over all of K: no work per group, unlike the exact kernels of
// avx512_vnni.cpp, whose error is smaller. Building the panel costs about ten instructions per 32 codes, so it pays from
// some tens of rows of x on. Limited by vdpbf16ps. K is even, N is ragged (the panel repeats the last row).
#include <immintrin.h>

#include <cstdlib>
#include <cstring>

#include "avx512_common.h"
#include "kernel.h"

namespace mlxq {
namespace {

constexpr int from_rows = 64;  // below it avx512_vnni:gemm is faster
constexpr int panel_columns = 32;
constexpr int tile_rows = 12;

// K is a multiple of 32. One cache line more, or 12 rows a power of two apart would fight for one set of the L1 cache.
size_t row_bytes(const Qmm& q) { return size_t(q.K) * 2 + 64; }

void prepare(const Qmm& q, char* prepared, int begin, int end) {
  for (int m = begin; m < end; ++m) {
    int64_t row = q.x_rows ? q.x_rows[m] : m;
    std::memcpy(prepared + size_t(m) * row_bytes(q), static_cast<const char*>(q.x) + row * q.K * 2, size_t(q.K) * 2);
  }
}

char* panel_memory(size_t wanted) {
  static thread_local char* held = nullptr;
  static thread_local size_t size = 0;
  if (wanted > size) {
    std::free(held);
    size = (wanted + 4095) / 4096 * 4096;
    held = static_cast<char*>(std::aligned_alloc(4096, size));
  }
  return held;
}

// Codes 2 * pair and 2 * pair + 1 of 16 dwords as floats, dequantized and rounded to 16 pairs of bfloat16.
template <int BITS>
__m512i dequantized_pair(__m512i dwords, int pair, __m512 scale, __m512 bias) {
  const __m512i mask = _mm512_set1_epi32((1 << BITS) - 1);
  __m512i first = _mm512_and_si512(_mm512_srli_epi32(dwords, 2 * pair * BITS), mask);
  __m512i second = _mm512_and_si512(_mm512_srli_epi32(dwords, (2 * pair + 1) * BITS), mask);
  __m512 even = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(first), bias);
  __m512 odd = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(second), bias);
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

template <int BITS>
void build_panel(const Qmm& q, char* panel, int n0) {
  constexpr int pairs = 16 / BITS;  // of codes in a dword
  const int words_per_row = q.K * BITS / 32, groups = q.K / q.group_size, dwords = q.group_size * BITS / 32;
  for (int half = 0; half < 2; ++half) {
    int64_t row[16];
    for (int i = 0; i < 16; ++i) {
      int n = n0 + half * 16 + i;
      row[i] = n < q.N ? n : q.N - 1;
    }
    __m512i scales[16], biases[16];  // of 16 groups, a vector over rows each
    for (int d0 = 0; d0 < words_per_row; d0 += 16) {
      int here = words_per_row - d0 < 16 ? words_per_row - d0 : 16;
      __m512i words[16];
      for (int i = 0; i < 16; ++i) {
        words[i] = _mm512_maskz_loadu_epi32((1u << here) - 1, q.words + row[i] * words_per_row + d0);
      }
      transpose16(words);
      for (int d = 0; d < here; ++d) {
        int g = (d0 + d) / dwords;
        if ((d0 + d) % (16 * dwords) == 0) {
          int left = groups - g < 16 ? groups - g : 16;
          for (int i = 0; i < 16; ++i) {
            __mmask16 valid = (1u << left) - 1;
            scales[i] = _mm512_castps_si512(load16(q.scales, q.scale_dtype, row[i] * groups + g, valid));
            biases[i] = _mm512_castps_si512(load16(q.biases, q.scale_dtype, row[i] * groups + g, valid));
          }
          transpose16(scales);
          transpose16(biases);
        }
        __m512 scale = _mm512_castsi512_ps(scales[g % 16]), bias = _mm512_castsi512_ps(biases[g % 16]);
        char* to = panel + (size_t(d0 + d) * pairs * 2 + half) * 64;
#pragma GCC unroll 8
        for (int pair = 0; pair < pairs; ++pair) {
          _mm512_store_si512(to + pair * 128, dequantized_pair<BITS>(words[d], pair, scale, bias));
        }
      }
    }
  }
}

// In place: as an intrinsic gcc 12 gives half the accumulators a second register and moves them every round.
void dot(__m512& sum, __m512i w, __m512i x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

template <int MR>
void multiply(const Qmm& q, const char* panel, const char* prepared, int m, int n0, int columns) {
  const size_t stride = row_bytes(q);
  const char* x = prepared + size_t(m) * stride;
  __m512 sum[MR][2];
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) {
    sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  }
  for (int pair = 0; pair < q.K / 2; ++pair) {
    __m512i w0 = _mm512_load_si512(panel + size_t(pair) * 128), w1 = _mm512_load_si512(panel + size_t(pair) * 128 + 64);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      int32_t two;
      std::memcpy(&two, x + i * stride + size_t(pair) * 4, 4);
      __m512i v = _mm512_set1_epi32(two);
      dot(sum[i][0], w0, v);
      dot(sum[i][1], w1, v);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) {
    int first = columns < 16 ? columns : 16;
    store16(q.y, q.x_dtype, y_row(q, m + i) + n0, sum[i][0], (1u << first) - 1);
    if (columns > 16) {
      store16(q.y, q.x_dtype, y_row(q, m + i) + n0 + 16, sum[i][1], (1u << (columns - 16)) - 1);
    }
  }
}

template <int BITS>
void run_bits(const Qmm& q, const char* prepared, int begin, int end) {
  char* panel = panel_memory(size_t(q.K) * panel_columns * 2);
  for (int n0 = begin; n0 < end; n0 += panel_columns) {
    int columns = end - n0 < panel_columns ? end - n0 : panel_columns;
    build_panel<BITS>(q, panel, n0);
    int m = 0;
    for (; m + tile_rows <= q.M; m += tile_rows) {
      multiply<tile_rows>(q, panel, prepared, m, n0, columns);
    }
    for (; m + 4 <= q.M; m += 4) {
      multiply<4>(q, panel, prepared, m, n0, columns);
    }
    for (; m < q.M; ++m) {
      multiply<1>(q, panel, prepared, m, n0, columns);
    }
  }
}

void run(const Qmm& q, const char* prepared, int begin, int end) {
  (q.bits == 2 ? run_bits<2> : q.bits == 4 ? run_bits<4> : run_bits<8>)(q, prepared, begin, end);
  _mm256_zeroupper();
}

bool serves(const Qmm& q) { return q.transpose && q.x_dtype == DType::bf16 && q.M >= from_rows; }
int unit(const Qmm&) { return panel_columns; }

constexpr Kernel kernels[] = {{"avx512_bf16:gemm", serves, unit, row_bytes, prepare, run}};

bool runs_here() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
}

}  // namespace

extern const Family avx512_bf16_family;
const Family avx512_bf16_family{"avx512_bf16", runs_here, kernels, 1};

}  // namespace mlxq
