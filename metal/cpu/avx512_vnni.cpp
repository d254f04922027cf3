// AVX-512 VNNI: exact integer dot products.
//
// Codes are unsigned integers already, so x is made integer too: within each group of a row, x = x_scale * v with
// |v| < 2^15 (x in 16-bit floats) or 2^23 (float32), v written as signed bytes v = 256 * high + low (65536 * high +
// 256 * middle + low). vpdpbusd multiplies 64 code bytes by 64 plane bytes and adds fours into 16 int32 lanes; a group's
// sum never overflows (128 * 255 * 2^15 < 2^31), and
//
//   y[m, n] = sum over groups of  x_scale * scale * (sum of code * v)  +  bias * (x_scale * sum of v)
//
// The only rounding is x's own, 2^-16 (2^-24) of the group's largest |x|. A row of x that holds Inf or NaN, or a group
// so small that its scale is subnormal, is computed by the scalar loops.
//
// A byte holds F = 8 / bits codes; "field" j of byte B is code F * B + j: (byte >> bits * j) & mask. Prepared planes follow
// that order, per chunk of 64 word bytes: [chunk][plane][field][64], padded with zeros.
//
//   gemv (M <= 4)   lanes run along K. A row of words streams through once for all rows of x; four rows of W at a time
//                   share the loads of x. Limited by memory.
//   gemm            lanes run along N. 32 rows of W are transposed, unpacked to bytes, and kept in the L2 cache:
//                   panel[dword][field][32 rows x 4 codes]. Every block of rows of x then needs, per 64 products,
//                   one vpdpbusd a plane with a broadcast dword of x: 24 int32 accumulators, float totals in L1.
//                   Limited by vpdpbusd.
// A q8mm brings x as codes of one byte: one plane, no rounding, no row out of the ordinary. Its z comes off the sums, of a
// lane in gemv and of a group in gemm, where they begin. PLANES is 1 for it, and 0 where per_row makes K one group.
#include <immintrin.h>

#include <cstring>

#include "avx512_common.h"
#include "fields.h"
#include "kernel.h"
#include "numeric.h"
#include "panel.h"

namespace mlxq {
namespace {

constexpr int gemv_rows = 4;      // the largest M that gemv takes
constexpr int lanes = 16;
constexpr float smallest_scaled = 0x1p-90f;  // a group with a smaller maximum would have a subnormal scale

struct alignas(64) Header {
  uint32_t exact_needed;  // the row goes through scalar_row
  float x_scale;          // of a q8mm, like what follows
  int32_t start;          // -z * (sum of the row's codes)
};

int planes_of(const Qmm& q) { return q.x_scales ? 1 : q.x_dtype == DType::f32 ? 3 : 2; }

int groups(const Qmm& q) { return q.K / q.group_size; }
int chunks(const Qmm& q) { return (q.K * q.bits / 32 + 15) / 16; }

// A prepared row: Header, x_scale[groups], x_sum[groups], planes. Of a q8mm: Header, where each group's int32 sum starts,
// x_sum[groups] of the codes, one plane, and for each of its chunks where the 16 lanes' sums start. Of a tiled one: its
// x_scale is 1, its x_sums are scaled, and x_scale[groups] comes last.
size_t scale_offset() { return sizeof(Header); }
size_t sum_offset(const Qmm& q) { return scale_offset() + 4 * padded16(groups(q)); }
size_t plane_offset(const Qmm& q) { return sum_offset(q) + 4 * padded16(groups(q)); }

size_t row_bytes(const Qmm& q) {
  return plane_offset(q) + size_t(chunks(q)) * (planes_of(q) * (8 / q.bits) + (q.x_scales ? 1 : 0)) * 64 +
         (q.tiled ? 4 * padded16(groups(q)) : 0);
}

size_t tile_scale_offset(const Qmm& q) { return row_bytes(q) - 4 * padded16(groups(q)); }

const Header& header(const char* row) { return *reinterpret_cast<const Header*>(row); }

// What by_field gives, each field to its 64 bytes of a chunk.
template <int FIELDS>
void store_fields(char* to, __m256i bytes) {
  if constexpr (FIELDS == 1) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
  } else if constexpr (FIELDS == 2) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 64), _mm256_extracti128_si256(bytes, 1));
  } else {
    alignas(32) char fieldwise[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(fieldwise), bytes);
    for (int j = 0; j < FIELDS; ++j) {
      std::memcpy(to + 64 * j, fieldwise + 8 * j, 8);
    }
  }
}

