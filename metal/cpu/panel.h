// 32 rows of packed weights as bytes, lanes along N, for the kernels of integer products. Static: see avx512_common.h.
#pragma once

#include <cstdlib>

#include "avx512_common.h"

namespace mlxq {

constexpr int panel_columns = 32;

static inline int padded16(int n) { return (n + 15) / 16 * 16; }

// Field j of each byte of words: see fields.h.
template <int BITS>
static inline __m512i field(__m512i words, int j) {
  if constexpr (BITS == 8) {
    return words;
  } else {
    const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
    return _mm512_and_si512(j ? _mm512_srli_epi32(words, BITS * j) : words, mask);
  }
}

struct Panel {
  char* codes;    // [dword][field][2][64]: 16 rows x 4 codes, twice; up to 64 codes of K
  float* scales;  // [group][32]
  float* biases;  // [group][32]
};

// Memory of a thread's panel, kept between calls.
static inline Panel panel_memory(const Qmm& q) {
  static thread_local char* held = nullptr;
  static thread_local size_t size = 0;
  size_t codes = size_t(q.K + 63) / 64 * 64 * panel_columns;
  size_t scales = size_t(padded16(q.K / q.group_size)) * panel_columns * 4;
  size_t wanted = (codes + 2 * scales + 4095) / 4096 * 4096;
  if (wanted > size) {
    std::free(held);
    held = static_cast<char*>(std::aligned_alloc(4096, wanted));
    size = wanted;
  }
  auto* floats = reinterpret_cast<float*>(held + codes);
  return {held, floats, floats + scales / 4};
}

// Rows [n0, n0 + 32) of W; past the edge, row N - 1. zero: what is taken off every code.
template <int BITS, int zero = 0>
static void build_panel(const Qmm& q, const Panel& panel, int n0) {
  constexpr int fields = 8 / BITS;
  const int words_per_row = q.K * BITS / 32, count = q.K / q.group_size;
  for (int half = 0; half < 2; ++half) {
    int64_t row[16];
    for (int i = 0; i < 16; ++i) {
      int n = n0 + half * 16 + i;
      row[i] = n < q.N ? n : q.N - 1;
    }
    for (int d0 = 0; d0 < words_per_row; d0 += 16) {
      int here = words_per_row - d0 < 16 ? words_per_row - d0 : 16;
      __mmask16 valid = (1u << here) - 1;
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        r[i] = _mm512_maskz_loadu_epi32(valid, q.words + row[i] * words_per_row + d0);
      }
      transpose16(r);
      char* to = panel.codes + (size_t(d0) * fields * 2 + half) * 64;
      for (int i = 0; i < here; ++i) {
        for (int j = 0; j < fields; ++j) {
          __m512i codes = field<BITS>(r[i], j);
          _mm512_store_si512(to + (i * fields + j) * 128,
                             zero ? _mm512_sub_epi8(codes, _mm512_set1_epi8(char(zero))) : codes);
        }
      }
    }
    for (int which = 0; which < 2; ++which) {
      const void* from = which ? q.biases : q.scales;
      float* to = which ? panel.biases : panel.scales;
      for (int g0 = 0; g0 < count; g0 += 16) {
        int here = count - g0 < 16 ? count - g0 : 16;
        __mmask16 valid = (1u << here) - 1;
        __m512i r[16];
        for (int i = 0; i < 16; ++i) {
          r[i] = _mm512_castps_si512(load16(from, q.scale_dtype, row[i] * count + g0, valid));
        }
        transpose16(r);
        for (int i = 0; i < here; ++i) {
          _mm512_store_si512(to + size_t(g0 + i) * panel_columns + half * 16, r[i]);
        }
      }
    }
  }
}

}  // namespace mlxq
