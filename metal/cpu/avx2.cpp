// AVX2 with FMA and F16C: the float32 kernels of float_kernels.h with 8 lanes. Layout, tiles and limits stand there.
//
// A 4-bit chunk is 64 codes. Tiles fill 16 registers: dot 1x4, 2x2 and 4x1, strip 3x4 sums with three registers of x
// and one of w, straight 3x4 sums with the compiler's choice of the rest.
#include <immintrin.h>

#include "float_kernels.h"

namespace mlxq {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  static constexpr int L = 8;
  static constexpr int dot_rows = 5, dot_tile_1 = 4, dot_tile_2 = 2, dot_tile_4 = 1;
  static constexpr int strip_rows = 3, strip_columns = 4, straight_rows = 3;
  static constexpr int ahead = 1024;  // words prefetched ahead, 4 KB

  static MLXQ_INLINE F zero() { return _mm256_setzero_ps(); }
  static MLXQ_INLINE F set(float f) { return _mm256_set1_ps(f); }
  static MLXQ_INLINE F load(const float* p) { return _mm256_load_ps(p); }
  static MLXQ_INLINE void store(float* p, F f) { _mm256_store_ps(p, f); }
  static MLXQ_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static MLXQ_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static MLXQ_INLINE void prefetch(const uint32_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
  static void leave() { _mm256_zeroupper(); }

  static MLXQ_INLINE I words(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static MLXQ_INLINE I words(const uint32_t* p, int count) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
  }

  // The conversion is signed: the top field is shifted down, the others are masked where they lie.
  static constexpr bool shifted(int bits, int field) { return bits * (field + 1) == 32; }
  template <int B, int J>
  static MLXQ_INLINE F scaled_code(I w) {
    if constexpr (shifted(B, J)) {
      return _mm256_cvtepi32_ps(_mm256_srli_epi32(w, B * J));
    } else {
      return _mm256_cvtepi32_ps(_mm256_and_si256(w, _mm256_set1_epi32(int(((1u << B) - 1) << (B * J)))));
    }
  }
  static float unscale(int bits, int field) {
    return shifted(bits, field) ? 1 : bits_to_float(uint32_t(127 - bits * field) << 23);
  }

  template <int B, int J>
  static MLXQ_INLINE F code(I w) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(w, B * J), _mm256_set1_epi32((1 << B) - 1)));
  }

  // Lane i: p[i * R / 8], zero from p[here] on.
  template <int R>
  static MLXQ_INLINE F groups(const float* p, int here) {
    static_assert(R == 1 || R == 2 || R == 4);
    if constexpr (R == 1) {
      return _mm256_set1_ps(*p);
    }
    __m128i lane = _mm_setr_epi32(0, 1, 2, 3);
    __m128 few = here == 4 ? _mm_loadu_ps(p) : _mm_maskload_ps(p, _mm_cmpgt_epi32(_mm_set1_epi32(here), lane));
    __m256i pick = R == 4 ? _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3) : _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(few), pick);
  }

  // to[0..4) (+)= the sums over the lanes of a, b, c, d.
  static MLXQ_INLINE void sum4(F a, F b, F c, F d, float* to, bool add) {
    __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    __m128 one = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
    _mm_store_ps(to, add ? _mm_add_ps(_mm_load_ps(to), one) : one);
  }

  static void widen(const void* x, DType dtype, int64_t at, float* to, int count) {
    int i = 0;
    if (dtype == DType::f32) {
      std::memcpy(to, static_cast<const float*>(x) + at, size_t(count) * 4);
      return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(x) + at;
    for (; i + L <= count; i += L) {
      __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      __m256 wide = dtype == DType::f16
                        ? _mm256_cvtph_ps(half)
                        : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
      _mm256_storeu_ps(to + i, wide);
    }
    for (; i < count; ++i) {
      to[i] = dtype == DType::f16 ? _cvtsh_ss(from[i]) : bf16_to_float(from[i]);
    }
  }

  static void narrow(const float* from, void* y, DType dtype, int64_t at, int count) {
    if (dtype == DType::f32) {
      std::memcpy(static_cast<float*>(y) + at, from, size_t(count) * 4);
      return;
    }
    uint16_t* to = static_cast<uint16_t*>(y) + at;
    for (int i = 0; i < count; ++i) {
      to[i] = dtype == DType::f16 ? _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT) : float_to_bf16(from[i]);
    }
  }
};

bool runs_here() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

constexpr Kernel kernels[] = {
    MLXQ_FLOAT_KERNEL(Avx2, "avx2:dot", dot),
    MLXQ_FLOAT_KERNEL(Avx2, "avx2:strip", strip),
    MLXQ_FLOAT_KERNEL(Avx2, "avx2:straight", straight),
};

}  // namespace

extern const Family avx2_family;
const Family avx2_family{"avx2", runs_here, kernels, sizeof(kernels) / sizeof(kernels[0])};

}  // namespace mlxq