// Low signed byte of v, and v without it, shifted down.
__m512i split_low(__m512i& v) {
  __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(v, 24), 24);
  v = _mm512_srai_epi32(_mm512_sub_epi32(v, low), 8);
  return low;
}

template <int BITS, int PLANES>
void prepare_row(const Qmm& q, const void* x, int64_t base, char* row) {
  constexpr int fields = 8 / BITS;
  constexpr float limit = PLANES == 3 ? 8355700.0f : 32639.0f;  // 127 in every plane, less what rounding adds
  auto* header = reinterpret_cast<Header*>(row);
  auto* scales = reinterpret_cast<float*>(row + scale_offset());
  auto* sums = reinterpret_cast<float*>(row + sum_offset(q));
  char* planes = row + plane_offset(q);
  std::memset(row, 0, sizeof(Header));
  int count = groups(q);
  std::memset(scales + count, 0, 4 * (padded16(count) - count));
  std::memset(sums + count, 0, 4 * (padded16(count) - count));
  int last_chunk = chunks(q) - 1;
  if (q.K * q.bits / 32 % 16 != 0) {
    std::memset(planes + size_t(last_chunk) * PLANES * fields * 64, 0, PLANES * fields * 64);
  }
  const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
  for (int g = 0; g < count; ++g) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 bad = 0;
    for (int k = g * q.group_size; k < (g + 1) * q.group_size; k += lanes) {
      __m512 v = _mm512_and_ps(load16(x, q.x_dtype, base + k), magnitude);
      bad |= _mm512_cmp_ps_mask(v, _mm512_set1_ps(__builtin_inff()), _CMP_NLT_UQ);
      most = _mm512_max_ps(most, v);
    }
    float top = _mm512_reduce_max_ps(most);
    if (bad || (top != 0 && top < smallest_scaled)) {
      header->exact_needed = 1;
      top = 0;
    }
    float to_integer = top != 0 ? limit / top : 0;
    const __m512 factor = _mm512_set1_ps(to_integer);
    __m512i total = _mm512_setzero_si512();
    for (int k = g * q.group_size; k < (g + 1) * q.group_size; k += 32) {
      __m512i v0 = _mm512_setzero_si512(), v1 = v0;
      if (top != 0) {
        v0 = _mm512_cvtps_epi32(_mm512_mul_ps(load16(x, q.x_dtype, base + k), factor));
        v1 = _mm512_cvtps_epi32(_mm512_mul_ps(load16(x, q.x_dtype, base + k + lanes), factor));
      }
      total = _mm512_add_epi32(total, _mm512_add_epi32(v0, v1));
      int first_byte = k / fields;  // of the row's words
      char* chunk = planes + size_t(first_byte / 64) * PLANES * fields * 64 + first_byte % 64;
      for (int plane = PLANES - 1; plane >= 0; --plane) {
        __m512i low0 = split_low(v0), low1 = split_low(v1);
        __m256i bytes = by_field<BITS>(
            _mm256_set_m128i(_mm512_cvtepi32_epi8(low1), _mm512_cvtepi32_epi8(low0)));
        store_fields<fields>(chunk + plane * fields * 64, bytes);
      }
    }
    float scale = top / limit;
    scales[g] = scale;
    sums[g] = scale * float(_mm512_reduce_add_epi32(total));
  }
}

