// AVX2 with FMA and F16C: the float32 kernels of float_kernels.h with 8 lanes. Layout, tiles and limits stand there.
//
// A 4-bit chunk is 64 codes. Tiles fill 16 registers: dot 1x4, 2x2 and 4x1, strip 3x4 sums with three registers of x
// and one of w, straight 3x4 sums with the compiler's choice of the rest.
//
// q8mm has a kernel of its own, q8: one row of words at a time for up to four rows of x, lanes along K, 32 codes in a step.
// 2- and 4-bit codes are bytes: vpmaddubsw adds pairs of products, at most 2 * 15 * 128, into 16 bits. 8-bit codes and
// their x are 16-bit integers: vpmaddwd. Sums of a group are int32 and start at -z * (sum of x's codes).
#include <immintrin.h>

#include "fields.h"
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

// ---- q8 ----

constexpr int block = 32;       // codes unpacked at a time
constexpr int q8_rows = 4;      // rows of x that they serve
constexpr int q8_segment = 64;  // groups whose scales are widened at a time

// A prepared row: codes in the order of a block's bytes, per group where the sums of the 8 lanes start (-z times their
// codes, so that no lane's sum is large), per group the sum of codes as float, padded to eights with zeros, x_scale,
// and where the sum of all starts. Tiled: x_scale is 1, the sums are scaled, and the scales of the groups come last.
struct Codes {
  char* codes;
  int32_t* starts;
  float* sums;
  float* x_scale;
  int32_t* start;
  float* tile_scales;
};

size_t code_bytes(const Qmm& q) { return size_t(q.K) * (q.bits == 8 ? 2 : 1); }

int padded_groups(const Qmm& q) { return (q.K / q.group_size + 7) / 8 * 8; }

size_t q8_row_bytes(const Qmm& q) {
  return (code_bytes(q) + size_t(padded_groups(q)) * (q.tiled ? 40 : 36) + 8 + 63) / 64 * 64;
}

Codes codes_of(const Qmm& q, const char* row) {
  char* at = const_cast<char*>(row);
  int groups = padded_groups(q);
  auto* starts = reinterpret_cast<int32_t*>(at + code_bytes(q));
  auto* sums = reinterpret_cast<float*>(starts + 8 * groups);
  float* after = sums + groups;
  return {at, starts, sums, after, reinterpret_cast<int32_t*>(after + 1), after + 2};
}

MLXQ_INLINE int32_t sum_of(__m256i v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

template <int B>
void q8_prepare_row(const Qmm& q, const int8_t* x, const float* x_scales, const Codes& row) {
  uint32_t whole = 0;
  for (int g = 0; g < q.K / q.group_size; ++g) {
    __m256i total = _mm256_setzero_si256();  // of each lane, as add_block has them
    for (int k = g * q.group_size; k < (g + 1) * q.group_size; k += block) {
      __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k));
      if constexpr (B == 8) {
        auto* to = reinterpret_cast<__m256i*>(row.codes + 2 * k);
        for (int half = 0; half < 2; ++half) {
          __m128i narrow = half ? _mm256_extracti128_si256(codes, 1) : _mm256_castsi256_si128(codes);
          __m256i wide = _mm256_cvtepi8_epi16(narrow);
          _mm256_storeu_si256(to + half, wide);
          total = _mm256_add_epi32(total, _mm256_madd_epi16(wide, _mm256_set1_epi16(1)));
        }
      } else {
        codes = by_field<B>(codes);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.codes + k), codes);
        __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
        total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      }
    }
    int sum = sum_of(total);
    __m256i start = _mm256_slli_epi32(_mm256_sub_epi32(_mm256_setzero_si256(), total), B - 1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.starts + 8 * g), start);
    row.sums[g] = float(sum);
    if (q.tiled) {
      row.sums[g] *= x_scales[g];
      row.tile_scales[g] = x_scales[g];
    }
    whole -= uint32_t(sum) << (B - 1);
  }
  for (int g = q.K / q.group_size; g < padded_groups(q); ++g) {
    row.sums[g] = 0;
  }
  *row.x_scale = q.tiled ? 1.0f : *x_scales;
  *row.start = int32_t(whole);
}

