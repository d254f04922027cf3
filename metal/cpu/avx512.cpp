// AVX-512 (F, BW, DQ, VL): the float32 kernels of float_kernels.h with 16 lanes. Layout, tiles and limits stand there.
//
// A 4-bit chunk is 128 codes, 8 FMAs per row of x. Tiles: dot 1x4, 2x4 and 4x2 (32 registers: sums, parts, words),
// strip 4x6 sums with four registers of x and one of w, straight 6x4 sums with four of w and one of x.
#include <immintrin.h>

#include "float_kernels.h"

// gcc 12 says this of its own _mm512_undefined_ps.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace mlxq {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  static constexpr int L = 16;
  static constexpr int dot_rows = 8, dot_tile_1 = 4, dot_tile_2 = 4, dot_tile_4 = 2;
  static constexpr int strip_rows = 4, strip_columns = 6, straight_rows = 6;
  static constexpr int ahead = 1024;  // words prefetched ahead, 4 KB

  static MLXQ_INLINE F zero() { return _mm512_setzero_ps(); }
  static MLXQ_INLINE F set(float f) { return _mm512_set1_ps(f); }
  static MLXQ_INLINE F load(const float* p) { return _mm512_load_ps(p); }
  static MLXQ_INLINE void store(float* p, F f) { _mm512_store_ps(p, f); }
  static MLXQ_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static MLXQ_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static MLXQ_INLINE void prefetch(const uint32_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
  static void leave() { _mm256_zeroupper(); }

  static MLXQ_INLINE I words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static MLXQ_INLINE I words(const uint32_t* p, int count) {
    return _mm512_maskz_loadu_epi32(__mmask16((1u << count) - 1), p);
  }

  template <int B, int J>
  static MLXQ_INLINE F scaled_code(I w) {
    return _mm512_cvtepu32_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(((1u << B) - 1) << (B * J)))));
  }
  static float unscale(int bits, int field) { return bits_to_float(uint32_t(127 - bits * field) << 23); }

  template <int B, int J>
  static MLXQ_INLINE F code(I w) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(w, B * J), _mm512_set1_epi32((1 << B) - 1)));
  }

  // Lane i: p[i * R / 16], zero from p[here] on.
  template <int R>
  static MLXQ_INLINE F groups(const float* p, int here) {
    if constexpr (R == 1) {
      return _mm512_set1_ps(*p);
    }
    __m512 few = _mm512_castps256_ps512(_mm256_maskz_loadu_ps(__mmask8((1u << here) - 1), p));
    return _mm512_permutexvar_ps(lane_group<R>(), few);
  }

  template <int R>
  static MLXQ_INLINE __m512i lane_group() {
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_srli_epi32(lane, R == 8 ? 1 : R == 4 ? 2 : R == 2 ? 3 : 4);
  }

  // to[0..4) (+)= the sums over the lanes of a, b, c, d.
  static MLXQ_INLINE void sum4(F a, F b, F c, F d, float* to, bool add) {
    F ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));  // a b a b in each quarter
    F cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    F four = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    __m128 one = _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
    _mm_store_ps(to, add ? _mm_add_ps(_mm_load_ps(to), one) : one);
  }

  static void widen(const void* x, DType dtype, int64_t at, float* to, int count) {
    for (int i = 0; i < count; i += L) {
      __mmask16 mask = count - i >= L ? 0xffff : __mmask16((1u << (count - i)) - 1);
      if (dtype == DType::f32) {
        _mm512_mask_storeu_ps(to + i, mask, _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + at + i));
        continue;
      }
      __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + at + i);
      __m512 wide = dtype == DType::f16
                        ? _mm512_cvtph_ps(half)
                        : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      _mm512_mask_storeu_ps(to + i, mask, wide);
    }
  }

  static void narrow(const float* from, void* y, DType dtype, int64_t at, int count) {
    for (int i = 0; i < count; i += L) {
      __mmask16 mask = count - i >= L ? 0xffff : __mmask16((1u << (count - i)) - 1);
      __m512 f = _mm512_maskz_loadu_ps(mask, from + i);
      if (dtype == DType::f32) {
        _mm512_mask_storeu_ps(static_cast<float*>(y) + at + i, mask, f);
        continue;
      }
      __m256i half;
      if (dtype == DType::f16) {
        half = _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      } else {  // to nearest even; NaN stays NaN
        __m512i u = _mm512_castps_si512(f);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
        rounded = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
        half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
      }
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + at + i, mask, half);
    }
  }
};

bool runs_here() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("avx2");
}

constexpr Kernel kernels[] = {
    MLXQ_FLOAT_KERNEL(Avx512, "avx512:dot", dot),
    MLXQ_FLOAT_KERNEL(Avx512, "avx512:strip", strip),
    MLXQ_FLOAT_KERNEL(Avx512, "avx512:straight", straight),
};

}  // namespace

extern const Family avx512_family;
const Family avx512_family{"avx512", runs_here, kernels, sizeof(kernels) / sizeof(kernels[0])};

}  // namespace mlxq