template <int BITS>
void prepare_codes(const Qmm& q, const int8_t* x, const float* x_scales, char* row) {
  constexpr int fields = 8 / BITS;
  auto* starts = reinterpret_cast<int32_t*>(row + scale_offset());
  auto* sums = reinterpret_cast<float*>(row + sum_offset(q));
  char* planes = row + plane_offset(q);
  int count = groups(q), last = chunks(q), whole = 0;
  std::memset(sums + count, 0, 4 * (padded16(count) - count));
  std::memset(planes + size_t(last - 1) * fields * 64, 0, fields * 64);
  for (int g = 0; g < count; ++g) {
    __m256i total = _mm256_setzero_si256();
    for (int k = g * q.group_size; k < (g + 1) * q.group_size; k += 32) {
      __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k));
      total = _mm256_dpbusd_epi32(total, _mm256_set1_epi8(1), codes);
      int first_byte = k / fields;
      store_fields<fields>(planes + size_t(first_byte / 64) * fields * 64 + first_byte % 64, by_field<BITS>(codes));
    }
    int sum = _mm512_reduce_add_epi32(_mm512_zextsi256_si512(total));
    starts[g] = -sum * (1 << (BITS - 1));
    sums[g] = float(sum);
    whole += sum;
  }
  if (q.tiled) {
    auto* tile_scales = reinterpret_cast<float*>(row + tile_scale_offset(q));
    std::memset(tile_scales, 0, 4 * padded16(count));
    for (int g = 0; g < count; ++g) {
      tile_scales[g] = x_scales[g];
      sums[g] *= x_scales[g];
    }
  }
  for (int c = 0; c < last; ++c) {
    __m512i total = _mm512_setzero_si512();
    for (int j = 0; j < fields; ++j) {
      total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), _mm512_loadu_si512(planes + (c * fields + j) * 64));
    }
    total = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), total), BITS - 1);
    _mm512_storeu_si512(planes + (size_t(last) * fields + c) * 64, total);
  }
  // Through unsigned: the sum of K products with an unsigned code wraps too, and what is left of both fits.
  *reinterpret_cast<Header*>(row) = {0, q.tiled ? 1.0f : *x_scales, int32_t(-uint32_t(whole) << (BITS - 1))};
}

template <int BITS>
void prepare_bits(const Qmm& q, char* prepared, int begin, int end) {
  for (int m = begin; m < end; ++m) {
    int64_t base = int64_t(q.x_rows ? q.x_rows[m] : m) * q.K;
    char* row = prepared + size_t(m) * row_bytes(q);
    if (q.x_scales) {
      prepare_codes<BITS>(q, static_cast<const int8_t*>(q.x) + base, q.x_scales_of(base / q.K), row);
    } else if (q.x_dtype == DType::f32) {
      prepare_row<BITS, 3>(q, q.x, base, row);
    } else {
      prepare_row<BITS, 2>(q, q.x, base, row);
    }
  }
}

void prepare(const Qmm& q, char* prepared, int begin, int end) {
  (q.bits == 2 ? prepare_bits<2> : q.bits == 4 ? prepare_bits<4> : prepare_bits<8>)(q, prepared, begin, end);
  _mm256_zeroupper();
}

// A group's integer sum as float, from the sums of its planes: two planes fit one int32, three do not.
// By value, and every loop below that indexes accumulators is unrolled by pragma: otherwise gcc keeps them in memory.
__m512 combine(__m512i high, __m512i low) {
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
}

__m512 combine(__m512i high, __m512i middle, __m512i low) {
  return _mm512_fmadd_ps(combine(high, middle), _mm512_set1_ps(256), _mm512_cvtepi32_ps(low));
}

// vpdpbusd in place. As an intrinsic gcc 12 gives half the accumulators a second register and moves them every round.
void dot(__m512i& sum, __m512i codes, __m512i plane) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(plane));
}

template <int PLANES>
__m512 combine_planes(__m512i first, __m512i second, __m512i last) {
  return PLANES == 1 ? _mm512_cvtepi32_ps(first) : PLANES == 2 ? combine(first, last) : combine(first, second, last);
}

#define MLXQ_COMBINE(sums) combine_planes<PLANES>(sums[0], sums[PLANES / 2], sums[PLANES - 1])
#define MLXQ_UNROLL _Pragma("GCC unroll 16")

// ---- gemv ----------------------------------------------------------------------------------------------------------