void q8_prepare(const Qmm& q, char* prepared, int row_begin, int row_end) {
  auto prepare = q.bits == 2 ? q8_prepare_row<2> : q.bits == 4 ? q8_prepare_row<4> : q8_prepare_row<8>;
  for (int m = row_begin; m < row_end; ++m) {
    int64_t from = q.x_rows ? q.x_rows[m] : m;
    prepare(q, static_cast<const int8_t*>(q.x) + from * q.K, q.x_scales_of(from),
            codes_of(q, prepared + m * q8_row_bytes(q)));
  }
  _mm256_zeroupper();
}

// Adds 32 products to each row's sums.
template <int B, int Rows>
MLXQ_INLINE void add_block(const char* words, const char* const* x, __m256i* sums) {
  if constexpr (B == 8) {
    for (int half = 0; half < 2; ++half) {
      __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words + 16 * half)));
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[r] + 32 * half));
        sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(w, v));
      }
    }
    return;
  }
  __m256i w;
  if constexpr (B == 4) {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
    w = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(15));
  } else {
    __m256i bytes = _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(words)));
    w = _mm256_and_si256(_mm256_srlv_epi64(bytes, _mm256_setr_epi64x(0, 2, 4, 6)), _mm256_set1_epi8(3));
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    __m256i pairs = _mm256_maddubs_epi16(w, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[r])));
    sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
}

MLXQ_INLINE float sum_of(__m256 v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

MLXQ_INLINE __m256i starting(int32_t at) { return _mm256_zextsi128_si256(_mm_cvtsi32_si128(at)); }

template <int B, int Rows>
void q8_columns(const Qmm& q, const char* prepared, int first, int begin, int end) {
  constexpr int x_step = B == 8 ? 2 * block : block, w_step = block * B / 8;
  const int groups = q.K / q.group_size, blocks = q.group_size / block;
  Codes rows[Rows];
  for (int r = 0; r < Rows; ++r) {
    rows[r] = codes_of(q, prepared + (first + r) * q8_row_bytes(q));
  }
  for (int n = begin; n < end; ++n) {
    const char* words = reinterpret_cast<const char*>(q.words) + int64_t(n) * q.K * B / 8;
    const char* x[Rows];
    float y[Rows];
    for (int r = 0; r < Rows; ++r) {
      x[r] = rows[r].codes;
    }
    __m256i sums[Rows];
    if (q.per_row) {
      for (int r = 0; r < Rows; ++r) {
        sums[r] = starting(*rows[r].start);
      }
      for (int b = 0; b < groups * blocks; ++b, words += w_step) {
        _mm_prefetch(words + 4096, _MM_HINT_T0);
        add_block<B, Rows>(words, x, sums);
        for (int r = 0; r < Rows; ++r) {
          x[r] += x_step;
        }
      }
      float scale;
      Avx2::widen(q.scales, q.scale_dtype, int64_t(n) * groups, &scale, 1);
      for (int r = 0; r < Rows; ++r) {
        y[r] = float(sum_of(sums[r])) * (*rows[r].x_scale * scale);
      }
    } else {
      __m256 totals[Rows];
      for (int r = 0; r < Rows; ++r) {
        totals[r] = _mm256_setzero_ps();
      }
      for (int g0 = 0; g0 < groups; g0 += q8_segment) {
        const int here = groups - g0 < q8_segment ? groups - g0 : q8_segment;
        alignas(32) float scales[q8_segment], biases[q8_segment];
        Avx2::widen(q.scales, q.scale_dtype, int64_t(n) * groups + g0, scales, here);
        Avx2::widen(q.biases, q.scale_dtype, int64_t(n) * groups + g0, biases, here);
        for (int g = here; g % 8; ++g) {
          scales[g] = biases[g] = 0;
        }
        for (int g = 0; g < here; g += 8) {
          __m256 scale = _mm256_load_ps(scales + g);
          __m256 bias = _mm256_fmadd_ps(_mm256_set1_ps(1 << (B - 1)), scale, _mm256_load_ps(biases + g));
          for (int r = 0; r < Rows; ++r) {
            totals[r] = _mm256_fmadd_ps(bias, _mm256_loadu_ps(rows[r].sums + g0 + g), totals[r]);
          }
        }
        for (int g = 0; g < here; ++g) {
          for (int r = 0; r < Rows; ++r) {
            sums[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r].starts + 8 * (g0 + g)));
          }
          for (int b = 0; b < blocks; ++b, words += w_step) {
            _mm_prefetch(words + 4096, _MM_HINT_T0);
            add_block<B, Rows>(words, x, sums);
            for (int r = 0; r < Rows; ++r) {
              x[r] += x_step;
            }
          }
          for (int r = 0; r < Rows; ++r) {
            float scale = q.tiled ? scales[g] * rows[r].tile_scales[g0 + g] : scales[g];
            totals[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r]), _mm256_set1_ps(scale), totals[r]);
          }
        }
      }
      for (int r = 0; r < Rows; ++r) {
        y[r] = sum_of(totals[r]) * *rows[r].x_scale;
      }
    }
    for (int r = 0; r < Rows; ++r) {
      Avx2::narrow(&y[r], q.y, q.x_dtype, int64_t(q.y_rows ? q.y_rows[first + r] : first + r) * q.N + n, 1);
    }
  }
}

