// What the AVX-512 families share. Static, because each file is compiled for its own instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernel.h"

namespace mlxq {

static inline int64_t y_row(const Qmm& q, int m) {
  return int64_t(q.y_rows ? q.y_rows[m] : m) * q.out_features();
}

static inline __m512 load16(const void* p, DType dtype, int64_t i, __mmask16 mask = 0xffff) {
  if (dtype == DType::f32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + i);
  }
  __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + i);
  return dtype == DType::f16 ? _mm512_cvtph_ps(half)
                             : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline void store16(void* p, DType dtype, int64_t i, __m512 value, __mmask16 mask) {
  if (dtype == DType::f32) {
    _mm512_mask_storeu_ps(static_cast<float*>(p) + i, mask, value);
    return;
  }
  __m256i half;
  if (dtype == DType::f16) {
    half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {  // round to nearest even; Inf survives, and a NaN here has its quiet bit in the upper half
    __m512i u = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, u), 16));
  }
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + i, mask, half);
}

// Rows become columns: 64 shuffles.
static inline void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

}  // namespace mlxq