// Rows [n, n + NR) of W times MR rows of x.
template <int BITS, int PLANES, int MR, int NR>
void gemv_rows_block(const Qmm& q, const char* const* rows, int m, int n) {
  constexpr int fields = 8 / BITS, codes_per_lane = 32 / BITS;
  const int count = groups(q), words_per_row = q.K * BITS / 32;
  const int groups_per_chunk_x16 = 16 * codes_per_lane * 16 / q.group_size;  // times 16: 8-bit/128 has half a group
  const uint32_t* words[NR];
  MLXQ_UNROLL
  for (int r = 0; r < NR; ++r) {
    words[r] = q.words + int64_t(n + r) * words_per_row;
  }
  __m512 acc[MR][NR];
  MLXQ_UNROLL
  for (int i = 0; i < MR; ++i) {
    MLXQ_UNROLL
    for (int r = 0; r < NR; ++r) {
      acc[i][r] = _mm512_setzero_ps();
    }
  }
  const __m512i lane_code = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(codes_per_lane));
  const int shift = __builtin_ctz(q.group_size);
  const size_t planes_at = plane_offset(q), sums_at = sum_offset(q);
  const size_t starts_at = planes_at + size_t(chunks(q)) * fields * 64;  // with one plane
  const bool scaled_groups = PLANES > 1 || q.tiled;
  const size_t x_scales_at = PLANES > 1 ? scale_offset() : tile_scale_offset(q);
  const int chunks_per_16_groups = 256 / groups_per_chunk_x16;
  // Rows lie one after the other, so any distance meets words that will be wanted: the next rows', at least 4 KiB on.
  const int ahead = NR * words_per_row > 1024 ? NR * words_per_row : 1024;
  const int groups_ahead = ahead * 32 / BITS / q.group_size;
  const int item = q.scale_dtype == DType::f32 ? 4 : 2;
  const int last = chunks(q);
  for (int g0 = 0, c0 = 0; g0 < count; g0 += lanes, c0 += chunks_per_16_groups) {
    // 16 groups: their scales once as a vector, spread over the lanes chunk by chunk.
    __mmask16 here = count - g0 >= lanes ? 0xffff : (1u << (count - g0)) - 1;
    __m512 scaled[MR][NR];
    MLXQ_UNROLL
    for (int r = 0; r < NR; ++r) {
      int64_t at = int64_t(n + r) * count + g0;
      _mm_prefetch(static_cast<const char*>(q.scales) + (at + groups_ahead) * item, _MM_HINT_T0);
      _mm_prefetch(static_cast<const char*>(q.biases) + (at + groups_ahead) * item, _MM_HINT_T0);
      __m512 scale = load16(q.scales, q.scale_dtype, at, here), bias = load16(q.biases, q.scale_dtype, at, here);
      if constexpr (PLANES == 1) {
        bias = _mm512_fmadd_ps(_mm512_set1_ps(1 << (BITS - 1)), scale, bias);
      }
      MLXQ_UNROLL
      for (int i = 0; i < MR; ++i) {
        const char* row = rows[m + i];
        scaled[i][r] = scaled_groups ? _mm512_mul_ps(scale, _mm512_load_ps(row + x_scales_at + 4 * g0)) : scale;
        acc[i][r] = _mm512_fmadd_ps(bias, _mm512_load_ps(row + sums_at + 4 * g0), acc[i][r]);
      }
    }
    int stop = c0 + chunks_per_16_groups < last ? c0 + chunks_per_16_groups : last;
    for (int c = c0; c < stop; ++c) {
      __mmask16 valid = words_per_row - c * 16 >= 16 ? 0xffff : (1u << (words_per_row - c * 16)) - 1;
      __m512i group = _mm512_srli_epi32(
          _mm512_add_epi32(lane_code, _mm512_set1_epi32((c - c0) * codes_per_lane * 16)), shift);
      __m512i codes[NR][fields];
      MLXQ_UNROLL
      for (int r = 0; r < NR; ++r) {
        const uint32_t* at = words[r] + c * 16;
        _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_T0);
        __m512i w = _mm512_maskz_loadu_epi32(valid, at);
        MLXQ_UNROLL
        for (int j = 0; j < fields; ++j) {
          codes[r][j] = field<BITS>(w, j);
        }
      }
      MLXQ_UNROLL
      for (int i = 0; i < MR; ++i) {
        const char* planes = rows[m + i] + planes_at + size_t(c) * PLANES * fields * 64;
        MLXQ_UNROLL
        for (int r = 0; r < NR; ++r) {
          // Horner's rule over the planes: each starts from the one above, shifted. A lane holds 32 / bits products,
          // so the sum fits an int32, except with three planes of 8-bit codes, whose last is added as a float.
          constexpr int exact = BITS == 8 && PLANES == 3 ? 2 : PLANES;
          __m512i sum = PLANES == 1 ? _mm512_load_si512(rows[m + i] + starts_at + size_t(c) * 64)
                                    : _mm512_setzero_si512();
          __m512i last = _mm512_setzero_si512();
          MLXQ_UNROLL
          for (int p = 0; p < PLANES; ++p) {
            __m512i& to = p < exact ? sum : last;
            sum = p > 0 && p < exact ? _mm512_slli_epi32(sum, 8) : sum;
            MLXQ_UNROLL
            for (int j = 0; j < fields; ++j) {
              to = _mm512_dpbusd_epi32(to, codes[r][j], _mm512_load_si512(planes + (p * fields + j) * 64));
            }
          }
          __m512 dot = _mm512_cvtepi32_ps(sum);
          if constexpr (exact < PLANES) {
            dot = _mm512_fmadd_ps(dot, _mm512_set1_ps(256), _mm512_cvtepi32_ps(last));
          }
          acc[i][r] = _mm512_fmadd_ps(dot, _mm512_permutexvar_ps(group, scaled[i][r]), acc[i][r]);
        }
      }
    }
  }
  MLXQ_UNROLL
  for (int i = 0; i < MR; ++i) {
    MLXQ_UNROLL
    for (int r = 0; r < NR; ++r) {
      float sum = _mm512_reduce_add_ps(acc[i][r]);
      store(q.y, q.x_dtype, y_row(q, m + i) + n + r, PLANES == 1 ? sum * header(rows[m + i]).x_scale : sum);
    }
  }
}