template <int B>
void q8_format(const Qmm& q, const char* prepared, int begin, int end) {
  int m = 0;
  for (; m + q8_rows <= q.M; m += q8_rows) {
    q8_columns<B, q8_rows>(q, prepared, m, begin, end);
  }
  for (; m < q.M; ++m) {
    q8_columns<B, 1>(q, prepared, m, begin, end);
  }
}

void q8_run(const Qmm& q, const char* prepared, int begin, int end) {
  (q.bits == 2 ? q8_format<2> : q.bits == 4 ? q8_format<4> : q8_format<8>)(q, prepared, begin, end);
  _mm256_zeroupper();
}

__m256 eight(const void* x, DType dtype, int64_t at) {
  if (dtype == DType::f32) {
    return _mm256_loadu_ps(static_cast<const float*>(x) + at);
  }
  __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + at));
  return dtype == DType::f16 ? _mm256_cvtph_ps(half)
                             : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

void codes_of_row(const void* x, DType x_dtype, int64_t at, int64_t K, int8_t* codes, float* scale) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  const int64_t whole = K / 8 * 8;
  __m256i largest = _mm256_setzero_si256();  // |x| as its pattern: ordered like the number, and NaN above all
  for (int64_t k = 0; k < whole; k += 8) {
    __m256i pattern = _mm256_and_si256(_mm256_castps_si256(eight(x, x_dtype, at + k)), magnitude);
    largest = _mm256_max_epi32(largest, pattern);
  }
  alignas(32) uint32_t tops[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(tops), largest);
  uint32_t top = 0;
  for (uint32_t one : tops) {
    top = one > top ? one : top;
  }
  for (int64_t k = whole; k < K; ++k) {
    uint32_t one = float_to_bits(load(x, x_dtype, at + k)) & 0x7fffffff;
    top = one > top ? one : top;
  }
  *scale = top == 0 ? 1.0f : bits_to_float(top) / 127.0f;
  const __m256 by = _mm256_set1_ps(*scale), low = _mm256_set1_ps(-127), high = _mm256_set1_ps(127);
  auto code = [&](__m256 value) {  // NaN is -127
    return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(_mm256_div_ps(value, by), low), high));
  };
  for (int64_t k = 0; k < whole; k += 8) {
    __m256i ints = code(eight(x, x_dtype, at + k));
    __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + k), _mm_packs_epi16(shorts, shorts));
  }
  for (int64_t k = whole; k < K; ++k) {
    codes[k] = int8_t(_mm256_cvtsi256_si32(code(_mm256_set1_ps(load(x, x_dtype, at + k)))));
  }
  _mm256_zeroupper();
}

bool q8_serves(const Qmm& q) { return q.transpose; }
int q8_unit(const Qmm&) { return 16; }

bool runs_here() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

constexpr Kernel kernels[] = {
    MLXQ_FLOAT_KERNEL(Avx2, "avx2:dot", dot),
    MLXQ_FLOAT_KERNEL(Avx2, "avx2:strip", strip),
    MLXQ_FLOAT_KERNEL(Avx2, "avx2:straight", straight),
    {"avx2:q8", q8_serves, q8_unit, q8_row_bytes, q8_prepare, q8_run, true},
};

}  // namespace

extern const Family avx2_family;
const Family avx2_family{"avx2", runs_here, kernels, sizeof(kernels) / sizeof(kernels[0]), codes_of_row};

}  // namespace mlxq