// The same where all of K is one sum.
template <int BITS, int MR, int NR>
void gemv_whole_block(const Qmm& q, const char* const* rows, int m, int n) {
  constexpr int fields = 8 / BITS;
  const int words_per_row = q.K * BITS / 32, last = chunks(q);
  const int ahead = NR * words_per_row > 1024 ? NR * words_per_row : 1024;
  const size_t planes_at = plane_offset(q);
  const uint32_t* words = q.words + int64_t(n) * words_per_row;
  __m512i sum[MR][NR];
  MLXQ_UNROLL
  for (int i = 0; i < MR; ++i) {
    MLXQ_UNROLL
    for (int r = 0; r < NR; ++r) {
      sum[i][r] = _mm512_setzero_si512();
    }
  }
  for (int c = 0; c < last; ++c) {
    __mmask16 valid = words_per_row - c * 16 >= 16 ? 0xffff : (1u << (words_per_row - c * 16)) - 1;
    MLXQ_UNROLL
    for (int r = 0; r < NR; ++r) {
      const uint32_t* at = words + int64_t(r) * words_per_row + c * 16;
      _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_T0);
      __m512i w = _mm512_maskz_loadu_epi32(valid, at);
      MLXQ_UNROLL
      for (int j = 0; j < fields; ++j) {
        __m512i codes = field<BITS>(w, j);
        MLXQ_UNROLL
        for (int i = 0; i < MR; ++i) {
          dot(sum[i][r], codes, _mm512_load_si512(rows[m + i] + planes_at + (size_t(c) * fields + j) * 64));
        }
      }
    }
  }
  MLXQ_UNROLL
  for (int i = 0; i < MR; ++i) {
    MLXQ_UNROLL
    for (int r = 0; r < NR; ++r) {
      const Header& row = header(rows[m + i]);
      int32_t whole = int32_t(uint32_t(_mm512_reduce_add_epi32(sum[i][r])) + uint32_t(row.start));
      float scale = row.x_scale * load(q.scales, q.scale_dtype, int64_t(n + r) * groups(q));
      store(q.y, q.x_dtype, y_row(q, m + i) + n + r, float(whole) * scale);
    }
  }
}

template <int BITS, int PLANES, int MR>
void gemv_columns(const Qmm& q, const char* const* rows, int m, int begin, int end) {
  constexpr int NR = MR == 1 ? 4 : 2;
  int n = begin;
  for (; n + NR <= end; n += NR) {
    if constexpr (PLANES == 0) {
      gemv_whole_block<BITS, MR, NR>(q, rows, m, n);
    } else {
      gemv_rows_block<BITS, PLANES, MR, NR>(q, rows, m, n);
    }
  }
  for (; n < end; ++n) {
    if constexpr (PLANES == 0) {
      gemv_whole_block<BITS, MR, 1>(q, rows, m, n);
    } else {
      gemv_rows_block<BITS, PLANES, MR, 1>(q, rows, m, n);
    }
  }
}

template <int BITS, int PLANES>
void gemv_all(const Qmm& q, const char* prepared, int begin, int end) {
  const char* rows[gemv_rows];
  for (int m = 0; m < q.M; m += gemv_rows) {
    int count = q.M - m < gemv_rows ? q.M - m : gemv_rows;
    Qmm block = q;
    for (int i = 0; i < count; ++i) {
      rows[i] = prepared + size_t(m + i) * row_bytes(q);
    }
    // Rows of the block are rows 0 ... of a smaller product.
    int64_t item = q.x_dtype == DType::f32 ? 4 : 2;
    if (q.y_rows) {
      block.y_rows = q.y_rows + m;
    } else {
      block.y = static_cast<char*>(q.y) + int64_t(m) * q.N * item;
    }
    switch (count) {
      case 1:
        gemv_columns<BITS, PLANES, 1>(block, rows, 0, begin, end);
        break;
      case 2:
        gemv_columns<BITS, PLANES, 2>(block, rows, 0, begin, end);
        break;
      case 3:
        gemv_columns<BITS, PLANES, 3>(block, rows, 0, begin, end);
        break;
      default:
        gemv_columns<BITS, PLANES, 4>(block, rows, 0, begin, end);
    }
  }
}

// ---- gemm ----------------------------------------------------------------------------------------------------------

// MR rows of x times the panel.
template <int BITS, int PLANES, int MR>
void gemm_block(const Qmm& q, const Panel& panel, const char* prepared, int m, int n0, int columns) {
  constexpr int fields = 8 / BITS;
  const size_t stride = row_bytes(q), scales_at = scale_offset(), sums_at = sum_offset(q), planes_at = plane_offset(q);
  const bool scaled_groups = PLANES > 1 || q.tiled;
  const size_t x_scales_at = PLANES > 1 ? scales_at : tile_scale_offset(q);
  const char* x[MR];
  MLXQ_UNROLL
  for (int i = 0; i < MR; ++i) {
    x[i] = prepared + size_t(m + i) * stride;
  }
  alignas(64) float totals[MR][panel_columns];
  std::memset(totals, 0, sizeof(totals));
  const int count = groups(q), dwords = q.group_size * BITS / 32, run = dwords < 16 ? dwords : 16;
  const char* codes = panel.codes;
  for (int g = 0; g < count; ++g) {
    __m512i sum[MR][2][PLANES];
    MLXQ_UNROLL
    for (int i = 0; i < MR; ++i) {
      MLXQ_UNROLL
      for (int p = 0; p < PLANES; ++p) {
        sum[i][0][p] = sum[i][1][p] = _mm512_setzero_si512();
      }
      if constexpr (PLANES == 1) {
        int32_t start;
        std::memcpy(&start, x[i] + scales_at + 4 * g, 4);
        sum[i][0][0] = sum[i][1][0] = _mm512_set1_epi32(start);
      }
    }
    for (int d = g * dwords; d < (g + 1) * dwords; d += run) {  // runs stay within a chunk
      size_t at = planes_at + size_t(d / 16) * PLANES * fields * 64 + d % 16 * 4;
      for (int t = 0; t < run; ++t, at += 4) {
        MLXQ_UNROLL
        for (int j = 0; j < fields; ++j, codes += 128) {
          __m512i w0 = _mm512_load_si512(codes), w1 = _mm512_load_si512(codes + 64);
          MLXQ_UNROLL
          for (int i = 0; i < MR; ++i) {
            MLXQ_UNROLL
            for (int p = 0; p < PLANES; ++p) {
              int32_t four;
              std::memcpy(&four, x[i] + at + (p * fields + j) * 64, 4);
              __m512i v = _mm512_set1_epi32(four);
              dot(sum[i][0][p], w0, v);
              dot(sum[i][1][p], w1, v);
            }
          }
        }
      }
    }
    MLXQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      __m512 scale = _mm512_load_ps(panel.scales + size_t(g) * panel_columns + h * 16);
      __m512 bias = _mm512_load_ps(panel.biases + size_t(g) * panel_columns + h * 16);
      if constexpr (PLANES == 1) {
        bias = _mm512_fmadd_ps(_mm512_set1_ps(1 << (BITS - 1)), scale, bias);
      }
      MLXQ_UNROLL
      for (int i = 0; i < MR; ++i) {
        float x_scale = 1, x_sum;
        if (scaled_groups) {
          std::memcpy(&x_scale, x[i] + x_scales_at + 4 * g, 4);
        }
        std::memcpy(&x_sum, x[i] + sums_at + 4 * g, 4);
        __m512 total = _mm512_load_ps(totals[i] + h * 16);
        total = _mm512_fmadd_ps(bias, _mm512_set1_ps(x_sum), total);
        __m512 by = scaled_groups ? _mm512_mul_ps(scale, _mm512_set1_ps(x_scale)) : scale;
        total = _mm512_fmadd_ps(MLXQ_COMBINE(sum[i][h]), by, total);
        _mm512_store_ps(totals[i] + h * 16, total);
      }
    }
  }
  MLXQ_UNROLL
  for (int i = 0; i < MR; ++i) {
    for (int h = 0; h < 2 && h * 16 < columns; ++h) {
      int here = columns - h * 16 < 16 ? columns - h * 16 : 16;
      __m512 total = _mm512_load_ps(totals[i] + h * 16);
      if constexpr (PLANES == 1) {
        total = _mm512_mul_ps(total, _mm512_set1_ps(header(x[i]).x_scale));
      }
      store16(q.y, q.x_dtype, y_row(q, m + i) + n0 + h * 16, total, (1u << here) - 1);
    }
  }
}

// The same where all of K is one sum.
template <int BITS, int MR>
void gemm_whole_block(const Qmm& q, const Panel& panel, const char* prepared, int m, int n0, int columns) {
  constexpr int fields = 8 / BITS;
  const size_t stride = row_bytes(q), planes_at = plane_offset(q);
  const char* x[MR];
  __m512i sum[MR][2];
  MLXQ_UNROLL
  for (int i = 0; i < MR; ++i) {
    x[i] = prepared + size_t(m + i) * stride;
    sum[i][0] = sum[i][1] = _mm512_set1_epi32(header(x[i]).start);
  }
  const int dwords = q.K * BITS / 32;
  const char* codes = panel.codes;
  for (int d = 0; d < dwords; d += 16) {
    const int run = dwords - d < 16 ? dwords - d : 16;
    size_t at = planes_at + size_t(d / 16) * fields * 64;
    for (int t = 0; t < run; ++t, at += 4) {
      MLXQ_UNROLL
      for (int j = 0; j < fields; ++j, codes += 128) {
        __m512i w0 = _mm512_load_si512(codes), w1 = _mm512_load_si512(codes + 64);
        MLXQ_UNROLL
        for (int i = 0; i < MR; ++i) {
          int32_t four;
          std::memcpy(&four, x[i] + at + j * 64, 4);
          __m512i v = _mm512_set1_epi32(four);
          dot(sum[i][0], w0, v);
          dot(sum[i][1], w1, v);
        }
      }
    }
  }
  MLXQ_UNROLL
  for (int i = 0; i < MR; ++i) {
    MLXQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      __mmask16 here = columns >= (h + 1) * 16 ? 0xffff : (1u << (columns > h * 16 ? columns - h * 16 : 0)) - 1;
      __m512 scale = _mm512_mul_ps(_mm512_set1_ps(header(x[i]).x_scale), _mm512_load_ps(panel.scales + h * 16));
      store16(q.y, q.x_dtype, y_row(q, m + i) + n0 + h * 16, _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][h]), scale),
              here);
    }
  }
}

// Rows of a q8mm: as many at a time as the registers hold, then halves of it.
template <int BITS, int PLANES, int MR>
void gemm_codes(const Qmm& q, const Panel& panel, const char* prepared, int m, int n0, int columns) {
  for (; m + MR <= q.M; m += MR) {
    if constexpr (PLANES == 0) {
      gemm_whole_block<BITS, MR>(q, panel, prepared, m, n0, columns);
    } else {
      gemm_block<BITS, PLANES, MR>(q, panel, prepared, m, n0, columns);
    }
  }
  if constexpr (MR > 1) {
    gemm_codes<BITS, PLANES, MR / 2>(q, panel, prepared, m, n0, columns);
  }
}

template <int BITS, int PLANES>
void gemm_all(const Qmm& q, const char* prepared, int begin, int end) {
  constexpr int MR = PLANES == 2 ? 6 : 4;
  Panel panel = panel_memory(q);
  for (int n0 = begin; n0 < end; n0 += panel_columns) {
    int columns = end - n0 < panel_columns ? end - n0 : panel_columns;
    build_panel<BITS>(q, panel, n0);
    if constexpr (PLANES < 2) {
      gemm_codes<BITS, PLANES, 8>(q, panel, prepared, 0, n0, columns);
    } else {
      int m = 0;
      for (; m + MR <= q.M; m += MR) {
        gemm_block<BITS, PLANES, MR>(q, panel, prepared, m, n0, columns);
      }
      switch (q.M - m) {
        case 5:
          gemm_block<BITS, PLANES, MR == 6 ? 5 : 1>(q, panel, prepared, m, n0, columns);
          break;
        case 4:
          gemm_block<BITS, PLANES, MR == 6 ? 4 : 1>(q, panel, prepared, m, n0, columns);
          break;
        case 3:
          gemm_block<BITS, PLANES, 3>(q, panel, prepared, m, n0, columns);
          break;
        case 2:
          gemm_block<BITS, PLANES, 2>(q, panel, prepared, m, n0, columns);
          break;
        case 1:
          gemm_block<BITS, PLANES, 1>(q, panel, prepared, m, n0, columns);
      }
    }
  }
}

// ---- entries -------------------------------------------------------------------------------------------------------

using Run = void (*)(const Qmm&, const char*, int, int);

template <template <int, int> class Body>
Run choose(const Qmm& q) {
  static constexpr Run of[3][4] = {
      {Body<2, 0>::run, Body<2, 1>::run, Body<2, 2>::run, Body<2, 3>::run},
      {Body<4, 0>::run, Body<4, 1>::run, Body<4, 2>::run, Body<4, 3>::run},
      {Body<8, 0>::run, Body<8, 1>::run, Body<8, 2>::run, Body<8, 3>::run},
  };
  return of[q.bits / 4][q.x_scales && q.per_row ? 0 : planes_of(q)];
}

template <int BITS, int PLANES>
struct Gemv {
  static void run(const Qmm& q, const char* x, int begin, int end) { gemv_all<BITS, PLANES>(q, x, begin, end); }
};

template <int BITS, int PLANES>
struct Gemm {
  static void run(const Qmm& q, const char* x, int begin, int end) { gemm_all<BITS, PLANES>(q, x, begin, end); }
};

template <template <int, int> class Body>
void run(const Qmm& q, const char* prepared, int begin, int end) {
  choose<Body>(q)(q, prepared, begin, end);
  _mm256_zeroupper();
  for (int m = 0; m < q.M; ++m) {
    if (header(prepared + size_t(m) * row_bytes(q)).exact_needed) {
      scalar_row(q, m, begin, end);
    }
  }
}

void codes_of_row(const void* x, DType x_dtype, int64_t at, int64_t K, int8_t* codes, float* scale) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  auto lanes_at = [&](int64_t k) { return K - k >= lanes ? __mmask16(0xffff) : __mmask16((1u << (K - k)) - 1); };
  __m512i largest = _mm512_setzero_si512();  // |x| as its pattern: ordered like the number, and NaN above all
  for (int64_t k = 0; k < K; k += lanes) {
    __m512i pattern = _mm512_castps_si512(load16(x, x_dtype, at + k, lanes_at(k)));
    largest = _mm512_max_epi32(largest, _mm512_and_si512(pattern, magnitude));
  }
  int top = _mm512_reduce_max_epi32(largest);
  *scale = top == 0 ? 1.0f : bits_to_float(uint32_t(top)) / 127.0f;
  const __m512 by = _mm512_set1_ps(*scale), low = _mm512_set1_ps(-127), high = _mm512_set1_ps(127);
  for (int64_t k = 0; k < K; k += lanes) {
    __m512 value = _mm512_div_ps(load16(x, x_dtype, at + k, lanes_at(k)), by);
    value = _mm512_min_ps(_mm512_max_ps(value, low), high);  // NaN is -127
    _mm_mask_storeu_epi8(codes + k, lanes_at(k), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value)));
  }
  _mm256_zeroupper();
}

bool serves_gemv(const Qmm& q) { return q.transpose && q.M <= gemv_rows; }
bool serves_gemm(const Qmm& q) { return q.transpose; }
int gemv_unit(const Qmm&) { return 16; }
int gemm_unit(const Qmm&) { return panel_columns; }

constexpr Kernel kernels[] = {
    {"avx512_vnni:gemv", serves_gemv, gemv_unit, row_bytes, prepare, run<Gemv>},
    {"avx512_vnni:gemm", serves_gemm, gemm_unit, row_bytes, prepare, run<Gemm>},
    {"avx512_vnni:q8_gemv", serves_gemv, gemv_unit, row_bytes, prepare, run<Gemv>, true},
    {"avx512_vnni:q8_gemm", serves_gemm, gemm_unit, row_bytes, prepare, run<Gemm>, true},
};

bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
}

}  // namespace

extern const Family avx512_vnni_family;
const Family avx512_vnni_family{"avx512_vnni", runs_here, kernels, 4, codes_of_row};

}  // namespace mlxq
